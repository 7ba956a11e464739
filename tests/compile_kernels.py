"""
Compiles every kernel for three GPU generations on a machine without a GPU, and reads what came out.

    python tests/compile_kernels.py [--arch 80 90 100] [--only "D128 rows"] [--out docs/kernels-compiled.md]

The real launchers run on "meta" tensors behind a stub driver that says which GPU to compile for: Triton specialises on the
real arguments, compiles, and launches nothing. Of each binary: registers, spilled bytes (stack), shared memory, and its
matrix instructions and loads. Fails when a kernel spills (sm_80: more than a few words), asks for more shared memory than the chip
has, lost its matrix instructions or 16-byte loads, or reads single 16-bit numbers in a loop. It must be its own process, without TRITON_INTERPRET.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels import attention, cross_entropy, rms_norm, rope, swiglu  # noqa: F401
A, CE, NORM, ROPE, GATE = (sys.modules[f"kernels.{n}"] for n in ("attention", "cross_entropy", "rms_norm", "rope", "swiglu"))

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
SPILL_LIMIT = {80: 64, 90: 0, 100: 0}
MATRIX = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA")}  # a decoding tile of 16 queries is too small for the newer ones: HMMA
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class StubDriver:
    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # a device of its own: Triton remembers what it compiled by device, and would hand it on

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


def collect(launch):
    """Runs a launcher with every kernel call turned into a compilation; -> [(name, compiled kernel)]."""
    compiled, run = [], triton.JITFunction.run

    def dry(self, *args, grid, warmup, **kwargs):
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))
        return compiled[-1][1]
    triton.JITFunction.run = dry
    try:
        launch()
    finally:
        triton.JITFunction.run = run
    return compiled


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases(only=""):
    """(name, "matrix" or "wide": what its loops are made of, launcher) of what has the regular expression `only` in its name"""
    return [case for case in every_case() if re.search(only, case[0])]


def every_case():
    B, T = 2, 2048
    ints, longs = meta(B, T, dtype=torch.int32), meta(B, T, dtype=torch.int64)
    for D in (64, 80, 128):
        q, k, lse = meta(B, T, 16, D), meta(B, T, 8, D), meta(B, 16, T, dtype=torch.float32)
        for mask, causal, rows in (("full", False, None), ("causal", True, None), ("rows", True, ints)):
            yield f"attention D{D} {mask}", "matrix", lambda q=q, k=k, c=causal, r=rows: A._launch_forward(q, k, k, c, r, r, 0.1)
            yield f"attention D{D} {mask}", "matrix", lambda q=q, k=k, c=causal, r=rows, s=lse: A._launch_backward(q, k, k, q, s, q, c, r, r, 0.1)
        yield f"decode D{D}", "decode", lambda D=D: A._launch_cache(meta(B, 16, D), meta(B, 4096, 8, D), meta(B, 4096, 8, D), meta(B, dtype=torch.int32), 0)
    x, w, g = meta(4096, 5120), meta(5120), meta(4096, 13824)
    yield "norm 5120", "wide", lambda: NORM._launch_forward(x, None, w, 1e-5)
    yield "add norm 5120", "wide", lambda: NORM._launch_forward(x, x, w, 1e-5)
    yield "norm 5120", "wide", lambda: NORM._launch_backward(x, w, x, None, 1e-5)
    yield "add norm 5120", "wide", lambda: NORM._launch_backward(x, w, x, x, 1e-5)
    yield "swiglu 13824", "wide", lambda: GATE._launch_forward(g, g)
    yield "swiglu 13824", "wide", lambda: GATE._launch_backward(g, g, g)
    angles = meta(4096, 64, dtype=torch.float32)
    yield "rope D128", "wide", lambda: ROPE._launch(meta(B, T, 40, 128), angles, angles, longs, 1.0)
    for V in (39478, 39488):
        yield f"cross-entropy {V}", "wide", lambda V=V: CE._launch_total(meta(256, 64), meta(V, 64), longs[0, :256], meta(256, dtype=torch.float32), -100, 1 << 30, True, False)


def in_loops(code):
    """The instructions between a label and a later jump back to it."""
    lines = code.splitlines()
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"\s*(\.L\w+):", line))}
    jumps = [(labels.get(m[1], n), n) for n, line in enumerate(lines) if (m := re.search(r"\bBRA\b.*`\((\.L\w+)\)", line))]
    return "\n".join(line for n, line in enumerate(lines) if any(start <= n <= stop for start, stop in jumps))


def examine(task):
    """-> the table's rows of one launcher for one architecture, and what is wrong with its kernels."""
    arch, (name, needs, launch) = task[0], cases(task[2])[task[1]]
    triton.runtime.driver.set_active(StubDriver(arch))
    rows, wrong = [], []
    for function, kernel in collect(launch):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(kernel.asm["cubin"])
            f.flush()
            usage = subprocess.run([BIN / "cuobjdump", "--dump-resource-usage", f.name], capture_output=True, text=True, check=True).stdout
            code = subprocess.run([BIN / "nvdisasm", "-c", f.name], capture_output=True, text=True, check=True).stdout
        registers, spilled = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
        shared, loop = kernel.metadata.shared, in_loops(code)
        matrix = len(re.findall(rf"\b(?:{'|'.join(MATRIX[arch] if needs == 'matrix' else ('HMMA',))})\b", code))
        wide = len(re.findall(r"\b(?:LDG\.E\S*\.128|LDGSTS\.E\S*\.128|UTMALDG)", code))
        narrow = len(re.findall(r"\b(?:LDG|LDGSTS)\.E\S*\.[US](?:16|8)\b", loop))
        rows.append(f"| {name} {function} | {kernel.metadata.num_warps} | {registers} | {spilled} | {shared} | {matrix} | {wide} | {narrow} |")
        wrong += [f"sm_{arch} {name} {function}: {what}" for what, is_so in {
            f"spills {spilled} bytes": spilled > SPILL_LIMIT[arch] or not SPILL_LIMIT[arch] and re.search(r"\b(?:STL|LDL)\b", code),
            f"{shared} bytes of shared memory, the chip has {SHARED_LIMIT[arch]}": shared > SHARED_LIMIT[arch],
            "no matrix instruction": needs in ("matrix", "decode") and not matrix and function != "_cache_merge",
            "no 16-byte load": not wide, f"{narrow} loads of 16 bits or less in a loop": narrow}.items() if is_so]
    return rows, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--arch", type=int, nargs="+", default=list(MATRIX), choices=list(MATRIX))
    parser.add_argument("--only", default="", help="a regular expression that the kernels' names must match")
    parser.add_argument("--out", help="also write the table here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        os.environ["TRITON_CACHE_DIR"] = cache  # compiled afresh: no table from an older compiler's leftovers
        results = {arch: list(zip(*pool.map(examine, [(arch, n, args.only) for n in range(len(cases(args.only)))]))) for arch in args.arch}
    lines = []
    for arch, (rows, _) in results.items():
        lines += [f"**sm_{arch}** (Triton {triton.__version__})", "", "| kernel | warps | registers | spilled bytes | shared bytes | matrix instructions | 16-byte loads | 16-bit loads in loops |",
                  "|---|--:|--:|--:|--:|--:|--:|--:|", *(row for case in rows for row in case), ""]
    wrong = [w for _, cases_wrong in results.values() for case in cases_wrong for w in case]
    print("\n".join(lines))
    if args.out:
        Path(args.out).parent.mkdir(exist_ok=True)
        Path(args.out).write_text(f"# The kernels, compiled\n\nWritten by `python tests/compile_kernels.py --out {args.out}`.\n\n" + "\n".join(lines))
    print("\n".join(wrong) or "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
