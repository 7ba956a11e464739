"""
The last linear layer and the cross-entropy in one, without holding all logits in memory.

    loss = Σ_n [ log Σ_v exp(logits[n, v]) − logits[n, target[n]] ],  logits = hidden · weightᵀ

With 39,478 pieces and 16,384 tokens the logits take 1.3 GB in bf16, and autograd would keep them
several times over, in fp32. Instead, the tokens go through in chunks. A matrix product writes a
chunk's logits into a buffer. The kernel reads each row twice: once for its log-sum-exp, and once
to replace it, in place, by its gradient

    dlogits[n, v] = softmax(logits[n])[v] − [v = target[n]]

Two more products give dx and dw at once, so the forward pass already computes the gradients and
the backward pass only scales them. The peak memory is one chunk of logits, dx and dw: 1.1 GB in
bf16 at 8,192 × 5,120 × 39,478. Sums over chunks are fp32. Nothing waits for the GPU.

The products see a vocabulary that is a multiple of 64: where V is no multiple of 8, cuBLAS takes
1.7 to 3.1 times as long (docs/benchmarks.md). The rows that are added to the weight are zero, so
their logits are zero too, and change neither loss nor dx. For autocast an fp32 weight is copied
anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Operator, autocast_dtype, tl, triton, use_triton

CHUNK_BYTES = 1 << 30  # the largest buffer for logits


def linear_cross_entropy_reference(hidden, weight, targets, ignore_index=-100):
    # Logits of ignored positions are not needed: on a CPU this saves most of the time.
    if not torch.compiler.is_compiling():
        is_target = targets != ignore_index
        hidden, targets = hidden[is_target], targets[is_target]

    logits = hidden @ weight.T
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


@triton.jit
def _loss_and_gradient(
    logits, targets, loss, stride, V, ignore_index, GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row: writes its loss and, with GRAD, its gradient over the logits."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    offs = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    is_target = target != ignore_index

    # Whole blocks need no mask and load 16 bytes at a time, whatever V is; the tail comes first.
    tail_start = V // BLOCK * BLOCK
    tail_mask = tail_start + offs < V
    tail = tl.load(logits + tail_start + offs, mask=tail_mask, other=-float("inf")).to(tl.float32)

    # Log-sum-exp: each lane keeps its own maximum and sum, which are combined after the loop.
    top = tl.maximum(tail, -1e30)
    total = tl.exp2((tail - top) * LOG2E)
    for v in range(0, tail_start, BLOCK):
        s = tl.load(logits + v + offs).to(tl.float32)
        new = tl.maximum(top, s)
        total = total * tl.exp2((top - new) * LOG2E) + tl.exp2((s - new) * LOG2E)
        top = new
    m = tl.max(top, 0)
    lse = m + tl.log(tl.sum(total * tl.exp2((top - m) * LOG2E), 0))

    target_logit = tl.load(logits + tl.where(is_target, target, 0)).to(tl.float32)
    tl.store(loss + row, tl.where(is_target, lse - target_logit, 0.0))
    if GRAD:
        # An ignored row has no gradient: no probabilities and no target.
        lse = tl.where(is_target, lse, float("inf"))
        target = tl.where(is_target, target, -1)
        tl.debug_barrier()  # every thread has read the target's logit before it is overwritten
        p = tl.exp2((tail - lse) * LOG2E)
        p -= tl.where(tail_start + offs == target, 1.0, 0.0)
        tl.store(logits + tail_start + offs, p.to(logits.dtype.element_ty), mask=tail_mask)
        for v in range(0, tail_start, BLOCK):
            p = tl.exp2((tl.load(logits + v + offs).to(tl.float32) - lse) * LOG2E)
            p -= tl.where(v + offs == target, 1.0, 0.0)
            tl.store(logits + v + offs, p.to(logits.dtype.element_ty))


def _pad_weight(weight, dtype):
    """weight (V, C) in `dtype` with rows of zeros up to a multiple of 64; itself if it is that."""
    V, C = weight.shape
    width = triton.cdiv(V, 64) * 64
    if width == V and weight.dtype == dtype:
        return weight
    padded = torch.empty(width, C, dtype=dtype, device=weight.device)
    padded[:V].copy_(weight)
    padded[V:].zero_()
    return padded


def _launch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss (a scalar, fp32), dx and dw. The gradients and the products are in `dtype`; what is
    not wanted has no elements."""
    x, targets = hidden.to(dtype).contiguous(), targets.contiguous()
    (N, C), V = x.shape, weight.shape[0]
    w = _pad_weight(weight, dtype)
    width = len(w)

    # Chunks of equal size.
    size = max(1, min(N, CHUNK_BYTES // (width * x.element_size())))
    size = triton.cdiv(N, triton.cdiv(N, size)) if N else 1
    buffer = torch.empty(size, width, dtype=dtype, device=x.device)

    loss = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    dw = x.new_empty(0)
    if want_dw and size != N:
        dw = torch.zeros(width, C, dtype=torch.float32, device=x.device)

    block = min(4096, max(128, triton.next_power_of_2(V)))
    for start in range(0, N, size):
        rows = slice(start, start + size)
        logits = buffer[: len(x[rows])]
        torch.mm(x[rows], w.T, out=logits)
        _loss_and_gradient[(len(logits),)](
            logits,
            targets[rows],
            loss[rows],
            width,
            V,
            ignore_index,
            GRAD=want_dx or want_dw,
            BLOCK=block,
            num_warps=max(4, block // 256),
        )

        # The logits are now their gradient.
        if want_dx:
            torch.mm(logits, w, out=dx[rows])
        if want_dw and size == N:
            # One chunk: the product sums in fp32 anyway. A padded weight is no longer needed: dw
            # takes its memory.
            dw = torch.empty(V, C, dtype=dtype, device=x.device) if w is weight else w
            torch.mm(logits.T, x, out=dw)
        elif want_dw and x.is_cuda and dtype != torch.float32:
            torch.addmm(dw, logits.T, x[rows], out_dtype=torch.float32, out=dw)
        elif want_dw:
            torch.addmm(dw, logits.T.float(), x[rows].float(), out=dw)
    return loss.sum(), dx, dw[:V].to(dtype)


def _fake(hidden, weight, targets, ignore_index, dtype, want_dx, want_dw):
    dx = hidden.new_empty(hidden.shape if want_dx else 0, dtype=dtype)
    dw = weight.new_empty(weight.shape if want_dw else 0, dtype=dtype)
    return hidden.new_empty((), dtype=torch.float32), dx, dw


@triton.jit
def _scale(x, factor, y, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offs, mask=offs < n, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(y + offs, values.to(y.dtype.element_ty), mask=offs < n)


def _launch_scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor in `dtype`; factor is a scalar on the GPU. torch takes three times as long: it
    does not vectorise over such a factor, and casts in a second pass."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        grid = (triton.cdiv(x.numel(), 4096),)
        _scale[grid](x, factor, y, x.numel(), BLOCK=4096, num_warps=8)
    return y


def _fake_scale(x, factor, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    hidden, weight, *_, ctx.want_dx, ctx.want_dw = inputs
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.set_materialize_grads(False)  # no zeros of the size of dx and dw


def _backward(run, ctx, grad, *_):
    dx, dw = ctx.saved_tensors
    dx = run(dx, grad, ctx.dtypes[0]) if ctx.want_dx else None
    dw = run(dw, grad, ctx.dtypes[1]) if ctx.want_dw else None
    return dx, dw, None, None, None, None, None


_scale_op = Operator("scale", _launch_scale, _fake_scale)
_loss_op = Operator("linear_cross_entropy", _launch, _fake, _setup_context, _backward, _scale_op)


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100):
    """hidden (N, C), weight (V, C), targets (N,) int64 -> the sum of the losses, a scalar, fp32.

    A position whose target is ignore_index adds no loss and no gradient. For a mean, divide by
    the number of targets over all ranks."""
    if len(targets) != len(hidden):
        raise ValueError(f"linear_cross_entropy: {len(hidden)} rows, {len(targets)} targets")
    if not use_triton(hidden):
        return linear_cross_entropy_reference(hidden, weight, targets, ignore_index)
    dtype = autocast_dtype(hidden) or hidden.dtype
    want_dx = torch.is_grad_enabled() and hidden.requires_grad
    want_dw = torch.is_grad_enabled() and weight.requires_grad
    return _loss_op(hidden, weight, targets, ignore_index, dtype, want_dx, want_dw)[0]
