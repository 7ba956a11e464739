import torch


def rms_norm_reference(x, weight, eps=1e-5):
    # eps is outside the root.
    wide = x if x.dtype == torch.float64 else x.float()
    root = wide.square().mean(-1, keepdim=True).sqrt() + eps
    return (wide / root * weight).to(x.dtype)
