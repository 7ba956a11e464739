"""
Fused attention: softmax(scale·q·kᵀ)·v without writing the scores to memory (Dao et al. 2022, 2023).

    B batch   Tq, Tk queries, keys   H heads   K key/value heads   D head dim, scale = 1/√D
    G = H / K query heads share one key/value head

**Online softmax.** A program owns BLOCK_M queries and loops over the keys, BLOCK_N at a time. For
each query it keeps the largest score so far m, the sum l = Σ exp(s − m) and acc = Σ exp(s − m)·v.
When a block has a larger maximum, l and acc are multiplied by exp(m_old − m_new). At the end
o = acc / l. Powers of 2 replace powers of e, because the hardware computes exp2: the factor
log2(e) is part of the scale.

**The log-sum-exp.** L = m + log2(l), one number per query, is what the backward pass needs to
recompute any probability from q and k: P = exp2(s − L). Nothing of size Tq×Tk is stored.

    dV = Pᵀ·dO      dP = dO·Vᵀ      dS = P ∘ (dP − δ)      dQ = scale·dS·K      dK = scale·dSᵀ·Q

with δ = Σ_d o·do, one number per query. There are two kernels. One owns queries and computes dQ,
and δ on the way. The other owns keys and computes dK and dV. Each output has exactly one writer:
there are no atomics, and a rerun gives the same bits. The second kernel works on Sᵀ = K·Qᵀ, so
that no result of a product is transposed.

**One mask for everything: key ranges.** Query i attends to the keys start[i] ≤ j < end[i]; neither
bound decreases with i. Causal masks, packed documents, padding, a prefix with full attention (an
image before its text) and sliding windows all have this form:

      keys →   causal          two documents     prefix of 3       window of 3
    queries    ■ · · · · ·     ■ · · · · ·       ■ ■ ■ · · ·       ■ · · · · ·
       ↓       ■ ■ · · · ·     ■ ■ · · · ·       ■ ■ ■ · · ·       ■ ■ · · · ·
               ■ ■ ■ · · ·     · · ■ · · ·       ■ ■ ■ · · ·       ■ ■ ■ · · ·
               ■ ■ ■ ■ · ·     · · ■ ■ · ·       ■ ■ ■ ■ · ·       · ■ ■ ■ · ·
               ■ ■ ■ ■ ■ ·     · · ■ ■ ■ ·       ■ ■ ■ ■ ■ ·       · · ■ ■ ■ ·

The ranges of the first and the last query of a block tell which blocks of keys to load, and which
of these need no mask. Other blocks cost nothing, so a packed batch takes the time of its documents.

       start[first]  start[last]          end[first]   end[last]
    skipped  |  masked  |  plain (no mask)     |  masked  |  skipped
    . . . . .[//////////[######################[//////////[. . . . .

The queries that attend to one key form a range as well; two binary searches find it.
"""

import math

import torch
from torch import Tensor

from kernels import Operator, arch, autocast_dtype, dot, num_sms, tl, triton, use_triton

# The definition


