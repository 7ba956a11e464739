"""
SwiGLU's gate: silu(gate) · up, with silu(x) = x · sigmoid(x) (Shazeer 2020, "GLU variants improve transformer").

Between the two projections in and the projection out stands this elementwise step on the widest tensors of the model.
Eager PyTorch moves them through memory five times; fused it is read twice and written once. The backward recomputes
silu(gate) from gate, which is cheaper than keeping it:
    dup = dy · silu(gate)          dgate = dy · up · s · (1 + gate · (1 − s)),  s = sigmoid(gate)
"""
import torch
import torch.nn.functional as F

from kernels import as_rows, tl, triton, use_triton


def swiglu_reference(gate, up):
    return F.silu(gate) * up


@triton.jit
def _forward(gate, up, y, gate_stride, up_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < N
    a = tl.load(gate + row * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + c, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate, up, dy, dgate, dup, gate_stride, up_stride, dy_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < N
    a = tl.load(gate + row * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + c, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(dgate + row * N + c, (d * b * s * (1.0 + a * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * N + c, (d * a * s).to(dup.dtype.element_ty), mask=inside)


BLOCK = 2048


def _grid(x):
    return x.shape[0], triton.cdiv(x.shape[1], BLOCK)


def _launch_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        gate, up = as_rows(gate), as_rows(up)
        _forward[_grid(gate)](gate, up, y, gate.stride(0), up.stride(0), gate.shape[1], BLOCK=BLOCK, num_warps=8)
    return y


def _launch_backward(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if dgate.numel():
        gate, up, dy = as_rows(gate), as_rows(up), as_rows(dy)
        _backward[_grid(gate)](gate, up, dy, dgate, dup, gate.stride(0), up.stride(0), dy.stride(0), gate.shape[1], BLOCK=BLOCK, num_warps=8)
    return dgate, dup


_forward_op = torch.library.custom_op("xllava::swiglu", _launch_forward, mutates_args=())
_backward_op = torch.library.custom_op("xllava::swiglu_backward", _launch_backward, mutates_args=())
_forward_op.register_fake(lambda gate, up: gate.new_empty(gate.shape))
_backward_op.register_fake(lambda gate, up, dy: (gate.new_empty(gate.shape), up.new_empty(up.shape)))
_forward_op.register_autograd(lambda ctx, dy: _backward_op(*ctx.saved_tensors, dy),
                              setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def swiglu(gate, up):
    """silu(gate) · up, elementwise: (..., N) and (..., N) -> (..., N). Halves of one fused projection may be passed as they are."""
    return (_forward_op if use_triton(gate) else swiglu_reference)(gate, up)
