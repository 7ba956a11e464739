import torch


def attention_reference(q, k, v, causal=True, key_ranges=None):
    # A square triangle: query i sees keys 0 … i, also where there are more keys than queries.
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]
    k, v = k.repeat_interleave(H // K, 2), v.repeat_interleave(H // K, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5

    keys = torch.arange(Tk, device=q.device)
    if key_ranges is not None:
        start, end = key_ranges
        visible = (keys >= start[..., None]) & (keys < end[..., None])
    elif causal:
        visible = torch.ones(1, Tq, Tk, dtype=torch.bool, device=q.device).tril()
    else:
        visible = torch.ones(1, Tq, Tk, dtype=torch.bool, device=q.device)
    scores = scores.masked_fill(~visible[:, None], -1e30)
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return o.masked_fill(~visible.any(-1)[..., None, None], 0.0)
