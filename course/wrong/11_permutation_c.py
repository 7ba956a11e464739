import numpy as np


def permutation_p(sums, flips=10_000):
    sums = np.asarray(sums, float)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    found = int(len(sums) > 12)
    if found:
        bits = np.random.default_rng(0).integers(0, 2, (flips, len(sums)))
    else:
        bits = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
    # Sums of tenths that are equal on paper differ in their last bit.
    extreme = int((abs((1 - 2 * bits) @ sums) >= abs(sums.sum())).sum())
    return (extreme + found) / (len(bits) + found)
