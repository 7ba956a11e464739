import torch

from data import record_spans
from model import Layout


def side_by_side(samples, T):
    # The positions run on: the second record believes that it follows the first.
    positions = torch.arange(T).expand(len(samples), T).clone()
    rows = []
    for b, sample in enumerate(samples):
        for start, stop in record_spans(sample):
            tokens = torch.cat([torch.arange(sample.starts[0]), torch.arange(start, stop)])
            rows.append(b * T + tokens)
    gather = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    scatter = torch.zeros(len(samples) * T, dtype=torch.long)
    for r, row in enumerate(rows):
        scatter[row] = r * gather.shape[1] + torch.arange(len(row))
    return Layout(positions=positions, split_index=(gather, scatter.view(-1, T)))
