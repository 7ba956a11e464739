"""
Rotary position embedding: turn each pair of channels by an angle that grows with the token's position, so that the dot
product of a query and a key depends on how far apart they stand (Su et al. 2021, section 3.4).

The pairs are (i, i + D/2), the "rotate half" order of Hugging Face's Llama weights, for i < D/2:
    y[i]       = x[i]·cos − x[i + D/2]·sin
    y[i + D/2] = x[i + D/2]·cos + x[i]·sin
A rotation's gradient is the rotation back: the same kernel with −sin. Out of place, as a block that is recomputed
under activation checkpointing must find its inputs unchanged.
"""
import torch

from kernels import tl, triton, use_triton


def rope_reference(q, k, cos, sin, positions=None):
    if positions is None:
        cos, sin = cos[:q.shape[1]], sin[:q.shape[1]]        # (T, D/2)
    else:
        cos, sin = cos[positions], sin[positions]            # (B, T, D/2)
    cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)  # one angle for all heads

    def turn(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turn(q), turn(k)


@triton.jit(do_not_specialize=["T", "H"])
def _rotate(x, y, cos, sin, positions, x_sb, x_st, x_sh, T, H, p_sb, sign,
            BY_POSITION: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program turns all heads of one token: their angles are the same."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    position = t
    if BY_POSITION:
        position = tl.load(positions + b * p_sb + t).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)
    c = tl.load(cos + position * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + position * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :] * sign
    inside = (h < H) & (d < HALF)[None, :]
    source = x + b * x_sb + t * x_st + h * x_sh + d[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = y + token * H * 2 * HALF + h * 2 * HALF + d[None, :]
    tl.store(target, (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(y.dtype.element_ty), mask=inside)


def _launch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, sign: float) -> torch.Tensor:
    B, T, H, D = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    y = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
    at = positions.expand(B, T) if positions is not None else x
    if at is not x and at.stride(1) != 1:
        at = at.contiguous()
    if B * T:
        _rotate[(B * T,)](x, y, cos.contiguous(), sin.contiguous(), at, *x.stride()[:3], T, H, at.stride(0), sign,
                          BY_POSITION=positions is not None, HALF=D // 2, BLOCK_H=triton.next_power_of_2(H),
                          BLOCK_D=triton.next_power_of_2(D // 2), num_warps=4)
    return y


_rope_op = torch.library.custom_op("xllava::rope", _launch, mutates_args=())
_rope_op.register_fake(lambda x, *_: x.new_empty(x.shape))


def _save(ctx, inputs, output):
    _, cos, sin, positions, ctx.sign = inputs
    ctx.save_for_backward(cos, sin, positions)


def _differentiate(ctx, dy):
    return _rope_op(dy, *ctx.saved_tensors, -ctx.sign), None, None, None, None


_rope_op.register_autograd(_differentiate, setup_context=_save)


def _rope_triton(q, k, cos, sin, positions=None):
    return _rope_op(q, cos, sin, positions, 1.0), _rope_op(k, cos, sin, positions, 1.0)


def rope(q, k, cos, sin, positions=None):
    """q (B, T, H, D) and k (B, T, K, D), turned; cos, sin (max_T, D/2), one row of angles per position, fp32, without
    gradient. positions (B, T) int says where each token stands (packed documents, a cache); None means 0 … T−1."""
    return (_rope_triton if use_triton(q) else rope_reference)(q, k, cos, sin, positions)
