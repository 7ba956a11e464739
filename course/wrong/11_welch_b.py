import math

import numpy as np

from evaluation import metrics


def welch(a, b):
    var_a, var_b = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    difference = float(np.mean(a) - np.mean(b))
    # 0 / 0 for seeds that agree.
    df = (var_a + var_b) ** 2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1))
    half = metrics.t_quantile(df) * math.sqrt(var_a + var_b)
    return difference, difference - half, difference + half
