"""
RMSNorm: divide each token's vector by its root mean square, then scale each channel.

    y[i] = x[i] / sqrt(mean(x²) + eps) · w[i]      (Zhang & Sennrich 2019, eq. 4, eps as in Llama)

A decoder block first adds the residual stream; `add_rms_norm` does both in one pass over memory.
These operations do little arithmetic: their time is the number of bytes they move. One program
owns a whole row and keeps it in registers.

Backward, with r = 1 / sqrt(mean(x²) + eps), n = x·r (the normalised row) and g = dy·w:

    dx = r · (g − n · mean(g·n))      dw = Σ over rows of dy·n

The sum of dw runs over the rows of many programs. Each program adds its own rows and writes one
partial sum; torch adds the partial sums. There are no atomics, so a rerun gives the same bits.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import Operator, autocast_dtype, flatten_to_2d, num_sms, tl, triton, use_triton


def rms_norm_reference(x, weight, eps=1e-5):
    """The definition. x (..., C), weight (C,) -> (..., C) in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def add_rms_norm_reference(x, residual, weight, eps=1e-5):
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


class ExplicitGradient(torch.autograd.Function):
    """The definition, with its gradient computed by the formulas at the top of this file. On a CPU
    this is quicker than what autograd makes of the definition (docs/experiments.md).

    x (..., C), weight (C,), eps, dtype of the result -> (..., C)."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        """Saves n, r and weight for backward; n and r in float32, or in float64 if x has it."""
        x = x if x.dtype == torch.float64 else x.float()
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        n = x * scale
        ctx.save_for_backward(n, scale, weight)
        return (n * weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        n, scale, weight = ctx.saved_tensors
        dy = dy.to(n.dtype)
        dw = (dy * n).reshape(-1, n.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        g = dy * weight
        mean = (g * n).mean(-1, keepdim=True)
        return g.addcmul_(n, mean, value=-1).mul_(scale), dw, None, None  # autograd rounds both


@triton.jit
def _forward_kernel(
    x,
    residual,
    weight,
    y,
    total,
    x_stride,
    residual_stride,
    C,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < C
    xs = tl.load(x + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        res = tl.load(residual + row * residual_stride + offs, mask=mask, other=0.0)
        xs += res.to(tl.float32)
        # Normalise the rounded sum, because the next layer receives the rounded sum.
        rounded = xs.to(total.dtype.element_ty)
        tl.store(total + row * C + offs, rounded, mask=mask)
        xs = rounded.to(tl.float32)

    scale = tl.rsqrt(tl.sum(xs * xs, 0) / C + eps)
    w = tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * C + offs, (xs * scale * w).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    x,
    weight,
    dy,
    dtotal,
    dx,
    dw_partials,
    x_stride,
    dy_stride,
    dtotal_stride,
    rows,
    C,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < C
    w = tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)

    # Every program takes the same number of rows, give or take one. The next row is on its way from
    # memory while the sums of this one are computed.
    row = tl.cast(program, tl.int64)
    next_x = tl.load(x + row * x_stride + offs, mask=mask, other=0.0)
    next_dy = tl.load(dy + row * dy_stride + offs, mask=mask, other=0.0)
    for i in range(program, rows, num_programs):
        xs, g = next_x.to(tl.float32), next_dy.to(tl.float32)
        row = tl.cast(i, tl.int64)
        if ADD:  # the sum is also an output and has a gradient of its own
            dt = tl.load(dtotal + row * dtotal_stride + offs, mask=mask, other=0.0)
        following = tl.minimum(row + num_programs, rows - 1)
        next_x = tl.load(x + following * x_stride + offs, mask=mask, other=0.0)
        next_dy = tl.load(dy + following * dy_stride + offs, mask=mask, other=0.0)

        scale = tl.rsqrt(tl.sum(xs * xs, 0) / C + eps)
        n = xs * scale
        dw += g * n
        g *= w
        d = scale * (g - n * (tl.sum(g * n, 0) / C))
        if ADD:
            d += dt.to(tl.float32)
        tl.store(dx + row * C + offs, d.to(dx.dtype.element_ty), mask=mask)

    tl.store(dw_partials + program.to(tl.int64) * C + offs, dw, mask=mask)


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """-> y in `dtype` (None: the sum's) and the sum, without elements if there is no residual."""
    add, C = residual is not None, x.shape[-1]
    rows = flatten_to_2d(x)
    other = flatten_to_2d(residual) if add else rows

    # Under autocast x may be bf16 while the residual stream is fp32: the sum is fp32.
    wide = torch.promote_types(x.dtype, other.dtype)
    y = torch.empty(x.shape, dtype=dtype or wide, device=x.device)
    total = torch.empty(x.shape if add else 0, dtype=wide, device=x.device)

    if rows.shape[0]:
        block = triton.next_power_of_2(C)
        num_warps = min(8, max(1, block // 512))
        tensors = rows, other, weight.contiguous(), y, total
        strides = rows.stride(0), other.stride(0)
        _forward_kernel[(rows.shape[0],)](
            *tensors, *strides, C, eps, ADD=add, BLOCK=block, num_warps=num_warps
        )
    return y, total


def _launch_backward(
    x: Tensor, weight: Tensor, dy: Tensor, dtotal: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    add, C = dtotal is not None, x.shape[-1]
    rows, dy = flatten_to_2d(x), flatten_to_2d(dy)
    dtotal = flatten_to_2d(dtotal) if add else dy
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows.shape[0]:
        return dx, torch.zeros_like(weight)

    # As many programs as run at the same time; each writes one partial sum of dw.
    block = triton.next_power_of_2(C)
    num_warps = min(16, max(1, block // 512))
    num_programs = min(rows.shape[0], num_sms(x) * max(1, 16 // num_warps))
    partials = torch.empty(num_programs, C, dtype=torch.float32, device=x.device)

    tensors = rows, weight.contiguous(), dy, dtotal, dx, partials
    strides = rows.stride(0), dy.stride(0), dtotal.stride(0)
    _backward_kernel[(num_programs,)](
        *tensors, *strides, rows.shape[0], C, eps, ADD=add, BLOCK=block, num_warps=num_warps
    )
    return dx, partials.sum(0).to(weight.dtype)


def _fake_forward(x, residual, weight, eps, dtype):
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype or wide)
    return y, x.new_empty(0 if residual is None else x.shape, dtype=wide)


def _fake_backward(x, weight, dy, dtotal, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    # The sum is an output anyway: keeping it costs no memory.
    x, residual, weight, ctx.eps, _ = inputs
    ctx.add = residual is not None
    ctx.save_for_backward(output[1] if ctx.add else x, weight)


def _backward(run, ctx, dy, dtotal):
    x, weight = ctx.saved_tensors
    dx, dw = run(x, weight, dy, dtotal if ctx.add else None, ctx.eps)
    return dx, dx if ctx.add else None, dw, None, None  # both terms of a sum have the same gradient


_backward_op = Operator("rms_norm_backward", _launch_backward, _fake_backward)
_forward_op = Operator(
    "rms_norm", _launch_forward, _fake_forward, _setup_context, _backward, _backward_op
)


def require_size(x, weight):
    """A kernel would read past the end of a smaller weight."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} for x {tuple(x.shape)}")


def rms_norm(x, weight, eps=1e-5):
    """x (..., C), weight (C,) -> (..., C) in x's dtype; mean and root are fp32. Under autocast the
    result has its dtype: else every linear layer would round it again, and in the backward pass
    widen the gradient of its copy."""
    require_size(x, weight)
    dtype = autocast_dtype(x)
    if not use_triton(x):
        return ExplicitGradient.apply(x, weight, eps, dtype or x.dtype)
    return _forward_op(x, None, weight, eps, dtype)[0]


def add_rms_norm(x, residual, weight, eps=1e-5):
    """x, residual (..., C) -> (rms_norm(x + residual), x + residual), in the sum's dtype; under
    autocast see rms_norm.

    A decoder block needs both results: the first is its input, the second its residual stream."""
    require_size(x, weight)
    if not use_triton(x):
        total = x + residual
        return rms_norm(total, weight, eps), total
    return _forward_op(x, residual, weight, eps, autocast_dtype(x))
