from kernels import tl, triton


@triton.jit
def _forward_kernel(gate, up, y, gate_stride, up_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    a = tl.load(gate + row * gate_stride + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + offs, mask=mask, other=0.0).to(tl.float32)
    # silu(gate) is rounded to y's dtype before the product.
    silu = (a * tl.sigmoid(a)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * N + offs, (silu * b).to(y.dtype.element_ty), mask=mask)
