"""
Fused attention: softmax(q·kᵀ·scale)·v without ever writing the T×T scores to memory (Dao et al. 2022, 2023).

    B batch   Tq, Tk queries, keys   H heads   K key/value heads (H % K == 0)   D channels a head

**Online softmax.** A program owns BM queries and walks over the keys, BN at a time. For each query it holds the largest
score so far m, the sum l = Σ exp(s − m) and acc = Σ exp(s − m)·v. When a block brings a larger maximum, what was summed
before was too large by exp(m_new − m_old): shrink it and go on. At the end o = acc / l. All in powers of two, for the
hardware has exp2 and no exp; the factor log2(e) is folded into the scale.

**Why the log-sum-exp is kept.** L = m + log2(l), one number a query, is all that the backward needs to get any
probability back from q and k alone: P = exp2(s − L). Nothing of size T×T is ever stored; it is computed again:
    dV = Pᵀ·dO      dP = dO·Vᵀ      dS = P ∘ (dP − δ)      dQ = scale·dS·K      dK = scale·dSᵀ·Q
with δ = Σ_d o·do, one number a query. Two kernels: one owns queries (dQ, and δ on the way), one owns keys (dK, dV). Each
output has exactly one writer, so there are no atomics and a rerun gives the same bits. The second works on Sᵀ = K·Qᵀ
throughout, so that no result of a product ever has to be transposed.

**One mask for everything: intervals.** Query i sees the keys lo[i] ≤ j < hi[i], and neither falls as i grows. This
says causal, packed documents, padding, a prefix seen both ways (an image before its text) and sliding windows:

      keys →   causal          two documents     prefix of 3       window of 3
    queries    ■ · · · · ·     ■ · · · · ·       ■ ■ ■ · · ·       ■ · · · · ·
       ↓       ■ ■ · · · ·     ■ ■ · · · ·       ■ ■ ■ · · ·       ■ ■ · · · ·
               ■ ■ ■ · · ·     · · ■ · · ·       ■ ■ ■ · · ·       ■ ■ ■ · · ·
               ■ ■ ■ ■ · ·     · · ■ ■ · ·       ■ ■ ■ ■ · ·       · ■ ■ ■ · ·
               ■ ■ ■ ■ ■ ·     · · ■ ■ ■ ·       ■ ■ ■ ■ ■ ·       · · ■ ■ ■ ·

For a tile of queries, first … last, the ends of their intervals tell which key blocks have to be looked at, and which of
these need no mask. Blocks outside cost nothing, not even a load: a packed batch takes the time of its documents.

         lo[first]   lo[last]              hi[first]   hi[last]
    skipped  |  masked  |   plain (no mask)    |  masked  |  skipped
    . . . . .[//////////[######################[//////////[. . . . .

Seen from a key, the queries that see it are an interval as well; `_transpose` finds it by two binary searches.
"""
import math

import torch

from kernels import arch, dot, processors, tl, triton, use_triton


# The definition

def attention_reference(q, k, v, causal=True, key_ranges=None, scale=None):
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]
    scale = D ** -0.5 if scale is None else scale
    # heads that share keys are stacked along the queries: (B, T, H, D) -> (B, K, G·T, D), nothing is repeated
    q = (q * scale).unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    s = q @ k.permute(0, 2, 3, 1)                                                       # (B, K, G·Tq, Tk)
    rows = key_ranges
    all_see = causal and rows is None and Tk >= Tq                                      # no query is without a key
    if causal and rows is None:
        rows = rows_causal(Tq, Tk, q.device)
    if rows is not None:
        lo, hi = rows[0].unsqueeze(-1), rows[1].unsqueeze(-1)
        j = torch.arange(Tk, device=q.device)
        hidden = (j < lo) | (j >= hi)                                                   # (B or 1, Tq, Tk)
        never = torch.zeros(hidden.shape, dtype=s.dtype, device=s.device).masked_fill_(hidden, torch.finfo(s.dtype).min / 2)
        s = (s.unflatten(2, (-1, Tq)) + never[:, None, None]).flatten(2, 3)
    o = s.softmax(-1).to(v.dtype) @ v.transpose(1, 2)                                   # (B, K, G·Tq, D)
    o = o.unflatten(2, (-1, Tq)).permute(0, 3, 1, 2, 4).flatten(2, 3)                   # (B, Tq, H, D)
    return o if rows is None or all_see else o.masked_fill((lo >= hi).unsqueeze(-1), 0.0)  # who sees nothing says nothing


