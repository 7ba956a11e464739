import math
from statistics import NormalDist

import numpy as np

from evaluation.metrics import ratio, resample_counts, t_quantile


def bootstrap(columns, statistic=ratio):
    columns = np.asarray(columns, float)
    columns = columns[columns[:, -1] > 0]
    G = len(columns)
    # The mean of the images' own statistics: an image with one question counts as one with ten.
    own = statistic(columns)
    value = float(own.mean())
    means = resample_counts(G) @ own / G
    tail = NormalDist().cdf(-math.sqrt(G / (G - 1)) * t_quantile(G - 1))
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return value, float(low), float(high)