def attention_reference(q, k, v, causal=True, key_ranges=None):
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]

    # Heads that share keys are stacked along the queries: (B, Tq, H, D) -> (B, K, G·Tq, D)
    q = (q * D**-0.5).unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    scores = q @ k.permute(0, 2, 3, 1)  # (B, K, G·Tq, Tk)

    every_query_attends = key_ranges is None and (Tk >= Tq or not causal)
    if causal and key_ranges is None:
        key_ranges = _causal_ranges(Tq, Tk, q.device)
    if key_ranges is not None:
        start, end = key_ranges[0].unsqueeze(-1), key_ranges[1].unsqueeze(-1)
        keys = torch.arange(Tk, device=q.device)
        hidden = (keys < start) | (keys >= end)  # (B or 1, Tq, Tk)
        # Not −inf: a softmax over no key at all would be NaN.
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        bias.masked_fill_(hidden, torch.finfo(q.dtype).min / 2)
        scores += bias.repeat(1, H // K, 1)[:, None]  # in place: one pass over memory, not two

    o = scores.softmax(-1).to(v.dtype) @ v.transpose(1, 2)  # (B, K, G·Tq, D)
    o = o.unflatten(2, (-1, Tq)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, Tq, H, D)
    if every_query_attends:
        return o
    # Queries without any visible key output zero.
    return o.masked_fill((start >= end).unsqueeze(-1), 0.0)


def attention_in_blocks(q, k, v, block=96):
    """Causal attention of some queries at a time, which attend to no key after their last one: a
    quarter to a half of the scores less, and those of a block stay in a CPU's cache."""
    offset = k.shape[1] - q.shape[1]
    outs = []
    for start in range(0, q.shape[1], block):
        end = min(start + block, q.shape[1])
        keys, values = k[:, : offset + end], v[:, : offset + end]
        outs.append(attention_reference(q[:, start:end], keys, values))
    return torch.cat(outs, dim=1)


def attention_with_kvcache_reference(q, k_cache, v_cache, lengths):
    end = lengths[:, None].to(torch.int32)
    key_ranges = torch.zeros_like(end), end
    return attention_reference(q[:, None], k_cache, v_cache, key_ranges=key_ranges)[:, 0]


def _causal_ranges(Tq, Tk, device):
    """(start, end), int32 (1, Tq): the last query is aligned with the last key."""
    end = torch.arange(Tq, device=device, dtype=torch.int32) + (Tk - Tq + 1)
    end = end.clamp(0, Tk)[None]
    return torch.zeros_like(end), end


def _query_ranges(key_ranges, Tk):
    """For each key j the range of queries that attend to it, int32 (B, Tk) each: queries with
    end ≤ j stand before it, queries with start ≤ j do not stand after it."""
    start, end = (bound.contiguous() for bound in key_ranges)
    keys = torch.arange(Tk, device=start.device, dtype=torch.int32)
    keys = keys.expand(start.shape[0], Tk).contiguous()
    first = torch.searchsorted(end, keys, right=True, out_int32=True)
    return first, torch.searchsorted(start, keys, right=True, out_int32=True)


# The kernels

SIZES = ["Tq", "Tk", "H", "G"]  # a new length must not cause a compilation
FULL, CAUSAL, RANGES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # values of MODE
INF = tl.constexpr(float("inf"))


@triton.jit
def _locate(T, H, BLOCK: tl.constexpr, REVERSED: tl.constexpr):
    """-> the first token, the sequence and the head of this program's block. Under a causal mask
    the last queries (REVERSED) and the first keys have the most work, so they start first."""
    num_blocks, pid = tl.cdiv(T, BLOCK), tl.program_id(0)
    block = pid % num_blocks
    if REVERSED:
        block = num_blocks - 1 - block
    return block * BLOCK, pid // num_blocks // H, pid // num_blocks % H


@triton.jit
def _head_start(x, strides, b, h, t):
    """The address of token t of one head. Offsets are 64 bits: tensors may exceed 2³¹ elements."""
    x += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2]
    return x + tl.cast(t, tl.int64) * strides[1]


@triton.jit
def _row_start(b, h, H, T):
    """Where one head's log-sum-exp and δ begin. Rows are padded to whole blocks, so that no access
    needs a mask: masks cost registers."""
    return (b * H + h).to(tl.int64) * (tl.cdiv(T, 128) * 128)


