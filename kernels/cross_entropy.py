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

Each product is done in two parts, because cuBLAS is slow where V is no multiple of 8: one for the
last V % 64 pieces, one for all others. The padding of the buffer is never read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tl, triton, use_triton

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


def _launch(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, want_dx: bool, want_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss (a scalar, fp32), dx and dw; a gradient that is not wanted has no elements."""
    hidden, targets = hidden.contiguous(), targets.contiguous()
    (N, C), V = hidden.shape, weight.shape[0]

    # Chunks of equal size. Rows of logits start at aligned addresses: 39,478 become 39,488 wide.
    width = triton.cdiv(V, 64) * 64
    size = max(1, min(N, CHUNK_BYTES // (width * hidden.element_size())))
    size = triton.cdiv(N, triton.cdiv(N, size)) if N else 1
    buffer = torch.empty(size, width, dtype=hidden.dtype, device=hidden.device)

    loss = torch.empty(N, dtype=torch.float32, device=hidden.device)
    dx = torch.empty_like(hidden) if want_dx else hidden.new_empty(0)
    dw = hidden.new_empty(0)
    if want_dw and size == N:  # one chunk: the product sums in fp32 anyway
        dw = torch.empty(V, C, dtype=hidden.dtype, device=hidden.device)
    elif want_dw:
        dw = torch.zeros(V, C, dtype=torch.float32, device=hidden.device)

    # 39,478 pieces take 1.7 to 3.1 times as long as 39,488 (docs/benchmarks.md): the last 54 are
    # done apart, so that the large products run over 39,424.
    aligned = V // 64 * 64
    parts = [part for part in (slice(aligned, V), slice(0, aligned)) if part.start < part.stop]

    block = min(4096, max(128, triton.next_power_of_2(V)))
    for start in range(0, N, size):
        rows = slice(start, start + size)
        x = hidden[rows]
        logits = buffer[: len(x), :V]
        for part in parts:
            torch.mm(x, weight[part].T, out=logits[:, part])
        _loss_and_gradient[(len(x),)](
            logits,
            targets[rows],
            loss[rows],
            logits.stride(0),
            V,
            ignore_index,
            GRAD=want_dx or want_dw,
            BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
        )

        # The logits are now their gradient.
        for part in parts:
            dlogits = logits[:, part]
            if want_dx:
                add = float(part is not parts[0])
                torch.addmm(dx[rows], dlogits, weight[part], beta=add, out=dx[rows])
            if want_dw and size == N:
                torch.mm(dlogits.T, x, out=dw[part])
            elif want_dw and x.is_cuda and x.dtype != torch.float32:
                torch.addmm(dw[part], dlogits.T, x, out_dtype=torch.float32, out=dw[part])
            elif want_dw:
                dw[part] += dlogits.T.float() @ x.float()
    return loss.sum(), dx, dw.to(weight.dtype)


_loss_op = torch.library.custom_op("xllava::linear_cross_entropy", _launch, mutates_args=())


@_loss_op.register_fake
def _fake(hidden, weight, targets, ignore_index, want_dx, want_dw):
    dx = hidden.new_empty(hidden.shape if want_dx else 0)
    dw = weight.new_empty(weight.shape if want_dw else 0)
    return hidden.new_empty((), dtype=torch.float32), dx, dw


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    *_, ctx.want_dx, ctx.want_dw = inputs
    ctx.set_materialize_grads(False)  # no zeros of the size of dx and dw


def _backward(ctx, grad, *_):
    dx, dw = ctx.saved_tensors
    dx = dx * grad.to(dx.dtype) if ctx.want_dx else None
    dw = dw * grad.to(dw.dtype) if ctx.want_dw else None
    return dx, dw, None, None, None, None


_loss_op.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100):
    """hidden (N, C), weight (V, C), targets (N,) int64 -> the sum of the losses, a scalar, fp32.

    A position whose target is ignore_index adds no loss and no gradient. For a mean, divide by
    the number of targets over all ranks."""
    if not use_triton(hidden):
        return linear_cross_entropy_reference(hidden, weight, targets, ignore_index)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    want_dx = torch.is_grad_enabled() and hidden.requires_grad
    want_dw = torch.is_grad_enabled() and weight.requires_grad
    return _loss_op(hidden, weight, targets, ignore_index, want_dx, want_dw)[0]
