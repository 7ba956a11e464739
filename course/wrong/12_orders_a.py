import numpy as np

from evaluation.metrics import ratio


def pairwise_measures(forward, reverse):
    a = np.array([{1: 1, 2: 0, 0: 0.5}[verdict] for verdict in forward])
    b = np.array([{1: 0, 2: 1, 0: 0.5}[verdict] for verdict in reverse])
    return [
        ("points of the first model (½: no difference)", ratio, [(a + b) / 2]),
        ("same verdict in both orders", ratio, [a == b]),
        # In the reverse order the other model was shown first.
        ("points of the answer shown first (½: no bias)", ratio, [(a + b) / 2]),
    ]
