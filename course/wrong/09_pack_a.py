import torch

from data import collate, select_loss_positions
from model import Layout


def pack(samples):
    parts = [collate([sample], pad_id=0, T=len(sample.ids) - 1) for sample in samples]
    batch = {key: torch.cat([part[key] for part in parts], dim=1) for key in ("ids", "targets")}
    lengths = torch.tensor([part["ids"].shape[1] for part in parts])
    index = torch.arange(int(lengths.sum()))[None]
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)[None]
    # Positions go on through all documents.
    batch["layout"] = Layout(
        positions=index,
        key_ranges=(first.int(), (index + 1).int()),
        loss_positions=select_loss_positions(batch["targets"]),
    )
    pixels = [part["pixels"] for part in parts if "pixels" in part]
    if pixels:
        batch["pixels"] = torch.cat(pixels)
    return batch
