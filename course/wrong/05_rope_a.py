import torch


def rope_reference(q, k, cos, sin, positions=None):
    # The pairs are neighbours, as in the paper, but not as in the weights.
    if positions is None:
        cos, sin = cos[: q.shape[1]], sin[: q.shape[1]]
    else:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)

    def rotate(x):
        first, second = x[..., 0::2], x[..., 1::2]
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.stack(turned, dim=-1).flatten(-2)

    return rotate(q), rotate(k)
