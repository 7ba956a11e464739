import torch


def rope_reference(q, k, cos, sin, positions=None):
    # The positions are not used: each row counts from 0.
    cos, sin = cos[: q.shape[1]], sin[: q.shape[1]]
    cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    return rotate(q), rotate(k)
