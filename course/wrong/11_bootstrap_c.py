import math

import numpy as np

from evaluation.metrics import ratio, resample_counts, wilson


def bootstrap(columns, statistic=ratio):
    columns = np.asarray(columns, float)
    columns = columns[columns[:, -1] > 0]
    G, value = len(columns), float(statistic(columns.sum(0)))
    if statistic is ratio and (G == 1 or value in (0, 1)):
        return value, *wilson(value, G)
    if G < 2:
        return value, -math.inf, math.inf
    # Plain percentiles: too narrow for few images.
    sums = resample_counts(G) @ columns
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanquantile(statistic(sums), [0.025, 0.975])
    return value, float(low), float(high)
