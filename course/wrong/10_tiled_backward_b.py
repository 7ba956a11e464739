import torch


def tiled_attention_backward(q, k, v, o, L, do, key_ranges, block_m=16, block_n=16):
    scale = q.shape[1] ** -0.5
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    start, end = (bound[:, None] for bound in key_ranges)
    for j in range(0, len(k), block_n):
        columns = slice(j, j + block_n)
        p = (q @ k[columns].T * scale - L[:, None]).exp()
        offs = torch.arange(j, j + p.shape[1])
        p = p.masked_fill((offs < start) | (offs >= end), 0.0)
        dp = do @ v[columns].T
        # δ of this tile alone.
        ds = p * (dp - (p * dp).sum(1, keepdim=True))
        dv[columns] += p.T @ do
        dq += scale * ds @ k[columns]
        dk[columns] += scale * ds.T @ q
    return dq, dk, dv
