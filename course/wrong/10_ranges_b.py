import torch


def _causal_ranges(Tq, Tk, device):
    end = torch.arange(Tq, device=device, dtype=torch.int32) + (Tk - Tq + 1)
    end = end.clamp(0, Tk)[None]
    return torch.zeros_like(end), end


def _query_ranges(key_ranges, Tk):
    # As if all queries after the first that attends did, too: right for a causal mask only.
    start, end = (bound.contiguous() for bound in key_ranges)
    keys = torch.arange(Tk, dtype=torch.int32).expand(start.shape[0], Tk).contiguous()
    first = torch.searchsorted(end, keys, right=True, out_int32=True)
    return first, torch.full_like(first, start.shape[1])
