import torch


def rms_norm_reference(x, weight, eps=1e-5):
    # All in x's own dtype: bf16 is rounded after each operation.
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale * weight.to(x.dtype)
