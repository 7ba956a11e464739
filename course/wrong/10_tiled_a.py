import torch


def tiled_attention(q, k, v, key_ranges, block_m=16, block_n=16):
    # A softmax of each tile by itself, and their mean.
    scale = q.shape[1] ** -0.5
    o, L = torch.zeros_like(q), torch.zeros_like(q[:, 0])
    start, end = (bound[:, None] for bound in key_ranges)
    tiles = range(0, len(k), block_n)
    for j in tiles:
        s = q @ k[j : j + block_n].T * scale
        offs = torch.arange(j, j + s.shape[1])
        s = s.masked_fill((offs < start) | (offs >= end), -torch.inf)
        o += s.softmax(1).nan_to_num() @ v[j : j + block_n] / len(tiles)
        L += s.logsumexp(1) / len(tiles)
    return o, L
