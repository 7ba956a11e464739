import numpy as np
import torch

from data import round_up_length, select_loss_positions, side_by_side
from model import IGNORE_INDEX, Layout


def collate(samples, pad_id, T=None):
    # The mask stays where it is while the targets move by one.
    lengths = np.array([len(sample.ids) - 1 for sample in samples])  # the last id is only a target
    is_shared = any(len(sample.starts) > 1 for sample in samples)
    T = -(-int(lengths.sum()) // 64) * 64 if is_shared else T or round_up_length(lengths.max())
    # The place of each sample's first token among all tokens.
    firsts = lengths.cumsum() - lengths if is_shared else np.arange(len(samples)) * T

    size = T if is_shared else T * len(samples)
    ids, targets = np.full(size, pad_id), np.full(size, IGNORE_INDEX)
    for sample, first, n in zip(samples, firsts, lengths):
        ids[first : first + n] = sample.ids[:-1]
        is_target = np.array(sample.loss_mask[:-1], bool)
        targets[first : first + n] = np.where(is_target, sample.ids[1:], IGNORE_INDEX)
    ids, targets = (torch.from_numpy(flat).view(-1, T) for flat in (ids, targets))

    layout = side_by_side(samples, firsts, lengths, T) if is_shared else Layout()
    layout = layout._replace(loss_positions=select_loss_positions(targets))
    batch = {"ids": ids, "targets": targets, "layout": layout}
    pixels = [image for sample in samples for image in sample.pixels]
    if pixels:
        batch["pixels"] = torch.stack(pixels)
    return batch
