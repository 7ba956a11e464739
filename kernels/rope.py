"""
Rotary position embedding (Su et al. 2021, section 3.4): rotate each pair of channels by an angle
that grows with the token's position. The dot product of a query and a key then depends on the
distance between them.

The pairs are (i, i + D/2) for i < D/2, the "rotate half" order of Hugging Face's Llama weights:

    y[i]       = x[i]·cos − x[i + D/2]·sin
    y[i + D/2] = x[i + D/2]·cos + x[i]·sin

The gradient of a rotation is the rotation back: the same kernel with −sin. It does not work in
place: an operator for torch.compile may not change its inputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Operator, tl, triton, use_triton


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's change for longer texts (transformers: rope_type "llama3"). The names are those
    of transformers' rope_parameters."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def rope_table(length, head_dim, theta, scaling=None):
    """cos and sin of the angles t · theta^(−2i/D), each float32 (length, D/2).

    t: position, i: pair of channels. scaling: a RopeScaling, or None. It divides the frequency of
    long waves by `factor`: of those that turn less than low_freq_factor times in the original
    length. Waves with more than high_freq_factor turns stay, and between the two it is blended
    (https://github.com/meta-llama/llama-models, apply_scaling)."""
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is not None:
        turns = inv_freq * scaling.original_max_position_embeddings / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = inv_freq * (kept + (1 - kept) / scaling.factor)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * inv_freq
    return angles.cos().float(), angles.sin().float()


def rope_reference(q, k, cos, sin, positions=None):
    positions = slice(q.shape[1]) if positions is None else positions
    cos, sin = cos[positions], sin[positions]  # (T, D/2) or (B, T, D/2)
    # All heads of a token share its angles: (…, T, D/2) -> (…, T, 1, D)
    cos = torch.cat((cos, cos), dim=-1).unsqueeze(-2).to(q.dtype)
    sin = torch.cat((-sin, sin), dim=-1).unsqueeze(-2).to(q.dtype)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        # A copy of the angles for each head: a CPU is slow where it broadcasts short rows.
        cos_x, sin_x = (table.expand(x.shape).contiguous() for table in (cos, sin))
        return x * cos_x + torch.cat((b, a), dim=-1) * sin_x

    return rotate(q), rotate(k)


@triton.jit(do_not_specialize=["T", "H"])
def _rotate(
    x,
    y,
    cos,
    sin,
    positions,
    x_strides,
    positions_stride,
    T,
    H,
    sign,
    HAS_POSITIONS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program rotates all heads of one token, because they share its angles."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    position = t
    if HAS_POSITIONS:
        position = tl.load(positions + b * positions_stride + t).to(tl.int64)

    # The angles of this position, (1, BLOCK_D)
    offs_h, offs_d = tl.arange(0, BLOCK_H)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)
    angle = position * HALF + offs_d
    c = tl.load(cos + angle, mask=offs_d < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=offs_d < HALF, other=0.0).to(tl.float32)[None, :] * sign

    # Both halves of each head, (BLOCK_H, BLOCK_D)
    mask = (offs_h < H) & (offs_d < HALF)[None, :]
    source = x + b * x_strides[0] + t * x_strides[1] + offs_h * x_strides[2] + offs_d[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)

    target = y + token * H * 2 * HALF + offs_h * 2 * HALF + offs_d[None, :]
    tl.store(target, (first * c - second * s).to(y.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (second * c + first * s).to(y.dtype.element_ty), mask=mask)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, sign: float) -> Tensor:
    B, T, H, D = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    y = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)

    # Without positions the kernel gets some tensor that it never reads.
    offsets = x
    if positions is not None:
        offsets = positions.expand(B, T)
        offsets = offsets if offsets.stride(1) == 1 else offsets.contiguous()

    if B * T:
        tensors = x, y, cos.contiguous(), sin.contiguous(), offsets
        strides = x.stride()[:3], offsets.stride(0)
        _rotate[(B * T,)](
            *tensors,
            *strides,
            T,
            H,
            sign,
            HAS_POSITIONS=positions is not None,
            HALF=D // 2,
            BLOCK_H=triton.next_power_of_2(H),
            BLOCK_D=triton.next_power_of_2(D // 2),
            num_warps=4,
        )
    return y


def _fake(x, cos, sin, positions, sign):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, cos, sin, positions, ctx.sign = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(run, ctx, dy):
    return run(dy, *ctx.saved_tensors, -ctx.sign), None, None, None, None


_rope_op = Operator("rope", _launch, _fake, _setup_context, _backward)


def rope(q, k, cos, sin, positions=None):
    """Rotates queries and keys: q (B, T, H, D), k (B, T, K, D) -> the same shapes and dtypes.

    cos, sin (max_T, D/2), fp32: the angles of each position; they get no gradient. positions
    (B or 1, T), int: the position of each token (packed documents, a cache); None means 0 … T−1."""
    if not use_triton(q):
        return rope_reference(q, k, cos, sin, positions)
    return _rope_op(q, cos, sin, positions, 1.0), _rope_op(k, cos, sin, positions, 1.0)
