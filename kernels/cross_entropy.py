"""
The last linear layer and the cross-entropy in one, without ever holding all logits.

    loss[n] = log Σ_v exp(x[n]·w[v]) − x[n]·w[target[n]]

With 39,478 pieces and 16,384 tokens the logits are 1.3 GB in bf16, and autograd would hold them several times over, in
fp32. Instead the tokens go through in chunks: a chunk's logits by one matrix product into a buffer; a kernel that reads each
row twice, once for its log-sum-exp and once to turn it, in place, into its gradient
    dlogits[n, v] = (softmax(logits[n])[v] − [v = target[n]]) · g[n]
and two matrix products to dx and dw at once. For a mean or a sum g[n] is known beforehand, so the backward only has to
scale what the forward left: the peak is one chunk's logits, dx and dw, 1.1 GB in bf16 at 8,192 × 5,120 × 39,478.
For one loss a token it is not: the backward runs the chunks again, with the g that arrives.
Sums across chunks are kept in fp32. Nothing waits for the GPU: the number of target tokens stays a tensor.
"""
import torch
import torch.nn.functional as F

from kernels import tl, triton, use_triton


def linear_cross_entropy_reference(x, weight, target, ignore_index=-100, reduction="sum", divisor=None):
    wanted, kept = target != ignore_index, target
    if not torch.compiler.is_compiling():  # logits are computed for targets only: on a CPU, most of the time saved
        x, kept = x[wanted], target[wanted]
    logits = x @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, kept, ignore_index=ignore_index, reduction="none" if reduction == "none" else "sum")
    if reduction == "none":
        return loss.new_zeros(target.shape).masked_scatter(wanted, loss) if len(loss) != len(target) else loss
    return loss if reduction == "sum" else loss / _divisor(divisor, wanted)


def _divisor(divisor, wanted):
    """What a mean divides by: the caller's count of target tokens over all ranks, or this batch's, at least 1: no targets, no NaN."""
    return wanted.sum().clamp(min=1) if divisor is None else divisor


