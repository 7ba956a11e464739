import numpy as np
import torch

from data import record_spans
from model import Layout


def side_by_side(samples, firsts, lengths, T):
    # The positions run on: the second record believes that it follows the first.
    merge, positions, size = np.zeros(T, np.int64), np.zeros(T, np.int64), 0

    def rows(starts, stops, width, position):
        """(R, width): the places from each start to its stop, then 0, whose output isn't used."""
        nonlocal size
        index = starts[:, None] + np.arange(width)
        is_token = index < stops[:, None]
        merge[index[is_token]] = size + np.flatnonzero(is_token)
        positions[index[is_token]] = index[is_token]
        size += index.size
        return index * is_token

    # All samples have the same prefix. In one of a single record any P tokens will do.
    P = max(sample.starts[0] for sample in samples)
    prefixes = rows(firsts, firsts + lengths, P, 0)
    spans = [(b, *span) for b, sample in enumerate(samples) for span in record_spans(sample)]
    sample_of, starts, stops = np.array([span for span in spans if span[2] > P]).T
    starts, stops = firsts[sample_of] + starts.clip(P), firsts[sample_of] + stops

    # Rows grow by 32, 64, 128 … keys: little padding in few shapes. A CPU's softmax takes two to
    # four times as long where the number of keys is not a multiple of 32.
    more = -(-(P + stops - starts) // 32) - P // 32
    widths, groups = 32 * (P // 32 + 2 ** np.ceil(np.log2(more)).astype(int)), []
    for width in np.unique(widths).tolist():
        of_width = widths == width
        own = rows(starts[of_width], stops[of_width], width - P, P)
        keys = np.concatenate([prefixes[sample_of[of_width]], own], axis=1)
        groups.append((torch.from_numpy(own), torch.from_numpy(keys)))

    split_index = torch.from_numpy(prefixes), tuple(groups), torch.from_numpy(merge)
    return Layout(positions=torch.from_numpy(positions)[None], split_index=split_index)
