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


class Roomy:
    """torch.empty and empty_like with a margin of sevens behind each tensor: `whole()` says whether all margins are still sevens."""
    def __init__(self, monkeypatch):
        self.made = []
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch, "empty_like", lambda x: self.empty(*x.shape, dtype=x.dtype, device=x.device))

    def empty(self, *shape, **kind):
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        memory = torch.full((size.numel() + 30000,), 7.0, **kind)
        self.made.append((memory, size.numel()))
        return memory[:size.numel()].view(size)

    def whole(self):
        return all((memory[size:] == 7).all() for memory, size in self.made)


def agree(fn, inputs, cancel=0.0):
    """The Triton kernel's distance from float64 is at most twice that of plain torch in the same dtype, plus one unit of fp32 in
    the last place (on a GPU four: its exp2, rsqrt and division are approximations). In norm and at the worst element.
    cancel: results may be what is left when terms `cancel` times as large as the call's largest result cancel, so the unit is of those.
    A query with one key has dq = 0, which plain torch meets exactly and dP − δ only to rounding.
    The interpreter cuts bf16 off instead of rounding: one unit of bf16 more there."""
    exact, plain, ours = run("torch", fn, inputs, double=True), run("torch", fn, inputs), run("triton", fn, inputs)
    unit = torch.finfo(torch.float32).eps * (4 if DEVICE == "cuda" else 1)
    cut = torch.finfo(torch.bfloat16).eps if kernels.INTERPRET and inputs[0].dtype == torch.bfloat16 else 0
    for size in torch.linalg.vector_norm, lambda t: t.abs().max():
        largest = max(size(t).item() for t in exact)
        for n, (e, p, o) in enumerate(zip(exact, plain, ours)):
            assert o.dtype == p.dtype and o.shape == e.shape, (n, o.dtype, p.dtype, o.shape, e.shape)
            assert o.isfinite().all(), f"result {n} is not finite"
            error = size(o.double() - e).item()
            allowed = 2 * size(p.double() - e).item() + unit * max(size(e).item(), cancel * largest) + cut * size(e).item()
            assert error <= allowed, f"result {n}: error {error:.2e}, allowed {allowed:.2e}"
    return ours
