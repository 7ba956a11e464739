"""
Compiles every kernel for three GPU generations on a machine without a GPU, and reads what came out.

    python tests/compile_kernels.py [--arch 80 90 100] [--out docs/kernels-compiled.md]

The real launchers run on "meta" tensors behind a stub driver that says which GPU to compile for: Triton specialises on the
real arguments, compiles, and launches nothing. Of each binary: registers, spilled bytes (stack), shared memory,
matrix instructions and 16-byte loads. Fails when a kernel spills on sm_90, asks for more shared memory than the chip has, or
lost its matrix instructions or wide loads. It must be its own process, without TRITON_INTERPRET.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels import attention, cross_entropy, rms_norm, rope, set_kernels, swiglu  # noqa: F401
A, CE, NORM, ROPE, GATE = (sys.modules[f"kernels.{n}"] for n in ("attention", "cross_entropy", "rms_norm", "rope", "swiglu"))

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class StubDriver:
    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


def collect(launch):
    """Runs a launcher with every kernel call turned into a compilation; -> [(name, compiled kernel)]."""
    compiled, run = [], triton.JITFunction.run

    def dry(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__ if hasattr(self, "__name__") else self.fn.__name__, kernel))
        return kernel
    triton.JITFunction.run = dry
    try:
        launch()
    finally:
        triton.JITFunction.run = run
    return compiled


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases(heads_dims=(64, 80, 128)):
    """(name, what must be there: matrix instructions "m" or wide loads "w", launcher)"""
    B, T = 2, 2048
    rows = meta(B, T, dtype=torch.int32), meta(B, T, dtype=torch.int32)
    for D in heads_dims:
        q, k = meta(B, T, 16, D), meta(B, T, 8, D)
        lse = meta(B, 16, T, dtype=torch.float32)
        for mask, causal, (lo, hi) in (("full", False, (None, None)), ("causal", True, (None, None)), ("rows", True, rows)):
            yield f"attention D{D} {mask}", "m", lambda q=q, k=k, c=causal, lo=lo, hi=hi: A._launch_forward(q, k, k, c, lo, hi, 0.1)
            yield f"attention D{D} {mask}", "m", lambda q=q, k=k, c=causal, lo=lo, hi=hi, s=lse: A._launch_backward(q, k, k, q, s, q, c, lo, hi, 0.1)
        yield f"decode D{D}", "", lambda D=D: A._launch_cache(meta(B, 16, D), meta(B, 4096, 8, D), meta(B, 4096, 8, D), meta(B, dtype=torch.int32), 0)
    x, w = meta(4096, 5120), meta(5120)
    yield "norm 5120", "w", lambda: NORM._launch_forward(x, None, w, 1e-5)
    yield "add norm 5120", "w", lambda: NORM._launch_forward(x, x, w, 1e-5)
    yield "norm 5120", "w", lambda: NORM._launch_backward(x, w, x, None, 1e-5)
    yield "add norm 5120", "w", lambda: NORM._launch_backward(x, w, x, x, 1e-5)
    g = meta(4096, 13824)
    yield "swiglu 13824", "w", lambda: GATE._launch_forward(g, g)
    yield "swiglu 13824", "w", lambda: GATE._launch_backward(g, g, g)
    angles = meta(4096, 64, dtype=torch.float32)
    yield "rope D128", "", lambda: ROPE._launch(meta(B, T, 40, 128), angles, angles, meta(B, T, dtype=torch.int64), 1.0)
    for V in (39478, 39488):
        yield f"cross-entropy {V}", "w", lambda V=V: CE._launch_total(meta(256, 64), meta(V, 64), meta(256, dtype=torch.int64), meta(256, dtype=torch.float32), -100, 1 << 30, True, False)


def read(kernel, arch):
    """-> registers, stack bytes, shared bytes, matrix instructions, 16-byte loads"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run([BIN / "cuobjdump", "--dump-resource-usage", f.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([BIN / "nvdisasm", "-c", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    wide = len(re.findall(r"\bLDG\.E\S*\.128|\bLDGSTS\.E\S*\.128|\bUTMALDG", code))
    return registers, stack, kernel.metadata.shared, len(re.findall(rf"\b{MATRIX[arch]}", code)), wide


def table(archs, heads_dims=(64, 80, 128)):
    """-> Markdown lines, and what is wrong."""
    set_kernels("auto")
    lines, wrong = [], []
    for arch in archs:
        triton.runtime.driver.set_active(StubDriver(arch))
        lines += [f"**sm_{arch}** (Triton {triton.__version__})", "", "| kernel | warps | registers | spilled bytes | shared bytes | matrix instructions | 16-byte loads |", "|---|--:|--:|--:|--:|--:|--:|"]
        for name, needs, launch in cases(heads_dims):
            for function, kernel in collect(launch):
                registers, stack, shared, matrix, wide = read(kernel, arch)
                at = f"{name} {function}"
                lines.append(f"| {at} | {kernel.metadata.num_warps} | {registers} | {stack} | {shared} | {matrix} | {wide} |")
                if arch == 90 and stack:
                    wrong.append(f"sm_90 {at}: spills {stack} bytes")
                if shared > SHARED_LIMIT[arch]:
                    wrong.append(f"sm_{arch} {at}: {shared} bytes of shared memory, the chip has {SHARED_LIMIT[arch]}")
                if needs == "m" and not matrix:
                    wrong.append(f"sm_{arch} {at}: no {MATRIX[arch]} instruction")
                if needs == "w" and not wide:
                    wrong.append(f"sm_{arch} {at}: no 16-byte load")
        lines.append("")
    return lines, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=list(MATRIX))
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 80, 128], help="attention head dims")
    parser.add_argument("--out", help="also write the table here")
    args = parser.parse_args()
    lines, wrong = table(args.arch, args.dims)
    print("\n".join(lines))
    if args.out:
        Path(args.out).parent.mkdir(exist_ok=True)
        Path(args.out).write_text("# The kernels, compiled\n\nWritten by `python tests/compile_kernels.py --out docs/kernels-compiled.md`.\n\n" + "\n".join(lines) + "\n")
    print("\n".join(wrong) or "all as it should be")
    sys.exit(bool(wrong))
