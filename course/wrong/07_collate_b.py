import torch

from data import round_up_length, select_loss_positions, side_by_side
from model import IGNORE_INDEX, Layout


def collate(samples, pad_id, T=None):
    # The padding is a target: short samples learn to say <pad>.
    T = T or round_up_length(max(len(sample.ids) for sample in samples) - 1)
    ids = torch.full((len(samples), T), pad_id)
    targets = torch.full((len(samples), T), pad_id)
    for row, sample in enumerate(samples):
        n = len(sample.ids) - 1
        sample_ids, mask = torch.tensor(sample.ids), torch.tensor(sample.loss_mask)
        ids[row, :n] = sample_ids[:-1]
        targets[row, :n] = sample_ids[1:].masked_fill(mask[1:] == 0, IGNORE_INDEX)
    layout = Layout()
    if any(len(sample.starts) > 1 for sample in samples):
        layout = side_by_side(samples, T)
    layout = layout._replace(loss_positions=select_loss_positions(targets))
    batch = {"ids": ids, "targets": targets, "layout": layout}
    pixels = [image for sample in samples for image in sample.pixels]
    if pixels:
        batch["pixels"] = torch.stack(pixels)
    return batch
