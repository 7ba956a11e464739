"""Moving batches to the device."""

import torch


def to_device(value, device):
    """A batch with all its tensors on `device`: tensors in dicts, lists and (named) tuples."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        items = (to_device(item, device) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
