"""
Flash attention in plain PyTorch, a tile at a time: the algorithm of attention.py for one head, to
be read and run on any computer. No model calls it; attention.py explains it.

    Tq, Tk queries, keys   D head dim   M = block_m queries and N = block_n keys make a tile

Exponentials are powers of e here, so L = m + ln(l). No tensor is larger than a tile or a result.
"""

import torch


def tiled_attention(q, k, v, key_ranges, block_m=16, block_n=16):
    """q (Tq, D), k and v (Tk, D), key_ranges two int (Tq,) -> o (Tq, D), L (Tq,), the log-sum-exp
    of each query's scores q·k/√D. Neither bound falls from one query to the next. A query without
    any visible key has o = 0 and L = +inf."""
    scale = q.shape[1] ** -0.5
    o, L = torch.zeros_like(q), torch.full_like(q[:, 0], torch.inf)
    for i in range(0, len(q), block_m):
        rows = slice(i, i + block_m)
        start, end = (bound[rows, None] for bound in key_ranges)
        m = torch.full_like(q[rows, :1], -torch.inf)  # the largest score so far
        l = torch.zeros_like(m)  # Σ exp(s − m)  # noqa: E741
        acc = torch.zeros_like(q[rows])  # Σ exp(s − m)·v

        # Tiles before the first visible key and after the last are skipped.
        for j in range(int(start.min()) // block_n * block_n, int(end.max()), block_n):
            columns = slice(j, j + block_n)
            s = q[rows] @ k[columns].T * scale  # (M, N)
            offs_n = torch.arange(j, j + s.shape[1])
            s = s.masked_fill((offs_n < start) | (offs_n >= end), -torch.inf)

            # Without a visible key so far, −inf − (−inf) would be NaN.
            m_new = torch.maximum(m, s.amax(1, keepdim=True))
            pivot = m_new.masked_fill(m_new == -torch.inf, 0.0)
            p, alpha = (s - pivot).exp(), (m - pivot).exp()

            # The new maximum rescales what was summed before.
            l = l * alpha + p.sum(1, keepdim=True)  # noqa: E741
            acc = acc * alpha + p @ v[columns]
            m = m_new

        has_keys = l > 0
        o[rows] = torch.where(has_keys, acc / l, 0.0)
        L[rows] = torch.where(has_keys, m + l.log(), torch.inf)[:, 0]
    return o, L


def tiled_attention_backward(q, k, v, o, L, do, key_ranges, block_m=16, block_n=16):
    """The gradients dq, dk, dv of tiled_attention, from its outputs o and L and o's gradient do:
    each tile of probabilities is computed again, P = exp(s − L)."""
    scale = q.shape[1] ** -0.5
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(0, len(q), block_m):
        rows = slice(i, i + block_m)
        start, end = (bound[rows, None] for bound in key_ranges)
        delta = (o[rows] * do[rows]).sum(1, keepdim=True)
        for j in range(int(start.min()) // block_n * block_n, int(end.max()), block_n):
            columns = slice(j, j + block_n)
            p = (q[rows] @ k[columns].T * scale - L[rows, None]).exp()  # (M, N)
            offs_n = torch.arange(j, j + p.shape[1])
            p = p.masked_fill((offs_n < start) | (offs_n >= end), 0.0)

            # dP = dO·Vᵀ, dS = P ∘ (dP − δ)
            ds = p * (do[rows] @ v[columns].T - delta)
            dv[columns] += p.T @ do[rows]
            dq[rows] += scale * ds @ k[columns]
            dk[columns] += scale * ds.T @ q[rows]
    return dq, dk, dv
