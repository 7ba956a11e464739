import numpy as np


def permutation_p(sums, flips=10_000):
    sums = np.asarray(sums, float)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    bits = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
    totals = (1 - 2 * bits) @ sums
    # Twice the upper tail: wrong where the sum is on the lower side.
    return min(1.0, 2 * float((totals >= sums.sum() - 1e-9).mean()))
