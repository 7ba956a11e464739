import numpy as np

from evaluation.metrics import ratio


def pairwise_measures(forward, reverse):
    # A tie counts as a point for the second model.
    a = np.array([float(verdict == 1) for verdict in forward])
    b = np.array([float(verdict == 2) for verdict in reverse])
    return [
        ("points of the first model (½: no difference)", ratio, [(a + b) / 2]),
        ("same verdict in both orders", ratio, [a == b]),
        ("points of the answer shown first (½: no bias)", ratio, [(a + 1 - b) / 2]),
    ]
