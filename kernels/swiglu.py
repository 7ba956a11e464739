"""
The gate of SwiGLU: silu(gate) · up, with silu(x) = x · sigmoid(x) (Shazeer 2020, "GLU variants
improve transformer").

This elementwise step runs on the widest tensors of the model. Eager PyTorch moves them through
memory five times; the kernel reads two and writes one. The backward recomputes silu(gate), which
costs less than storing it:

    dup = dy · silu(gate)      dgate = dy · up · s · (1 + gate · (1 − s)),  s = sigmoid(gate)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Operator, flatten_to_2d, tl, triton, use_triton


def swiglu_reference(gate, up):
    return F.silu(gate) * up


@triton.jit
def _forward_kernel(gate, up, y, gate_stride, up_stride, N, BLOCK: tl.constexpr):
    # In 64 bits: row · stride passes 2³¹ in a large batch.
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    # float32 inside: a sigmoid in bf16 would lose digits that the product needs.
    a = tl.load(gate + row * gate_stride + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * N + offs, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gate, up, dy, dgate, dup, gate_stride, up_stride, dy_stride, N, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    a = tl.load(gate + row * gate_stride + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + offs, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_stride + offs, mask=mask, other=0.0).to(tl.float32)

    # silu'(a) = s · (1 + a · (1 − s)). Computed again, as keeping s would cost a tensor.
    s = tl.sigmoid(a)
    da = d * b * s * (1.0 + a * (1.0 - s))
    tl.store(dgate + row * N + offs, da.to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + row * N + offs, (d * a * s).to(dup.dtype.element_ty), mask=mask)


BLOCK = 2048


def _launch_forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    # A launch without programs is an error.
    if y.numel():
        gate, up = flatten_to_2d(gate), flatten_to_2d(up)
        rows, N = gate.shape
        _forward_kernel[(rows, triton.cdiv(N, BLOCK))](
            gate, up, y, gate.stride(0), up.stride(0), N, BLOCK=BLOCK, num_warps=8
        )
    return y


def _launch_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if dgate.numel():
        gate, up, dy = flatten_to_2d(gate), flatten_to_2d(up), flatten_to_2d(dy)
        rows, N = gate.shape
        strides = gate.stride(0), up.stride(0), dy.stride(0)
        _backward_kernel[(rows, triton.cdiv(N, BLOCK))](
            gate, up, dy, dgate, dup, *strides, N, BLOCK=BLOCK, num_warps=8
        )
    return dgate, dup


def _fake_forward(gate, up):
    return gate.new_empty(gate.shape)


def _fake_backward(gate, up, dy):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(run, ctx, dy):
    return run(*ctx.saved_tensors, dy)


_backward_op = Operator("swiglu_backward", _launch_backward, _fake_backward)
_forward_op = Operator(
    "swiglu", _launch_forward, _fake_forward, _setup_context, _backward, _backward_op
)


def swiglu(gate, up):
    """silu(gate) · up: (..., N) and (..., N) -> (..., N). Both may be halves of one projection."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)}, up {tuple(up.shape)}")
    return _forward_op(gate, up) if use_triton(gate) else swiglu_reference(gate, up)
