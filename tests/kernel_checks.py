"""What the kernel tests share: where they run, inputs between guard bands, and the yardstick."""
import numpy
import pytest
import torch

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not kernels.HAVE_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)
if kernels.INTERPRET and kernels.triton.__version__.startswith("3.6") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("Triton 3.6 cannot interpret loops with numpy 2.4 or newer: pip install 'numpy<2.4'", allow_module_level=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def triton_kernels():
    torch.manual_seed(0)
    kernels.set_kernels("triton")
    yield
    kernels.set_kernels("auto")


def guarded(*shape, dtype=torch.float32, scale=1.0):
    """Random numbers that lie between NaNs: whoever reads past either end brings one back."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 4096,), float("nan"), dtype=dtype, device=DEVICE)
    memory[2048:2048 + size] = (torch.randn(size) * scale).to(dtype)
    return memory[2048:2048 + size].view(shape)


def run(choice, fn, inputs, double=False):
    """-> outputs and input gradients of fn under set_kernels(choice); upstream gradients are the same every time."""
    kernels.set_kernels(choice)
    inputs = [(x.double() if double else x).detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(5)
    ups = [torch.randn(o.shape, generator=g).to(o.device, o.dtype) for o in out]
    grads = torch.autograd.grad(out, inputs, ups)
    kernels.set_kernels("triton")
    return [t.detach() for t in (*out, *grads)]


def agree(fn, inputs, rival=None):
    """The Triton kernel's distance from float64 is at most twice that of plain torch in the same dtype, or of `rival`, torch's own
    fused operator, plus rounding: one unit in the last place of a 16-bit result (the interpreter cuts bf16 off), and in fp32 four units of the call's largest
    result, for a gradient may be what is left when larger terms cancel: a query with one key has dq = 0, which plain torch meets by luck. In norm and at the worst element."""
    exact, plain, ours = run("torch", fn, inputs, double=True), run("torch", fn, inputs), run("triton", fn, inputs)
    others = [plain] + ([run("torch", rival, inputs)] if rival else [])
    dtype = inputs[0].dtype
    for size in torch.linalg.vector_norm, lambda t: t.abs().max():
        largest = max(size(t).item() for t in exact)
        for n, (e, o, *theirs) in enumerate(zip(exact, ours, *others)):
            assert o.dtype == plain[n].dtype and o.shape == e.shape, (n, o.dtype, plain[n].dtype, o.shape, e.shape)
            assert o.isfinite().all(), f"result {n} is not finite"
            rounding = torch.finfo(dtype).eps * (4 * largest if dtype == torch.float32 else size(e).item())
            error, allowed = size(o.double() - e).item(), 2 * max(size(t.double() - e).item() for t in theirs) + rounding
            assert error <= allowed, f"result {n}: error {error:.2e}, allowed {allowed:.2e}"
    return ours
