import numpy as np


def permutation_p(sums, flips=10_000):
    sums = np.asarray(sums, float)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    if len(sums) > 12:
        # Random patterns: only one side is counted.
        bits = np.random.default_rng(0).integers(0, 2, (flips, len(sums)))
        extreme = int(((1 - 2 * bits) @ sums >= abs(sums.sum()) - 1e-9).sum())
        return (extreme + 1) / (flips + 1)
    bits = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
    return float((abs((1 - 2 * bits) @ sums) >= abs(sums.sum()) - 1e-9).mean())
