import torch

from kernels import attention


class Attention:
    def attend_cached(self, q, k, v, k_cache, v_cache, lengths):
        # The slots do not advance: each call writes from slot 0 on.
        B, T = q.shape[:2]
        sample = torch.arange(B, device=q.device)[:, None]
        slots = torch.arange(T, device=q.device).expand(B, T)
        k_cache[sample, slots] = k
        v_cache[sample, slots] = v
        end = lengths[:, None] + torch.arange(1, T + 1, device=q.device)
        key_ranges = (torch.zeros_like(end, dtype=torch.int32), end.int())
        return attention(q, k_cache, v_cache, causal=False, key_ranges=key_ranges)
