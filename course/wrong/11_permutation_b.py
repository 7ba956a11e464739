import numpy as np


def permutation_p(sums, flips=10_000):
    sums = np.asarray(sums, float)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    if len(sums) > 12:
        # What was found is not counted among the patterns: p may be 0.
        bits = np.random.default_rng(0).integers(0, 2, (flips, len(sums)))
    else:
        bits = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
    return float((abs((1 - 2 * bits) @ sums) >= abs(sums.sum()) - 1e-9).mean())