def attend_cache_reference(q, k_cache, v_cache, lengths):
    hi = lengths[:, None].to(torch.int32)
    return attention_reference(q[:, None], k_cache, v_cache, key_ranges=(torch.zeros_like(hi), hi))[:, 0]


# Masks as intervals: each helper gives (lo, hi), int32 (B or 1, T)

def rows_causal(Tq, Tk=None, device=None):
    """Query i sees the keys up to its own; with Tk ≠ Tq the last query stands at the last key (bottom-right aligned)."""
    Tk = Tq if Tk is None else Tk
    hi = (torch.arange(Tq, device=device, dtype=torch.int32) + (Tk - Tq + 1)).clamp(0, Tk)[None]
    return torch.zeros_like(hi), hi


def rows_from_docs(doc_ids, causal=True):
    """doc_ids (B, T): equal numbers side by side are one document, which sees itself only; negative is padding, which sees nothing."""
    T = doc_ids.shape[1]
    i = torch.arange(T, device=doc_ids.device).expand_as(doc_ids)
    new = torch.ones_like(doc_ids, dtype=torch.bool)
    new[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    lo = torch.where(new, i, 0).cummax(1).values                      # where my document began
    end = torch.where(new, i, T).flip(1).cummin(1).values.flip(1)     # the first beginning at or after each place
    hi = i + 1 if causal else torch.cat((end[:, 1:], torch.full_like(end[:, :1], T)), 1)
    lo, hi = torch.where(doc_ids < 0, i, lo), torch.where(doc_ids < 0, i, hi)
    return lo.int(), hi.int()


def rows_left_padded(padding, T, causal=True):
    """padding (B,): how many of the T places at the left are empty."""
    i = torch.arange(T, device=padding.device)[None]
    lo = padding[:, None].expand(-1, T)
    return lo.int(), torch.where(i < lo, lo, i + 1 if causal else T).int()


def rows_prefix(prefix, T):
    """prefix (B,): the first so many tokens, an image's say, see each other both ways; the rest is causal."""
    hi = torch.maximum(torch.arange(1, T + 1, device=prefix.device)[None], prefix[:, None]).int()
    return torch.zeros_like(hi), hi


def rows_window(T, window, device=None):
    """Causal, and no further back than the last `window` tokens, the query's own included."""
    hi = torch.arange(1, T + 1, device=device, dtype=torch.int32)[None]
    return (hi - window).clamp(min=0), hi


def _transpose(rows, Tk):
    """For each key j the interval of queries that see it: those with hi ≤ j come before, those with lo ≤ j are not after."""
    lo, hi = rows
    j = torch.arange(Tk, device=lo.device, dtype=torch.int32).expand(lo.shape[0], Tk).contiguous()
    first = torch.searchsorted(hi.contiguous(), j, right=True, out_int32=True)
    return first, torch.searchsorted(lo.contiguous(), j, right=True, out_int32=True)


# The kernels
SIZES = ["Tq", "Tk", "H", "G", "rows_stride"]  # a new length must not mean a new compilation
FULL, CAUSAL, ROWS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INF = tl.constexpr(float("inf"))


@triton.jit
def _load(x, strides, b, h, t, T, TMA: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Tokens t … t+BLOCK of one head, (BLOCK, BD). Past the sequence's end: zeros by pointers; through a descriptor, which
    sees all sequences as one matrix (B·T, H·D), the next sequence's tokens. Masks hide either from the result."""
    if TMA:
        return x.load([b * T + t, h * D])
    else:
        i, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BD)[None, :]
        x += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2] + tl.cast(t, tl.int64) * strides[1]
        return tl.load(x + i * strides[1] + d, mask=(t + i < T) & (d < D), other=0.0)


@triton.jit
def _store(x, tile, strides, b, h, t, T, BLOCK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    i, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BD)[None, :]
    x += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2] + tl.cast(t, tl.int64) * strides[1]
    tl.store(x + i * strides[1] + d, tile.to(x.dtype.element_ty), mask=(t + i < T) & (d < D))


