from kernels import tl, triton


@triton.jit
def _forward_kernel(gate, up, y, gate_stride, up_stride, N, BLOCK: tl.constexpr):
    # As if rows followed each other in memory.
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    a = tl.load(gate + row * N + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(up + row * N + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * N + offs, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=mask)
