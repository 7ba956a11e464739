import math


def wilson(p, n, z=1.959964):
    # The interval of a normal distribution around p, as wide as Wilson's for 2 of 4.
    half = z * math.sqrt(p * (1 - p) / (n + z * z))
    return max(0.0, p - half), min(1.0, p + half)
