"""
Fused kernels in Triton, each beside the plain PyTorch that defines it.

    from kernels import attention, rms_norm, rope, swiglu, linear_cross_entropy, set_kernels

A kernel is a fast version of a definition. Every file here holds, in this order: the definition (`*_reference`, plain
PyTorch, what runs on a CPU), the Triton kernels, the custom operators that make them known to autograd, torch.compile
and autocast, and last the public function, which picks one of the two in one line. Models call the public functions only.

The kernels also run on a CPU, slowly, inside Triton's interpreter: that is how the tests check them without a GPU.
    TRITON_INTERPRET=1 python -m pytest tests/test_kernels_*.py    (the variable must be there before triton is imported)
"""
import os

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a·b + c in one instruction, which Triton 3.10 will no longer do unasked
try:
    import triton
    import triton.language as tl
    HAVE_TRITON, INTERPRET = True, triton.knobs.runtime.interpret
except ImportError:  # macOS, Windows, a bare CPU: the definitions do everything, the kernels below are never called
    class triton:  # just enough for `@triton.jit` and `tl.constexpr` in signatures to parse
        jit = staticmethod(lambda fn=None, **options: fn or triton.jit)

    class tl:
        constexpr = staticmethod(lambda value: value)
    HAVE_TRITON, INTERPRET = False, False

_choice = "auto"


def set_kernels(choice):
    """What `--kernels` means, for the whole process: "auto" (Triton for tensors on a GPU, the definitions elsewhere),
    "triton" (always; on a CPU only inside the interpreter) or "torch" (always the definitions)."""
    global _choice
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels must be auto, triton or torch, not {choice!r}")
    if choice == "triton" and not HAVE_TRITON:
        raise RuntimeError("kernels 'triton' needs the triton package: pip install triton, or choose 'torch'")
    if choice == "triton" and not (INTERPRET or torch.cuda.is_available()):
        raise RuntimeError("kernels 'triton' needs a GPU, or TRITON_INTERPRET=1 in the environment to interpret on the CPU")
    _choice = choice


def use_triton(x):
    """Does the Triton kernel take tensor `x`? Asked at each call, and in a way that torch.compile can fold into a constant
    (get_device_capability it can't). GPUs before Ampere lack bf16: the definitions there."""
    if _choice == "auto":
        return HAVE_TRITON and x.is_cuda and torch.cuda.get_device_properties(x.device).major >= 8
    return _choice == "triton"


def arch():
    """The compiler's target, 80 for sm_80 and so on; 0 inside the interpreter. Chooses tile sizes."""
    if INTERPRET:
        return 0
    name = triton.runtime.driver.active.get_current_target().arch
    return name if isinstance(name, int) else 80  # an AMD target is a string: take the plain path


def processors(x):
    """How many programs run side by side, for kernels whose grid is sized by the machine and not by the data."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 3 if INTERPRET else 132


def as_rows(x):
    """(..., C) as a matrix whose rows are contiguous; a copy only where strides leave no other way."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc), fp32 sums. The interpreter multiplies bf16 bit patterns as if they were integers: widen first there.
    "ieee" concerns fp32 inputs only: without it a GPU rounds them to tf32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


from kernels.attention import attention_with_kvcache, attention, rows_causal, rows_from_docs, rows_left_padded, rows_prefix, rows_window  # noqa: E402
from kernels.cross_entropy import linear_cross_entropy  # noqa: E402
from kernels.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from kernels.rope import rope  # noqa: E402
from kernels.swiglu import swiglu  # noqa: E402
