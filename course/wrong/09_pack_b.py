import torch

from data import collate, select_loss_positions
from model import Layout


def pack(samples):
    parts = [collate([sample], pad_id=0, T=len(sample.ids) - 1) for sample in samples]
    batch = {key: torch.cat([part[key] for part in parts], dim=1) for key in ("ids", "targets")}
    # Positions restart, but the causal mask is that of one long document.
    positions = torch.cat([torch.arange(part["ids"].shape[1]) for part in parts])[None]
    batch["layout"] = Layout(
        positions=positions, loss_positions=select_loss_positions(batch["targets"])
    )
    end = torch.arange(1, positions.shape[1] + 1, dtype=torch.int32)[None]
    batch["layout"] = batch["layout"]._replace(key_ranges=(torch.zeros_like(end), end))
    pixels = [part["pixels"] for part in parts if "pixels" in part]
    if pixels:
        batch["pixels"] = torch.cat(pixels)
    return batch
