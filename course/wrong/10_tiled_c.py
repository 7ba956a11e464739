import torch


def tiled_attention(q, k, v, key_ranges, block_m=16, block_n=16):
    scale = q.shape[1] ** -0.5
    o, L = torch.zeros_like(q), torch.zeros_like(q[:, 0])
    for i in range(0, len(q), block_m):
        rows = slice(i, i + block_m)
        start, end = (bound[rows, None] for bound in key_ranges)
        m = torch.full_like(q[rows, :1], -torch.inf)
        total, acc = torch.zeros_like(m), torch.zeros_like(q[rows])
        for j in range(0, len(k), block_n):
            s = q[rows] @ k[j : j + block_n].T * scale
            offs = torch.arange(j, j + s.shape[1])
            s = s.masked_fill((offs < start) | (offs >= end), -torch.inf)
            # A row whose keys are all hidden so far gives −inf − (−inf).
            m_new = torch.maximum(m, s.amax(1, keepdim=True))
            p, alpha = (s - m_new).exp(), (m - m_new).exp()
            total = total * alpha + p.sum(1, keepdim=True)
            acc = acc * alpha + p @ v[j : j + block_n]
            m = m_new
        o[rows], L[rows] = acc / total, (m + total.log())[:, 0]
    return o, L
