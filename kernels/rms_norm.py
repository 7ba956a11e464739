"""
RMSNorm: divide each token's vector by its root mean square, then scale each channel.

    y[i] = x[i] / sqrt(mean(x²) + eps) · w[i]                    (Zhang & Sennrich 2019, equation 4, with Llama's eps)

Decoder blocks always add the residual stream first, so `add_rms_norm` does both in one pass over memory: these operations
do almost no arithmetic, and their time is the bytes they move. One program owns a whole row, which stays in registers.
Backward, with r = 1 / sqrt(mean(x²) + eps), n = x·r (the normalized row) and g = dy·w:
    dx = r · (g − n · mean(g·n))          dw = Σ over rows of dy·n
dw sums over rows that many programs hold. Each program adds up its own rows and writes one partial row; torch sums
the partials. No atomics: the same inputs give the same bits.
"""
import torch

from kernels import as_rows, processors, tl, triton, use_triton


def rms_norm_reference(x, weight, eps=1e-5):
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def add_rms_norm_reference(x, residual, weight, eps=1e-5):
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


@triton.jit
def _forward(x, residual, weight, y, total, x_stride, residual_stride, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    xs = tl.load(x + row * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        xs += tl.load(residual + row * residual_stride + c, mask=inside, other=0.0).to(tl.float32)
        rounded = xs.to(total.dtype.element_ty)  # the norm must see what the next layer will see
        tl.store(total + row * C + c, rounded, mask=inside)
        xs = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(xs * xs, 0) / C + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * C + c, (xs * scale * w).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(x, weight, dy, dtotal, dx, dw_partials, x_stride, dy_stride, dtotal_stride, rows, C, eps,
              ADD: tl.constexpr, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, BLOCK)
    inside = c < C
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for i in range(program, rows, programs):
        row = tl.cast(i, tl.int64)
        xs = tl.load(x + row * x_stride + c, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(xs * xs, 0) / C + eps)
        n = xs * scale
        dw += g * n
        g *= w
        d = scale * (g - n * (tl.sum(g * n, 0) / C))
        if ADD:
            d += tl.load(dtotal + row * dtotal_stride + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * C + c, d.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw_partials + program.to(tl.int64) * C + c, dw, mask=inside)


def _launch_forward(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    add, rows, C = residual is not None, as_rows(x), x.shape[-1]
    other = as_rows(residual) if add else rows
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, other.dtype), device=x.device)  # under autocast a bf16 branch meets the fp32 stream
    total = torch.empty_like(y) if add else y.new_empty(0)
    if rows.shape[0]:
        block = triton.next_power_of_2(C)
        _forward[(rows.shape[0],)](rows, other, weight.contiguous(), y, total, rows.stride(0), other.stride(0), C, eps,
                                   ADD=add, BLOCK=block, num_warps=min(8, max(1, block // 512)))
    return y, total


def _launch_backward(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, dtotal: torch.Tensor | None,
                     eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    add, C, dy = dtotal is not None, x.shape[-1], as_rows(dy)
    rows, extra = as_rows(x), as_rows(dtotal) if add else dy
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(C)
    warps = min(16, max(1, block // 512))
    programs = max(1, min(rows.shape[0], processors(x) * max(1, 16 // warps)))
    partials = torch.empty(programs, C, dtype=torch.float32, device=x.device)
    _backward[(programs,)](rows, weight.contiguous(), dy, extra, dx, partials, rows.stride(0), dy.stride(0), extra.stride(0),
                           rows.shape[0], C, eps, ADD=add, BLOCK=block, num_warps=warps)
    return dx, partials.sum(0).to(weight.dtype)


_forward_op = torch.library.custom_op("xllava::rms_norm", _launch_forward, mutates_args=())
_backward_op = torch.library.custom_op("xllava::rms_norm_backward", _launch_backward, mutates_args=())
_forward_op.register_fake(lambda x, residual, *_: tuple(
    x.new_empty(shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)) for shape in (x.shape, x.shape if residual is not None else 0)))
_backward_op.register_fake(lambda x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)))


def _save(ctx, inputs, output):
    x, residual, weight, ctx.eps = inputs
    ctx.add = residual is not None
    ctx.save_for_backward(output[1] if ctx.add else x, weight)


def _differentiate(ctx, dy, dtotal):
    x, weight = ctx.saved_tensors
    dx, dw = _backward_op(x, weight, dy, dtotal if ctx.add else None, ctx.eps)
    return dx, dx if ctx.add else None, dw, None  # of a sum, both terms have the same gradient


_forward_op.register_autograd(_differentiate, setup_context=_save)


def rms_norm(x, weight, eps=1e-5):
    """x (..., C) with weight (C,) -> (..., C) in x's dtype; statistics in fp32."""
    return _forward_op(x, None, weight, eps)[0] if use_triton(x) else rms_norm_reference(x, weight, eps)


def add_rms_norm(x, residual, weight, eps=1e-5):
    """x, residual (..., C) -> (rms_norm(x + residual), x + residual), both in the dtype of the sum: the two things that a decoder block needs next."""
    return _forward_op(x, residual, weight, eps) if use_triton(x) else add_rms_norm_reference(x, residual, weight, eps)