@triton.jit
def _load(
    x,
    strides,
    b,
    h,
    t,
    T,
    TMA: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tokens t … t + BLOCK of one head, (BLOCK, BLOCK_D).

    Past the end of the sequence, pointers give zeros. A descriptor treats all sequences as one
    matrix (B·T, H·D) and gives tokens of the next sequence. The masks exclude both."""
    if TMA:
        return x.load([b * T + t, h * D])
    else:
        offs_t, offs_d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
        x = _head_start(x, strides, b, h, t)
        mask = (t + offs_t < T) & (offs_d < D)
        return tl.load(x + offs_t * strides[1] + offs_d, mask=mask, other=0.0)


@triton.jit
def _store(
    x, tile, strides, b, h, t, T, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    offs_t, offs_d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    x = _head_start(x, strides, b, h, t)
    mask = (t + offs_t < T) & (offs_d < D)
    tl.store(x + offs_t * strides[1] + offs_d, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _visible_range(offs, starts, ends, T, other_T, MODE: tl.constexpr, OF_KEYS: tl.constexpr):
    """The range of keys that each query in offs attends to or, with OF_KEYS, the range of queries
    that attend to each key in offs. offs is one index or a block of them."""
    if MODE == RANGES:
        start = tl.load(starts + offs, mask=offs < T, other=0)
        end = tl.load(ends + offs, mask=offs < T, other=0)
    else:
        start, end = offs * 0, offs * 0 + other_T
        if MODE == CAUSAL:
            if OF_KEYS:
                start = tl.minimum(tl.maximum(offs - (T - other_T), 0), other_T)
            else:
                end = tl.minimum(tl.maximum(offs + (other_T - T) + 1, 0), other_T)
    return start, end


@triton.jit
def _is_visible(offs, visible):
    """Which pairs of a tile are visible: rows have the ranges `visible`, columns the indices."""
    start, end = visible
    return (offs[None, :] >= start[:, None]) & (offs[None, :] < end[:, None])


@triton.jit
def _block_bounds(
    b,
    t,
    ranges,
    T,
    other_T,
    MODE: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """-> the visible range of each row of the block t … t + BLOCK, and the bounds of the drawing
    above: the starts of the masked, plain and masked parts in whole steps, and the last end."""
    starts, ends = ranges[0] + b * T, ranges[1] + b * T
    offs = t + tl.arange(0, BLOCK)
    visible = _visible_range(offs, starts, ends, T, other_T, MODE, OF_KEYS)
    last = tl.minimum(t + BLOCK, T) - 1
    start_first, end_first = _visible_range(t, starts, ends, T, other_T, MODE, OF_KEYS)
    start_last, end_last = _visible_range(last, starts, ends, T, other_T, MODE, OF_KEYS)

    # Plain blocks lie between the last start and the first end. There may be none.
    begin = start_first // STEP * STEP
    plain = tl.minimum(tl.cdiv(start_last, STEP) * STEP, tl.cdiv(end_last, STEP) * STEP)
    plain = tl.maximum(plain, begin)
    tail = tl.maximum(end_first // STEP * STEP, plain)
    return visible, (begin, plain, tail, end_last)


@triton.jit
def _forward_inner(
    state,
    q,
    kv,
    visible,
    bounds,
    scale_log2,
    PART: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds one part of the keys to the state (acc, l, m) of a block of queries. Part 1 is plain,
    the others need a mask."""
    acc, l_i, m_i = state
    k, v, k_strides, v_strides, b, g, Tk = kv
    for n in range(bounds[PART], bounds[PART + 1], BLOCK_N):
        keys = _load(k, k_strides, b, g, n, Tk, TMA, BLOCK_N, D, BLOCK_D)
        s = dot(q, tl.trans(keys))  # (BLOCK_M, BLOCK_N)
        if PART != 1:
            offs_n = n + tl.arange(0, BLOCK_N)
            s = tl.where(_is_visible(offs_n, visible), s, -INF)

        m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
        pivot = m_new
        if PART != 1:  # a query without a visible key so far: −inf − (−inf) would be NaN
            pivot = tl.where(m_new == -INF, 0.0, m_new)
        p = tl.exp2(s * scale_log2 - pivot[:, None])

        # The new maximum rescales what was summed before.
        alpha = tl.exp2(m_i - pivot)
        l_i = l_i * alpha + tl.sum(p, 1)
        values = _load(v, v_strides, b, g, n, Tk, TMA, BLOCK_N, D, BLOCK_D)
        acc = dot(p.to(values.dtype), values, acc * alpha[:, None])
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    ranges,
    strides,
    Tq,
    Tk,
    H,
    G,
    scale_log2,
    MODE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    q_strides, k_strides, v_strides, o_strides = strides
    t, b, h = _locate(Tq, H, BLOCK_M, True)
    offs_m = t + tl.arange(0, BLOCK_M)
    visible, bounds = _block_bounds(b, t, ranges, Tq, Tk, MODE, False, BLOCK_M, BLOCK_N)

    queries = _load(q, q_strides, b, h, t, Tq, TMA, BLOCK_M, D, BLOCK_D)
    kv = k, v, k_strides, v_strides, b, h // G, Tk
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    state = acc, l_i, tl.full((BLOCK_M,), -INF, tl.float32)
    for part in tl.static_range(3):
        # Full and causal attention begin at the first key: there is no first masked part.
        if part > 0 or MODE == RANGES:
            state = _forward_inner(
                state, queries, kv, visible, bounds, scale_log2, part, TMA, BLOCK_N, D, BLOCK_D
            )

    acc, l_i, m_i = state
    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    _store(o, acc / l_i[:, None], o_strides, b, h, t, Tq, BLOCK_M, D, BLOCK_D)
    # Without a visible key, L = +inf makes all probabilities exp2(s − L) of the backward zero.
    row = _row_start(b, h, H, Tq) + offs_m
    tl.store(lse + row, tl.where(empty, INF, m_i + tl.log2(l_i)))


@triton.jit(do_not_specialize=SIZES)
def _backward_dq(
    q,
    k,
    v,
    o,
    do,
    dq,
    lse,
    delta,
    ranges,
    strides,
    Tq,
    Tk,
    H,
    G,
    scale,
    scale_log2,
    MODE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides = strides
    t, b, h = _locate(Tq, H, BLOCK_M, True)
    offs_m = t + tl.arange(0, BLOCK_M)
    visible, bounds = _block_bounds(b, t, ranges, Tq, Tk, MODE, False, BLOCK_M, BLOCK_N)

    queries = _load(q, q_strides, b, h, t, Tq, TMA, BLOCK_M, D, BLOCK_D)
    dout = _load(do, do_strides, b, h, t, Tq, TMA, BLOCK_M, D, BLOCK_D)
    out = _load(o, o_strides, b, h, t, Tq, False, BLOCK_M, D, BLOCK_D)

    # δ of each query: this kernel needs it, and the one for dk and dv reads it.
    d = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = _row_start(b, h, H, Tq) + offs_m
    tl.store(delta + row, d)
    L = tl.load(lse + row)

    g, acc = h // G, tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.static_range(3):
        if part > 0 or MODE == RANGES:
            for n in range(bounds[part], bounds[part + 1], BLOCK_N):
                # P from the scores and their log-sum-exp
                keys = _load(k, k_strides, b, g, n, Tk, TMA, BLOCK_N, D, BLOCK_D)
                p = tl.exp2(dot(queries, tl.trans(keys)) * scale_log2 - L[:, None])
                if part != 1:
                    p = tl.where(_is_visible(n + tl.arange(0, BLOCK_N), visible), p, 0.0)

                # dS = P ∘ (dP − δ), dQ += dS·K
                values = _load(v, v_strides, b, g, n, Tk, TMA, BLOCK_N, D, BLOCK_D)
                dp = dot(dout, tl.trans(values))
                acc = dot((p * (dp - d[:, None])).to(keys.dtype), keys, acc)
    _store(dq, acc * scale, dq_strides, b, h, t, Tq, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _backward_dkdv(
    q,
    k,
    v,
    do,
    dk,
    dv,
    lse,
    delta,
    ranges,
    strides,
    Tq,
    Tk,
    H,
    G,
    scale,
    scale_log2,
    MODE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv for each query head. The launcher adds the heads that share keys: a loop over
    them in here would spill registers."""
    q_strides, k_strides, v_strides, do_strides, dk_strides = strides
    t, b, h = _locate(Tk, H, BLOCK_N, False)
    visible, bounds = _block_bounds(b, t, ranges, Tk, Tq, MODE, True, BLOCK_N, BLOCK_M)

    row = _row_start(b, h, H, Tq)
    lse, delta = lse + row, delta + row
    keys = _load(k, k_strides, b, h // G, t, Tk, TMA, BLOCK_N, D, BLOCK_D)
    values = _load(v, v_strides, b, h // G, t, Tk, TMA, BLOCK_N, D, BLOCK_D)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for part in tl.static_range(3):
        # Full attention begins at the first query: there is no first masked part.
        if part > 0 or MODE != FULL:
            for m in range(bounds[part], bounds[part + 1], BLOCK_M):
                # Pᵀ, transposed from the start
                offs_m = m + tl.arange(0, BLOCK_M)
                queries = _load(q, q_strides, b, h, m, Tq, TMA, BLOCK_M, D, BLOCK_D)
                L = tl.load(lse + offs_m)
                p = tl.exp2(dot(keys, tl.trans(queries)) * scale_log2 - L[None, :])
                if part != 1:
                    p = tl.where(_is_visible(offs_m, visible), p, 0.0)

                # dV += Pᵀ·dO, dK += dSᵀ·Q
                dout = _load(do, do_strides, b, h, m, Tq, TMA, BLOCK_M, D, BLOCK_D)
                grad_v = dot(p.to(dout.dtype), dout, grad_v)
                dp = dot(values, tl.trans(dout))
                ds = p * (dp - tl.load(delta + offs_m)[None, :])
                grad_k = dot(ds.to(queries.dtype), queries, grad_k)
    _store(dk, grad_k * scale, dk_strides, b, h, t, Tk, BLOCK_N, D, BLOCK_D)
    _store(dv, grad_v, dk_strides, b, h, t, Tk, BLOCK_N, D, BLOCK_D)


@triton.jit(do_not_specialize=["S", "K", "G", "num_splits"])
def _decode_split(
    q,
    k,
    v,
    lengths,
    split_o,
    split_lse,
    q_strides,
    k_strides,
    v_strides,
    S,
    K,
    G,
    num_splits,
    scale_log2,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query per sequence, over one split of its cache (flash-decoding, Dao et al. 2023). The
    rows of the tile are the G heads that share keys."""
    pid = tl.program_id(0)
    split, g, b = pid % num_splits, pid // num_splits % K, pid // num_splits // K
    length = tl.minimum(tl.load(lengths + b).to(tl.int32), S)
    # Splits are whole blocks; the last ones may be empty.
    split_size = tl.cdiv(tl.cdiv(length, num_splits), BLOCK_N) * BLOCK_N
    begin, stop = split * split_size, tl.minimum(split * split_size + split_size, length)

    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head = g * G + offs_g
    mask = (offs_g < G)[:, None] & (offs_d < D)[None, :]
    q += tl.cast(b, tl.int64) * q_strides[0]
    queries = tl.load(q + head[:, None] * q_strides[1] + offs_d[None, :], mask=mask, other=0.0)

    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_G,), tl.float32)
    state = acc, l_i, tl.full((BLOCK_G,), -INF, tl.float32)
    kv = k, v, k_strides, v_strides, b, g, stop
    visible = offs_g * 0, offs_g * 0 + stop
    acc, l_i, m_i = _forward_inner(
        state, queries, kv, visible, (begin, stop), scale_log2, 0, False, BLOCK_N, D, BLOCK_D
    )

    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    row = (b * K * G + head).to(tl.int64) * num_splits + split
    tl.store(split_lse + row, tl.where(empty, -INF, m_i + tl.log2(l_i)), mask=offs_g < G)
    tl.store(split_o + row[:, None] * D + offs_d[None, :], acc / l_i[:, None], mask=mask)


@triton.jit
def _decode_combine(
    parts, lse, o, num_splits, SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Adds the splits of one head, each weighted by exp2 of its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    L = tl.load(lse + row * num_splits + offs_s, mask=offs_s < num_splits, other=-INF)
    top = tl.max(L, 0)
    weight = tl.exp2(L - tl.where(top == -INF, 0.0, top))
    weight /= tl.maximum(tl.sum(weight, 0), 1e-30)

    mask = (offs_s < num_splits)[:, None] & (offs_d < D)[None, :]
    offs = (row * num_splits + offs_s)[:, None] * D + offs_d[None, :]
    out = tl.load(parts + offs, mask=mask, other=0.0)
    out = tl.sum(out * weight[:, None], 0)
    tl.store(o + row * D + offs_d, out.to(o.dtype.element_ty), mask=offs_d < D)


# Launching

# BLOCK_M, BLOCK_N, warps and stages of each kernel and head dim: the first set for causal masks and
# key ranges, the second for full attention. 90 holds the fastest that an H200 ran
# (docs/benchmarks.md) and loads tiles by descriptors (TMA), which saves registers. 80 holds what
# fits the smaller shared memory of other GPUs, loaded by pointers and cp.async. Those of 90 spill
# no registers, those of 80 a few words (docs/kernels-compiled.md). 0 is the interpreter.
# BLOCK_M of "dkdv" divides the others: they have written what it reads of log-sum-exp and δ.
TILES = {
    90: {
        ("forward", 64): ((64, 128, 4, 2), (64, 128, 4, 2)),
        ("forward", 128): ((128, 128, 8, 3), (128, 128, 8, 3)),
        ("dq", 64): ((64, 64, 4, 3), (128, 64, 8, 3)),
        ("dq", 128): ((128, 64, 8, 3), (128, 64, 8, 3)),
        ("dkdv", 64): ((32, 128, 8, 2), (32, 128, 4, 2)),
        ("dkdv", 128): ((64, 64, 4, 2), (64, 64, 4, 2)),
    },
    80: {
        ("forward", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
        ("forward", 128): ((128, 64, 8, 3), (128, 64, 8, 3)),
        ("dq", 64): ((64, 64, 8, 2), (64, 64, 8, 2)),
        ("dq", 128): ((64, 64, 8, 2), (64, 64, 8, 2)),
        ("dkdv", 64): ((32, 64, 4, 2), (32, 64, 4, 2)),
        ("dkdv", 128): ((32, 64, 8, 2), (32, 64, 8, 2)),
    },
    0: {
        ("forward", 64): ((64, 32, 4, 1), (64, 32, 4, 1)),
        ("forward", 128): ((64, 64, 4, 1), (64, 64, 4, 1)),
        ("dq", 64): ((64, 32, 4, 1), (64, 32, 4, 1)),
        ("dq", 128): ((64, 64, 4, 1), (64, 64, 4, 1)),
        ("dkdv", 64): ((32, 64, 4, 1), (32, 64, 4, 1)),
        ("dkdv", 128): ((64, 64, 4, 1), (64, 64, 4, 1)),
    },
}
TMA_IN_INTERPRETER = False  # the tests set it to check that path on a CPU


def _tiles(kernel, q, mode, tma):
    """-> BLOCK_M, BLOCK_N and the kernel's options, which contain them."""
    D, generation = q.shape[3], 0 if arch() == 0 else 80
    if tma and generation:
        generation = 90
    causal, full = TILES[generation][kernel, 64 if D <= 64 else 128]
    block_m, block_n, num_warps, num_stages = full if mode == FULL else causal
    # fp32 takes twice the bytes and no tensor cores: for checks, not for speed.
    if generation and q.dtype == torch.float32:
        block_m, block_n, num_warps, num_stages = 32, 32, 4, 1
    options = {"MODE": mode, "TMA": tma, "BLOCK_M": block_m, "BLOCK_N": block_n}
    options |= {"D": D, "BLOCK_D": _block_d(D), "num_warps": num_warps, "num_stages": num_stages}
    return block_m, block_n, options


def _can_use_tma(*tensors):
    """Whether each tensor is a matrix (B·T, H·D) with rows at 16-byte steps, as TMA requires."""
    x = tensors[0]
    # sm_120 has descriptors too, but too little shared memory for the tiles of sm_90 and sm_100.
    available = 90 <= arch() < 120 and x.element_size() == 2
    if arch() == 0:
        available = TMA_IN_INTERPRETER
    return available and x.shape[3] in (64, 128) and all(_is_tma_matrix(x) for x in tensors)


def _is_tma_matrix(x):
    B, T, H, D = x.shape
    heads_are_adjacent = x.stride(2) == D and x.stride(1) >= D
    sequences_are_adjacent = B == 1 or x.stride(0) == T * x.stride(1)
    is_aligned = x.stride(1) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return heads_are_adjacent and sequences_are_adjacent and is_aligned


def _descriptor(x, block, tma):
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    B, T, H, D = x.shape
    return TensorDescriptor(x, [B * T, H * D], [x.stride(1), 1], [block, D])


def _token_strides(*tensors):
    """The strides of sequences, tokens and heads; channels are contiguous."""
    return tuple(x.stride()[:3] for x in tensors)


def _with_contiguous_channels(*tensors):
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _padded(T):
    """The length of a row of log-sum-exps: whole blocks, see _row_start."""
    return (T + 127) // 128 * 128


def _block_d(D):
    return max(16, triton.next_power_of_2(D))


def _mask_arguments(causal, starts, ends, q):
    """-> MODE and (starts, ends) of shape (B, Tq); q takes the place of tensors that are None."""
    if starts is None:
        return CAUSAL if causal else FULL, (q, q)
    starts, ends = (x.to(torch.int32).expand(len(q), -1).contiguous() for x in (starts, ends))
    return RANGES, (starts, ends)


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, starts: Tensor | None, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> o (B, Tq, H, D) and the base-2 log-sum-exp of each query's scores, fp32 (B, H, Tq and
    padding)."""
    q, k, v = _with_contiguous_channels(q, k, v)
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]
    o = torch.empty(B, Tq, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, _padded(Tq), dtype=torch.float32, device=q.device)
    if B * Tq * H == 0 or Tk == 0:
        return o.zero_(), lse.fill_(float("inf"))

    mode, ranges = _mask_arguments(causal, starts, ends, q)
    tma = _can_use_tma(q, k, v)
    block_m, block_n, options = _tiles("forward", q, mode, tma)
    sizes = Tq, Tk, H, H // K
    _forward_kernel[(triton.cdiv(Tq, block_m) * B * H,)](
        _descriptor(q, block_m, tma),
        _descriptor(k, block_n, tma),
        _descriptor(v, block_n, tma),
        o,
        lse,
        ranges,
        _token_strides(q, k, v, o),
        *sizes,
        D**-0.5 * math.log2(math.e),
        **options,
    )
    return o, lse


def _launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    causal: bool,
    starts: Tensor | None,
    ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, do = _with_contiguous_channels(q, k, v, do)
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]
    dq = torch.empty(B, Tq, H, D, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, Tk, H, D, dtype=k.dtype, device=q.device)
    dv = torch.empty_like(dk)
    delta = torch.empty_like(lse)
    if B * Tq * H == 0 or Tk == 0:
        return dq.zero_(), torch.zeros_like(k), torch.zeros_like(v)

    tma = _can_use_tma(q, k, v, do)
    sizes = Tq, Tk, H, H // K
    scales = D**-0.5, D**-0.5 * math.log2(math.e)

    def tiles(block_m, block_n):
        blocks = (q, block_m), (k, block_n), (v, block_n), (do, block_m)
        return [_descriptor(x, block, tma) for x, block in blocks]

    # dq first, because that kernel also writes delta.
    mode, ranges = _mask_arguments(causal, starts, ends, q)
    block_m, block_n, options = _tiles("dq", q, mode, tma)
    *qkv, dout = tiles(block_m, block_n)
    tensors = *qkv, o, dout, dq, lse, delta, ranges
    strides = _token_strides(q, k, v, o, do, dq)
    _backward_dq[(triton.cdiv(Tq, block_m) * B * H,)](*tensors, strides, *sizes, *scales, **options)

    # dk and dv: the same mask, from the keys' side.
    if starts is not None:
        ranges = _query_ranges(ranges, Tk)
    block_m, block_n, options = _tiles("dkdv", q, mode, tma)
    *qkv, dout = tiles(block_m, block_n)
    tensors = *qkv, dout, dk, dv, lse, delta, ranges
    strides = _token_strides(q, k, v, do, dk)
    _backward_dkdv[(triton.cdiv(Tk, block_n) * B * H,)](
        *tensors, strides, *sizes, *scales, **options
    )
    # Add the query heads that share a key head.
    if H != K:
        dk, dv = (x.view(B, Tk, K, H // K, D).sum(3) for x in (dk, dv))
    return dq, dk, dv


def _launch_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, num_splits: int
) -> Tensor:
    q, k, v = _with_contiguous_channels(q, k_cache, v_cache)
    B, H, D = q.shape
    S, K = k.shape[1:3]
    # By default, enough programs to fill the GPU, each with several blocks. The choice depends on
    # the cache's size, because reading the lengths would wait for the GPU.
    if num_splits == 0:
        num_splits = max(1, min(triton.cdiv(S, 256), triton.cdiv(4 * num_sms(q), B * K), 64))

    o = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    split_o = torch.empty(B, H, num_splits, D, dtype=torch.float32, device=q.device)
    split_lse = torch.empty(B, H, num_splits, dtype=torch.float32, device=q.device)
    shared = {"D": D, "BLOCK_D": _block_d(D), "num_warps": 4}
    tensors = q, k, v, lengths.contiguous(), split_o, split_lse
    strides = q.stride()[:2], *_token_strides(k, v)
    sizes = S, K, H // K, num_splits
    _decode_split[(B * K * num_splits,)](
        *tensors,
        *strides,
        *sizes,
        D**-0.5 * math.log2(math.e),
        BLOCK_G=max(16, triton.next_power_of_2(H // K)),
        BLOCK_N=128 // q.element_size(),  # as many bytes in fp32
        num_stages=3,
        **shared,
    )
    splits = triton.next_power_of_2(num_splits)
    _decode_combine[(B * H,)](split_o, split_lse, o, num_splits, SPLITS=splits, **shared)
    return o


# The operators


def _fake_forward(q, k, v, causal, starts, ends):
    B, Tq, H, D = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, _padded(Tq), dtype=torch.float32)


def _fake_backward(q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_decode(q, *others):
    return q.new_empty(q.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.causal, starts, ends = inputs
    ctx.save_for_backward(q, k, v, *output, starts, ends)
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp


def _backward(run, ctx, do, dlse):
    q, k, v, o, lse, starts, ends = ctx.saved_tensors
    return *run(q, k, v, o, lse, do, ctx.causal, starts, ends), None, None, None


_backward_op = Operator("attention_backward", _launch_backward, _fake_backward)
_forward_op = Operator(
    "attention", _launch_forward, _fake_forward, _setup_context, _backward, _backward_op
)
_decode_op = Operator("attention_with_kvcache", _launch_decode, _fake_decode)


def attention(q, k, v, causal=True, key_ranges=None):
    """q (B, Tq, H, D), k and v (B, Tk, K, D) -> (B, Tq, H, D), zeros for a query that sees no key.
    Any lengths, any strides, D ≤ 128, H a multiple of K, else ValueError: query head h has key
    head h // (H / K). Scores are scaled by 1/√D.

    causal: query i attends to the keys up to its own; the last query is aligned with the last key.
    key_ranges: (start, end), int32 (B or 1, Tq) each; query i attends to start[i] ≤ j < end[i].
    Neither may decrease with i, or leave 0 … Tk. With key_ranges, `causal` has no effect."""
    # A kernel would read past the end of the smaller tensor.
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "k and v must have one shape, and the B and D of q"
        )
    if q.shape[2] % k.shape[2] or q.shape[3] > 128:
        raise ValueError(
            f"attention: the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} "
            f"key heads, and head dim {q.shape[3]} at most 128"
        )
    for bound in key_ranges or ():
        if bound.shape[0] not in (1, q.shape[0]) or bound.shape[1] != q.shape[1]:
            raise ValueError(f"attention: key_ranges {tuple(bound.shape)}, q {tuple(q.shape)}")
    if not use_triton(q):
        if causal and key_ranges is None and 96 < q.shape[1] <= k.shape[1]:
            return attention_in_blocks(q, k, v)
        return attention_reference(q, k, v, causal, key_ranges)
    if dtype := autocast_dtype(q):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    starts, ends = key_ranges if key_ranges is not None else (None, None)
    return _forward_op(q, k, v, causal, starts, ends)[0]


def attention_with_kvcache(q, k_cache, v_cache, lengths):
    """One new query per sequence: q (B, H, D) attends to the first lengths[b] entries of k_cache
    and v_cache (B, S, K, D); lengths (B,) int -> (B, H, D). No gradient."""
    if not use_triton(q):
        return attention_with_kvcache_reference(q, k_cache, v_cache, lengths)
    return _decode_op(q, k_cache, v_cache, lengths, 0)