@triton.jit
def _sees(i, lo, hi, T, other_T, MASK: tl.constexpr, KEYS: tl.constexpr):
    """The interval that index i, one or many, sees on the other side: keys for a query, or (KEYS) queries for a key."""
    if MASK == ROWS:
        first, end = tl.load(lo + i, mask=i < T, other=0), tl.load(hi + i, mask=i < T, other=0)
    else:
        first, end = i * 0, i * 0 + other_T
        if MASK == CAUSAL:
            if KEYS:
                first = tl.minimum(tl.maximum(i - (T - other_T), 0), other_T)
            else:
                end = tl.minimum(tl.maximum(i + (other_T - T) + 1, 0), other_T)
    return first, end


@triton.jit
def _span(t, lo, hi, T, other_T, MASK: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The drawing above for the tile t … t+BLOCK: where its three parts, masked, plain and masked, begin, and where the last ends."""
    lo_first, hi_first = _sees(t, lo, hi, T, other_T, MASK, KEYS)
    lo_last, hi_last = _sees(tl.minimum(t + BLOCK, T) - 1, lo, hi, T, other_T, MASK, KEYS)
    start = lo_first // STEP * STEP
    plain = tl.minimum(tl.cdiv(lo_last, STEP) * STEP, tl.cdiv(hi_last, STEP) * STEP)
    plain = tl.maximum(plain, start)
    tail = tl.maximum(hi_first // STEP * STEP, plain)
    return start, plain, tail, hi_last


@triton.jit
def _forward_part(acc, l, m, q, k, v, k_strides, v_strides, b, g, Tk, first, end, start, stop, scale,
                  MASKED: tl.constexpr, TMA: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    for n in range(start, stop, BN):
        s = dot(q, tl.trans(_load(k, k_strides, b, g, n, Tk, TMA, BN, D, BD)))          # (BM, BN)
        if MASKED:
            j = n + tl.arange(0, BN)[None, :]
            s = tl.where((j >= first[:, None]) & (j < end[:, None]), s, -INF)
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        pivot = m_new
        if MASKED:  # a query that has seen nothing yet: −inf − (−inf) would be NaN
            pivot = tl.where(m_new == -INF, 0.0, m_new)
        p = tl.exp2(s * scale - pivot[:, None])
        shrink = tl.exp2(m - pivot)
        l = l * shrink + tl.sum(p, 1)
        values = _load(v, v_strides, b, g, n, Tk, TMA, BN, D, BD)
        acc = dot(p.to(values.dtype), values, acc * shrink[:, None])
        m = m_new
    return acc, l, m


@triton.jit(do_not_specialize=SIZES)
def _forward(q, k, v, o, lse, lo, hi, q_strides, k_strides, v_strides, o_strides, Tq, Tk, H, G, rows_stride, scale,
             MASK: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(Tq, BM)
    pid = tl.program_id(0)
    t = (blocks - 1 - pid % blocks) * BM        # causal: the last queries have most to do, so they start first
    b, h = pid // blocks // H, pid // blocks % H
    lo, hi = lo + b * rows_stride, hi + b * rows_stride
    i = t + tl.arange(0, BM)
    first, end = _sees(i, lo, hi, Tq, Tk, MASK, False)
    span = _span(t, lo, hi, Tq, Tk, MASK, False, BM, BN)
    rows = _load(q, q_strides, b, h, t, Tq, TMA, BM, D, BD)
    acc, l, m = tl.zeros((BM, BD), tl.float32), tl.zeros((BM,), tl.float32), tl.full((BM,), -INF, tl.float32)
    for part in tl.static_range(3):
        if part > 0 or MASK == ROWS:            # causal and full see the first key: nothing to mask there
            acc, l, m = _forward_part(acc, l, m, rows, k, v, k_strides, v_strides, b, h // G, Tk, first, end,
                                      span[part], span[part + 1], scale, part != 1, TMA, BN, D, BD)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    _store(o, acc / l[:, None], o_strides, b, h, t, Tq, BM, D, BD)
    # a query that sees nothing: L = +inf makes all its probabilities exp2(s − L) = 0 in the backward
    tl.store(lse + (b * H + h).to(tl.int64) * Tq + i, tl.where(empty, INF, m + tl.log2(l)), mask=i < Tq)


@triton.jit
def _dq_part(dq, q, do, L, delta, k, v, k_strides, v_strides, b, g, Tk, first, end, start, stop, scale,
             MASKED: tl.constexpr, TMA: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    for n in range(start, stop, BN):
        keys = _load(k, k_strides, b, g, n, Tk, TMA, BN, D, BD)
        p = tl.exp2(dot(q, tl.trans(keys)) * scale - L[:, None])                        # (BM, BN)
        if MASKED:
            j = n + tl.arange(0, BN)[None, :]
            p = tl.where((j >= first[:, None]) & (j < end[:, None]), p, 0.0)
        dp = dot(do, tl.trans(_load(v, v_strides, b, g, n, Tk, TMA, BN, D, BD)))
        dq = dot((p * (dp - delta[:, None])).to(keys.dtype), keys, dq)
    return dq


@triton.jit(do_not_specialize=SIZES)
def _backward_queries(q, k, v, o, do, dq, lse, delta, lo, hi, q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides,
                      Tq, Tk, H, G, rows_stride, scale, scale_log2, MASK: tl.constexpr, TMA: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(Tq, BM)
    pid = tl.program_id(0)
    t = (blocks - 1 - pid % blocks) * BM
    b, h = pid // blocks // H, pid // blocks % H
    lo, hi = lo + b * rows_stride, hi + b * rows_stride
    i = t + tl.arange(0, BM)
    first, end = _sees(i, lo, hi, Tq, Tk, MASK, False)
    span = _span(t, lo, hi, Tq, Tk, MASK, False, BM, BN)
    rows = _load(q, q_strides, b, h, t, Tq, TMA, BM, D, BD)
    drows = _load(do, do_strides, b, h, t, Tq, TMA, BM, D, BD)
    d = tl.sum(_load(o, o_strides, b, h, t, Tq, False, BM, D, BD).to(tl.float32) * drows.to(tl.float32), 1)
    row = (b * H + h).to(tl.int64) * Tq + i
    tl.store(delta + row, d, mask=i < Tq)
    L = tl.load(lse + row, mask=i < Tq, other=INF)
    acc = tl.zeros((BM, BD), tl.float32)
    for part in tl.static_range(3):
        if part > 0 or MASK == ROWS:
            acc = _dq_part(acc, rows, drows, L, d, k, v, k_strides, v_strides, b, h // G, Tk, first, end,
                           span[part], span[part + 1], scale_log2, part != 1, TMA, BN, D, BD)
    _store(dq, acc * scale, dq_strides, b, h, t, Tq, BM, D, BD)


@triton.jit
def _dkdv_part(dk, dv, keys, values, q, do, lse, delta, q_strides, do_strides, b, h, Tq, first, end, start, stop, scale,
               MASKED: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    for t in range(start, stop, BM):
        i = t + tl.arange(0, BM)
        rows = _load(q, q_strides, b, h, t, Tq, TMA, BM, D, BD)
        L = tl.load(lse + i, mask=i < Tq, other=INF)
        p = tl.exp2(dot(keys, tl.trans(rows)) * scale - L[None, :])                     # (BN, BM), transposed from the start
        if MASKED:
            p = tl.where((i[None, :] >= first[:, None]) & (i[None, :] < end[:, None]), p, 0.0)
        drows = _load(do, do_strides, b, h, t, Tq, TMA, BM, D, BD)
        dv = dot(p.to(drows.dtype), drows, dv)
        dp = dot(values, tl.trans(drows))
        ds = p * (dp - tl.load(delta + i, mask=i < Tq, other=0.0)[None, :])
        dk = dot(ds.to(rows.dtype), rows, dk)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def _backward_keys(q, k, v, do, dk, dv, lse, delta, lo, hi, q_strides, k_strides, v_strides, do_strides, dk_strides,
                   Tq, Tk, H, G, rows_stride, scale, scale_log2, MASK: tl.constexpr, TMA: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """dk, dv of one query head; heads that share keys are added up afterwards (inside, their loop would spill registers)."""
    blocks = tl.cdiv(Tk, BN)
    pid = tl.program_id(0)
    t = pid % blocks * BN                       # causal: the first keys have most to do
    b, h = pid // blocks // H, pid // blocks % H
    lo, hi = lo + b * rows_stride, hi + b * rows_stride
    first, end = _sees(t + tl.arange(0, BN), lo, hi, Tk, Tq, MASK, True)
    span = _span(t, lo, hi, Tk, Tq, MASK, True, BN, BM)
    row = (b * H + h).to(tl.int64) * Tq
    lse, delta = lse + row, delta + row
    keys = _load(k, k_strides, b, h // G, t, Tk, TMA, BN, D, BD)
    values = _load(v, v_strides, b, h // G, t, Tk, TMA, BN, D, BD)
    dkeys, dvalues = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    for part in tl.static_range(3):
        if part > 0 or MASK != FULL:
            dkeys, dvalues = _dkdv_part(dkeys, dvalues, keys, values, q, do, lse, delta, q_strides, do_strides, b, h, Tq, first, end,
                                        span[part], span[part + 1], scale_log2, part != 1, TMA, BM, D, BD)
    _store(dk, dkeys * scale, dk_strides, b, h, t, Tk, BN, D, BD)
    _store(dv, dvalues, dk_strides, b, h, t, Tk, BN, D, BD)


@triton.jit(do_not_specialize=["S", "K", "G", "splits"])
def _cache_part(q, k, v, lengths, o, lse, q_strides, k_strides, v_strides, S, K, G, splits, scale,
                BG: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """One query a sequence: the G heads that share keys are the tile's rows, and programs share out the cache's length."""
    pid = tl.program_id(0)
    part, g, b = pid % splits, pid // splits % K, pid // splits // K
    length = tl.minimum(tl.load(lengths + b).to(tl.int32), S)
    share = tl.cdiv(tl.cdiv(length, splits), BN) * BN
    start, stop = part * share, tl.minimum(part * share + share, length)
    i, d = tl.arange(0, BG), tl.arange(0, BD)
    head = g * G + i
    inside = (i < G)[:, None] & (d < D)[None, :]
    rows = tl.load(q + tl.cast(b, tl.int64) * q_strides[0] + head[:, None] * q_strides[1] + d[None, :], mask=inside, other=0.0)
    acc, l, m = tl.zeros((BG, BD), tl.float32), tl.zeros((BG,), tl.float32), tl.full((BG,), -INF, tl.float32)
    acc, l, m = _forward_part(acc, l, m, rows, k, v, k_strides, v_strides, b, g, stop, i * 0, i * 0 + stop,
                              start, stop, scale, True, False, BN, D, BD)
    empty = l == 0.0
    row = (b * K * G + head).to(tl.int64) * splits + part
    tl.store(lse + row, tl.where(empty, -INF, m + tl.log2(tl.where(empty, 1.0, l))), mask=i < G)
    tl.store(o + row[:, None] * D + d[None, :], acc / tl.where(empty, 1.0, l)[:, None], mask=inside)


@triton.jit
def _cache_merge(parts, lse, o, splits, SPLITS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, SPLITS), tl.arange(0, BD)
    L = tl.load(lse + row * splits + i, mask=i < splits, other=-INF)
    top = tl.max(L, 0)
    w = tl.exp2(L - tl.where(top == -INF, 0.0, top))
    w /= tl.maximum(tl.sum(w, 0), 1e-30)
    acc = tl.load(parts + (row * splits + i)[:, None] * D + d[None, :], mask=(i < splits)[:, None] & (d < D)[None, :], other=0.0)
    tl.store(o + row * D + d, tl.sum(acc * w[:, None], 0).to(o.dtype.element_ty), mask=d < D)


# Launching
# (queries BM, keys BN, warps, stages) by architecture, kernel and head dim: what fits the registers, from the compile check.
# Hopper and later fetch tiles by descriptors (TMA), which frees registers; Ampere by pointers and cp.async. 0: the interpreter.
TILES = {
    90: {"forward": {64: (128, 128, 8, 3), 128: (128, 128, 8, 2)}, "queries": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2)},
         "keys": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2)}},
    80: {"forward": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3)}, "queries": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2)},
         "keys": {64: (32, 64, 4, 2), 128: (32, 64, 8, 2)}},
    0: {"forward": {64: (64, 32, 4, 1), 128: (64, 64, 4, 1)}, "queries": {64: (64, 32, 4, 1), 128: (64, 64, 4, 1)},
        "keys": {64: (32, 64, 4, 1), 128: (64, 64, 4, 1)}},
}
TMA_IN_INTERPRETER = False  # the tests turn it on to walk that path on a CPU


def _tiles(kernel, q, tma):
    kind = 0 if arch() == 0 else 90 if tma else 80
    BM, BN, warps, stages = TILES[kind][kernel][64 if q.shape[3] <= 64 else 128]
    if kind and q.dtype == torch.float32:  # twice the bytes, and no tensor cores at full fp32: for checking, not for speed
        BM, BN, warps, stages = 32, 32, 4, 1
    return BM, BN, dict(num_warps=warps, num_stages=stages)


def _tma(*tensors):
    """Can all of these be seen as one matrix (B·T, H·D) that the copy engine reads? Rows must start at 16-byte steps."""
    x = tensors[0]
    wanted = TMA_IN_INTERPRETER if arch() == 0 else arch() >= 90 and x.element_size() == 2
    return wanted and x.shape[3] in (64, 128) and all(
        y.stride(2) == y.shape[3] and (y.shape[0] == 1 or y.stride(0) == y.shape[1] * y.stride(1))
        and y.stride(1) * y.element_size() % 16 == 0 and y.stride(1) >= y.shape[3] and y.data_ptr() % 16 == 0 for y in tensors)


def _descriptor(x, block, tma):
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor
    B, T, H, D = x.shape
    return TensorDescriptor(x, [B * T, H * D], [x.stride(1), 1], [block, D])


def _mask(causal, rows, B, q):
    """-> (constexpr, lo, hi, stride between sequences); q stands in where there is no tensor to pass."""
    if rows is None:
        return (CAUSAL if causal else FULL), q, q, 0
    lo, hi = (r.to(torch.int32).expand(B, r.shape[1]).contiguous() for r in rows)
    return ROWS, lo, hi, lo.shape[1]


def _launch_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, lo: torch.Tensor | None,
                    hi: torch.Tensor | None, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]
    o = torch.empty(B, Tq, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    if B * Tq * H == 0 or Tk == 0:
        return o.zero_(), lse.fill_(float("inf"))
    mask, lo, hi, rows_stride = _mask(causal, None if lo is None else (lo, hi), B, q)
    tma = _tma(q, k, v)
    BM, BN, options = _tiles("forward", q, tma)
    _forward[(triton.cdiv(Tq, BM) * B * H,)](
        _descriptor(q, BM, tma), _descriptor(k, BN, tma), _descriptor(v, BN, tma), o, lse, lo, hi,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], o.stride()[:3], Tq, Tk, H, H // K, rows_stride, scale * math.log2(math.e),
        MASK=mask, TMA=tma, BM=BM, BN=BN, D=D, BD=max(16, triton.next_power_of_2(D)), **options)
    return o, lse


def _launch_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, do: torch.Tensor,
                     causal: bool, lo: torch.Tensor | None, hi: torch.Tensor | None,
                     scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, do = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, do))
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]
    dq = torch.empty(B, Tq, H, D, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, Tk, H, D, dtype=k.dtype, device=q.device)
    dv = torch.empty_like(dk)
    delta = torch.empty_like(lse)
    if B * Tq * H == 0 or Tk == 0:
        return dq.zero_(), torch.zeros_like(k), torch.zeros_like(v)
    rows = None if lo is None else (lo, hi)
    tma = _tma(q, k, v, do)
    shared = dict(TMA=tma, D=D, BD=max(16, triton.next_power_of_2(D)))
    scales = scale, scale * math.log2(math.e)
    mask, lo, hi, rows_stride = _mask(causal, rows, B, q)
    BM, BN, options = _tiles("queries", q, tma)
    _backward_queries[(triton.cdiv(Tq, BM) * B * H,)](
        _descriptor(q, BM, tma), _descriptor(k, BN, tma), _descriptor(v, BN, tma), o, _descriptor(do, BM, tma), dq, lse, delta, lo, hi,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], o.stride()[:3], do.stride()[:3], dq.stride()[:3],
        Tq, Tk, H, H // K, rows_stride, *scales, MASK=mask, BM=BM, BN=BN, **shared, **options)
    if rows is not None:
        mask, lo, hi, rows_stride = _mask(causal, _transpose((lo, hi), Tk), B, q)
    BM, BN, options = _tiles("keys", q, tma)
    _backward_keys[(triton.cdiv(Tk, BN) * B * H,)](
        _descriptor(q, BM, tma), _descriptor(k, BN, tma), _descriptor(v, BN, tma), _descriptor(do, BM, tma), dk, dv, lse, delta, lo, hi,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], do.stride()[:3], dk.stride()[:3],
        Tq, Tk, H, H // K, rows_stride, *scales, MASK=mask, BM=BM, BN=BN, **shared, **options)
    if H != K:
        dk, dv = (x.view(B, Tk, K, H // K, D).sum(3) for x in (dk, dv))
    return dq, dk, dv


def _launch_cache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, splits: int) -> torch.Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache))
    B, H, D = q.shape
    S, K = k.shape[1:3]
    if splits == 0:  # enough programs to fill the machine, each with a few blocks at least; reading the lengths here would wait
        splits = max(1, min(triton.cdiv(S, 256), triton.cdiv(4 * processors(q), B * K), 64))
    o = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    parts = torch.empty(B, H, splits, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, splits, dtype=torch.float32, device=q.device)
    BG, BD = (max(16, triton.next_power_of_2(n)) for n in (H // K, D))
    _cache_part[(B * K * splits,)](
        q, k, v, lengths.contiguous(), parts, lse, q.stride()[:2], k.stride()[:3], v.stride()[:3], S, K, H // K, splits,
        D ** -0.5 * math.log2(math.e), BG=BG, BN=64, D=D, BD=BD, num_warps=4, num_stages=3)
    _cache_merge[(B * H,)](parts, lse, o, splits, SPLITS=triton.next_power_of_2(splits), D=D, BD=BD, num_warps=4)
    return o


# What autograd, torch.compile and autocast know of it
_forward_op = torch.library.custom_op("xllava::attention", _launch_forward, mutates_args=())
_backward_op = torch.library.custom_op("xllava::attention_backward", _launch_backward, mutates_args=())
_cache_op = torch.library.custom_op("xllava::attention_with_kvcache", _launch_cache, mutates_args=())
_forward_op.register_fake(lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)))
_backward_op.register_fake(lambda q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
_cache_op.register_fake(lambda q, *_: q.new_empty(q.shape))


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, lo, hi, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi)


def _differentiate(ctx, do, _):
    q, k, v, o, lse, lo, hi = ctx.saved_tensors
    return *_backward_op(q, k, v, o, lse, do, ctx.causal, lo, hi, ctx.scale), None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)
for _device in ("cuda", "cpu"):
    _forward_op.register_autocast(_device, torch.bfloat16)


def _attention_triton(q, k, v, causal=True, key_ranges=None, scale=None):
    lo, hi = key_ranges if key_ranges is not None else (None, None)
    return _forward_op(q, k, v, causal, lo, hi, q.shape[3] ** -0.5 if scale is None else scale)[0]


def attention(q, k, v, causal=True, key_ranges=None, scale=None):
    """q (B, Tq, H, D), k and v (B, Tk, K, D) -> (B, Tq, H, D). Any lengths, any strides, D ≤ 128; scale defaults to D^−½.
    causal: the last query stands at the last key. rows = (lo, hi), int32 (B or 1, Tq): query i sees the keys
    lo ≤ j < hi; neither may fall along i (the `rows_…` helpers keep to that), and given rows, `causal` is not looked at."""
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:  # a kernel would read past the smaller one's end
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}: k and v must have one shape, and q their B and D")
    if q.shape[2] % k.shape[2] or q.shape[3] > 128 or (scale is not None and scale <= 0):
        raise ValueError(f"attention: {q.shape[2]} query heads must be a multiple of {k.shape[2]} key heads, head dim {q.shape[3]} "
                         f"at most 128, scale {scale} above 0")
    return (_attention_triton if use_triton(q) else attention_reference)(q, k, v, causal, key_ranges, scale)


def attention_with_kvcache(q, k_cache, v_cache, lengths):
    """One new query a sequence: q (B, H, D) against the first lengths[b] places of k_cache, v_cache (B, S, K, D) -> (B, H, D)."""
    return _cache_op(q, k_cache, v_cache, lengths, 0) if use_triton(q) else attend_cache_reference(q, k_cache, v_cache, lengths)
