"""Placeholder definitions."""
import torch
from torch.nn import functional as F


def attention(q, k, v, causal=True, rows=None, scale=None):
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    q = (q * scale).transpose(1, 2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if K != H:
        k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    s = q @ k.transpose(-1, -2)
    if rows is not None:
        j = torch.arange(Tk, device=q.device)
        keep = (j >= rows[0][..., None]) & (j < rows[1][..., None])
        s = s.masked_fill(~keep[:, None], float("-inf"))
    elif causal:
        m = torch.full((Tq, Tk), float("-inf"), dtype=q.dtype).triu(1 + Tk - Tq)
        s = s + m
    return (s.softmax(-1) @ v).transpose(1, 2)


def attend_cache(q, k_cache, v_cache, lengths):
    S = k_cache.shape[1]
    lo = torch.zeros_like(lengths)[:, None]
    return attention(q[:, None], k_cache, v_cache, rows=(lo, lengths[:, None]))[:, 0]


def rms_norm(x, w, eps):
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def add_rms_norm(x, r, w, eps):
    y = x + r
    return rms_norm(y, w, eps), y


def rope(q, k, cos, sin, positions=None):
    T, D = q.shape[1], q.shape[-1]
    if positions is None:
        c, s = cos[:T][None, :, None], sin[:T][None, :, None]
    else:
        c, s = cos[positions][:, :, None], sin[positions][:, :, None]
    c, s = c.to(q.dtype), s.to(q.dtype)

    def turn(x):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    return turn(q), turn(k)


def swiglu(gate, up):
    return F.silu(gate) * up


def linear_cross_entropy(x, weight, target, ignore_index=-100, reduction="mean"):
    return F.cross_entropy((x @ weight.T).float(), target, ignore_index=ignore_index, reduction=reduction)
