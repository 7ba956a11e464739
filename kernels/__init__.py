"""
Fused kernels in Triton, each beside the plain PyTorch code that defines it.

    attention.py       attention (forward and backward) and attention_with_kvcache (decoding)
    cross_entropy.py   linear_cross_entropy: the last linear layer and the loss in one
    rms_norm.py        rms_norm, and add_rms_norm with the residual connection
    rope.py            rope: rotary position embedding
    swiglu.py          swiglu: the gate of the MLP
    tiled.py           attention a tile at a time in plain PyTorch, for readers
    device.py          the device and the precision of a run, and what GPUs reach
    bench.py           python -m kernels.bench: speed against PyTorch's own operators

A kernel is a fast version of a definition. Every file has the same order: the definition
(`*_reference`, plain PyTorch, used on a CPU; a norm there has its gradient written out), the
Triton kernels, the operators that register them with autograd and torch.compile, and last the
public function, which calls one of the two. Models call the public functions only.

The kernels also run on a CPU, slowly, in Triton's interpreter. The tests use it where there is
no GPU. The variable must be set before triton is imported:

    TRITON_INTERPRET=1 python -m pytest tests/test_kernels_*.py
"""

import functools
import os

import torch
from torch.autograd.function import once_differentiable

# Fuse a·b + c into one instruction: Triton 3.10 no longer does it by default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
    INTERPRET = triton.knobs.runtime.interpret
except ImportError:  # macOS, Windows: only the definitions run
    HAVE_TRITON = False
    INTERPRET = False

    class triton:
        """Just enough of triton to import the kernels, which are never called."""

        @staticmethod
        def jit(function=None, **options):
            return function or triton.jit

    class tl:
        @staticmethod
        def constexpr(value):
            return value


_choice = "auto"


def set_kernels(choice):
    """Chooses the implementation for the whole process (`--kernels`): "auto" (Triton for tensors
    on a GPU, else the definitions), "triton" (on a CPU only in the interpreter) or "torch" (always
    the definitions). ValueError for another word, and where Triton cannot run."""
    global _choice
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels must be auto, triton or torch, not {choice!r}")
    if choice == "triton" and not HAVE_TRITON:
        raise ValueError("kernels 'triton': run `pip install triton`, or choose 'torch'")
    if choice == "triton" and not (INTERPRET or torch.cuda.is_available()):
        raise ValueError(
            "kernels 'triton' needs a GPU; to interpret it on a CPU, set TRITON_INTERPRET=1"
        )
    _choice = choice


def use_triton(x):
    """Whether the Triton kernel runs for tensor `x`; checked at each call.

    torch.compile can fold this into a constant (it cannot fold get_device_capability). GPUs older
    than Ampere have no bf16 and use the definitions."""
    if _choice != "auto":
        return _choice == "triton"
    return HAVE_TRITON and x.is_cuda and torch.cuda.get_device_properties(x.device).major >= 8


def arch():
    """The compiler's target, from which tile sizes follow: 80 for sm_80 …, 0 in the interpreter."""
    if INTERPRET:
        return 0
    target = triton.runtime.driver.active.get_current_target().arch
    return target if isinstance(target, int) else 80  # AMD targets are strings: no TMA there


def num_sms(x):
    """The number of multiprocessors, for kernels whose grid depends on the GPU, not on the data."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 3 if INTERPRET else 132


def autocast_dtype(x):
    """The dtype of matrix products under autocast on x's device; None without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class Operator:
    """A kernel's launch function with its gradient, as torch calls it.

    fake(*args): outputs of the right shapes. setup_context(ctx, inputs, output) and
    backward(run, ctx, *grads) are those of autograd.Function; `run` is the operator `gradients`, or
    this one. Without backward there is no gradient.

    torch.compile gets a custom operator, into which it does not look. Other callers get an
    autograd.Function: the launch of a custom operator costs a CPU several times as much, and small
    models are bound by their launches (docs/benchmarks.md)."""

    def __init__(self, name, launch, fake, setup_context=None, backward=None, gradients=None):
        self.name, self.launch, self.direct = name, launch, launch
        self.custom = torch.library.custom_op(f"xllava::{name}", launch, mutates_args=())
        self.custom.register_fake(fake)
        if backward is None:
            return
        gradients = gradients or self
        self.custom.register_autograd(
            functools.partial(backward, gradients.custom), setup_context=setup_context
        )

        # Given apart, setup_context would make torch look up forward's signature at each call.
        def forward(ctx, *inputs):
            output = launch(*inputs)
            setup_context(ctx, inputs, output)
            return output

        gradient = once_differentiable(functools.partial(backward, gradients.launch))
        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
        self.direct = type(name, (torch.autograd.Function,), methods).apply

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self.custom(*args)
        return self.direct(*args) if torch.is_grad_enabled() else self.launch(*args)


def flatten_to_2d(x):
    """(..., C) -> (rows, C) with contiguous rows; copies only where the strides require it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) with fp32 sums. "ieee" keeps a GPU from rounding fp32 inputs to tf32."""
    # The interpreter multiplies the bit patterns of bf16 as integers: widen them first.
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


from kernels.attention import attention, attention_with_kvcache  # noqa: E402, F401
from kernels.cross_entropy import linear_cross_entropy  # noqa: E402, F401
from kernels.rms_norm import add_rms_norm, rms_norm  # noqa: E402, F401
from kernels.rope import rope  # noqa: E402, F401
from kernels.swiglu import swiglu  # noqa: E402, F401
