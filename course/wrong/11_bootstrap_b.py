import math
from statistics import NormalDist

import numpy as np

from evaluation.metrics import ratio, resample_counts, t_quantile


def bootstrap(columns, statistic=ratio):
    columns = np.asarray(columns, float)
    columns = columns[columns[:, -1] > 0]
    G, value = len(columns), float(statistic(columns.sum(0)))
    # 0 of 40 stays 0 in every resample: "never".
    sums = resample_counts(G) @ columns
    tail = NormalDist().cdf(-math.sqrt(G / (G - 1)) * t_quantile(G - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanquantile(statistic(sums), [tail, 1 - tail])
    return value, float(low), float(high)