@triton.jit
def _row(logits, target, grad, loss, stride, V, ignore_index, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    c = tl.arange(0, BLOCK)
    wanted = tl.load(target + row)
    counts = wanted != ignore_index
    main = V // BLOCK * BLOCK  # whole blocks need no mask and load 16 bytes at a time, whatever V is
    tail = tl.load(logits + main + c, mask=main + c < V, other=-float("inf")).to(tl.float32)
    top = tl.maximum(tail, -1e30)  # one running maximum and sum a lane: blocks are combined without talking
    total = tl.exp2((tail - top) * LOG2E)
    for v in range(0, main, BLOCK):
        s = tl.load(logits + v + c).to(tl.float32)
        new = tl.maximum(top, s)
        total = total * tl.exp2((top - new) * LOG2E) + tl.exp2((s - new) * LOG2E)
        top = new
    m = tl.max(top, 0)
    lse = m + tl.log(tl.sum(total * tl.exp2((top - m) * LOG2E), 0))
    at = tl.load(logits + tl.where(counts, wanted, 0)).to(tl.float32)
    tl.store(loss + row, tl.where(counts, lse - at, 0.0))
    if GRAD:
        tl.debug_barrier()  # the target's logit is read before any thread overwrites it
        g = tl.where(counts, tl.load(grad + row), 0.0)
        p = (tl.exp2((tail - lse) * LOG2E) - tl.where(main + c == wanted, 1.0, 0.0)) * g
        tl.store(logits + main + c, p.to(logits.dtype.element_ty), mask=main + c < V)
        for v in range(0, main, BLOCK):
            p = tl.exp2((tl.load(logits + v + c).to(tl.float32) - lse) * LOG2E)
            p = (p - tl.where(v + c == wanted, 1.0, 0.0)) * g
            tl.store(logits + v + c, p.to(logits.dtype.element_ty))


def _chunks(x, weight, target, grad, ignore_index, chunk_bytes, want_dx, want_dw):
    """-> loss of each row (N,) fp32, dx or None, dw or None, with grad (N,) the gradient that each row's loss receives."""
    x, (N, C), V = x.contiguous(), x.shape, weight.shape[0]
    width = triton.cdiv(V, 64) * 64  # rows begin at aligned addresses even if V is odd: 39,478 lies in 39,488
    size = max(1, min(N, chunk_bytes // (width * x.element_size())))
    size = triton.cdiv(N, triton.cdiv(N, size)) if N else 1  # chunks of one size, not a full one and a rest
    buffer = torch.empty(size, width, dtype=x.dtype, device=x.device)
    loss = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if want_dx else None
    dw = torch.zeros(V, C, dtype=torch.float32, device=x.device) if want_dw and size < N else None
    block = min(4096, max(128, triton.next_power_of_2(V)))
    for n in range(0, N, size):
        part = slice(n, min(n + size, N))
        logits = torch.mm(x[part], weight.T, out=buffer[:part.stop - n, :V])
        _row[(logits.shape[0],)](logits, target[part], grad[part], loss[part], logits.stride(0), V, ignore_index,
                                 GRAD=want_dx or want_dw, BLOCK=block, num_warps=8 if block >= 2048 else 4)
        if want_dx:
            torch.mm(logits, weight, out=dx[part])
        if want_dw and size >= N:
            dw = logits.T @ x  # one chunk: the product's own fp32 sums are all there is
        elif want_dw and x.is_cuda and x.dtype != torch.float32:
            torch.addmm(dw, logits.T, x[part], out_dtype=torch.float32, out=dw)
        elif want_dw:
            dw += logits.T.float() @ x[part].float()
    return loss, dx, dw if dw is None else dw.to(weight.dtype)


def _launch_rows(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore_index: int, chunk_bytes: int) -> torch.Tensor:
    return _chunks(x, weight, target.contiguous(), target, ignore_index, chunk_bytes, False, False)[0]


def _launch_total(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, ignore_index: int, chunk_bytes: int,
                  want_dx: bool, want_dw: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad = grad.contiguous()
    loss, dx, dw = _chunks(x, weight, target.contiguous(), grad, ignore_index, chunk_bytes, want_dx, want_dw)
    return (loss * grad).sum(), x.new_empty(0) if dx is None else dx, x.new_empty(0) if dw is None else dw


_rows_op = torch.library.custom_op("xllava::linear_cross_entropy_rows", _launch_rows, mutates_args=())
_total_op = torch.library.custom_op("xllava::linear_cross_entropy_total", _launch_total, mutates_args=())
_rows_op.register_fake(lambda x, *_: x.new_empty(x.shape[:1], dtype=torch.float32))
_total_op.register_fake(lambda x, weight, *rest: (
    x.new_empty((), dtype=torch.float32), *(y.new_empty(y.shape if wanted else 0) for y, wanted in zip((x, weight), rest[-2:]))))


def _save_rows(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.chunk_bytes = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_rows(ctx, grad):
    needs = [bool(n) for n in ctx.needs_input_grad[:2]]
    _, dx, dw = _total_op(*ctx.saved_tensors, grad, ctx.ignore_index, ctx.chunk_bytes, *needs)
    return dx if needs[0] else None, dw if needs[1] else None, None, None, None


def _save_total(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.wants = inputs[-2:]
    ctx.set_materialize_grads(False)  # of the outputs dx and dw nobody asks a gradient: no zeros of their size


def _differentiate_total(ctx, g, *_):
    dx, dw = (d * g.to(d.dtype) if want else None for d, want in zip(ctx.saved_tensors, ctx.wants))
    return dx, dw, *(None,) * 6


_rows_op.register_autograd(_differentiate_rows, setup_context=_save_rows)
_total_op.register_autograd(_differentiate_total, setup_context=_save_total)


def _linear_cross_entropy_triton(x, weight, target, ignore_index=-100, reduction="sum", divisor=None, chunk_bytes=1 << 30):
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if reduction == "none" or not learns:
        loss = _rows_op(x, weight, target, ignore_index, chunk_bytes)
        return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / _divisor(divisor, target != ignore_index)
    grad = torch.ones(target.shape, dtype=torch.float32, device=x.device)
    if reduction == "mean":
        grad = grad / _divisor(divisor, target != ignore_index)
    return _total_op(x, weight, target, grad, ignore_index, chunk_bytes, x.requires_grad, weight.requires_grad)[0]


def linear_cross_entropy(x, weight, target, ignore_index=-100, reduction="sum", divisor=None, chunk_bytes=1 << 30):
    """x (N, C), weight (V, C), target (N,) int64 -> the loss in fp32: a scalar for "mean" and "sum", (N,) for "none".
    Tokens whose target is ignore_index give no loss and no gradient. "mean" divides by `divisor` (a number or a 0-d tensor: the
    global count of target tokens) or, without one, by the count in this batch. chunk_bytes: how large the logits' buffer may be."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
    if not use_triton(x):
        return linear_cross_entropy_reference(x, weight, target, ignore_index, reduction, divisor)
    return _linear_cross_entropy_triton(x, weight, target, ignore_index, reduction, divisor, chunk_bytes)
