import torch


def attention_reference(q, k, v, causal=True, key_ranges=None):
    # Query head h takes key head h % K: heads are dealt out like cards.
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]
    k, v = k.repeat(1, 1, H // K, 1), v.repeat(1, 1, H // K, 1)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5

    keys = torch.arange(Tk, device=q.device)
    if key_ranges is not None:
        start, end = key_ranges
        visible = (keys >= start[..., None]) & (keys < end[..., None])
    elif causal:
        visible = keys <= torch.arange(Tq, device=q.device)[None, :, None] + Tk - Tq
    else:
        visible = torch.ones(1, Tq, Tk, dtype=torch.bool, device=q.device)
    scores = scores.masked_fill(~visible[:, None], -1e30)
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return o.masked_fill(~visible.any(-1)[..., None, None], 0.0)
