"""
Compiles every kernel for the GPU generations on a machine without a GPU, and reads the result.

    python tests/compile_kernels.py [--arch 80 90 100 120] [--only "D128 ranges"]
    python tests/compile_kernels.py --out docs/kernels-compiled.md

The real launchers run on "meta" tensors, behind a stub driver that tells which GPU to compile for.
Triton specialises on the real arguments, compiles, and launches nothing. The table shows for each
binary its registers, spilled bytes (stack), shared memory, matrix instructions and loads.

It fails when a bf16 kernel spills (with pointers instead of descriptors: more than a few words) or
has no matrix instructions, and when any needs more shared memory than the chip has, has no 16-byte
loads, or reads single 16-bit numbers in a loop.
It must be a process of its own, without TRITON_INTERPRET.
"""

import argparse
import functools
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

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import kernels  # noqa: E402, F401

ATTENTION, CE, NORM, ROPE, SWIGLU = (
    sys.modules[f"kernels.{name}"]
    for name in ("attention", "cross_entropy", "rms_norm", "rope", "swiglu")
)

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
SPILL_LIMIT = {80: 64, 86: 64, 89: 64, 90: 0, 100: 8, 120: 64}  # 100: head dim 80, one address
# A decoding tile of 16 queries is too small for the newer instructions: HMMA everywhere.
MATRIX = dict.fromkeys(SHARED_LIMIT, ("HMMA",)) | {90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA")}
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
HEADER = """\
| kernel | warps | registers | spilled bytes | shared bytes | matrix instructions | 16-byte loads \
| 16-bit loads in loops |
|---|--:|--:|--:|--:|--:|--:|--:|"""


class StubDriver:
    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton caches by device: each target is a device of its own

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


def collect(launch):
    """Runs a launcher with every kernel call turned into a compilation.

    -> [(name, compiled kernel)]"""
    compiled, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    triton.JITFunction.run = compile_only
    try:
        launch()
    finally:
        triton.JITFunction.run = run
    return compiled


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases(only=""):
    """The cases whose name matches the regular expression `only`."""
    return [case for case in every_case() if re.search(only, case[0])]


def every_case():
    """(name, what its loops are made of: "matrix", "decode" or "wide" loads; or "fp32", which must
    fit only, launcher)"""

    def case(name, needs, launch, *arguments):
        return name, needs, functools.partial(launch, *arguments)

    B, T, H, K, S = 2, 2048, 16, 8, 4096
    positions, ranges = meta(B, T, dtype=torch.int64), meta(B, T, dtype=torch.int32)
    lengths, lse = meta(B, dtype=torch.int32), meta(B, H, T, dtype=torch.float32)
    for D in (64, 80, 128):
        q, k, cache = meta(B, T, H, D), meta(B, T, K, D), meta(B, S, K, D)
        for name, causal, bounds in (
            ("full", False, None),
            ("causal", True, None),
            ("ranges", True, ranges),
        ):
            name, mask = f"attention D{D} {name}", (causal, bounds, bounds)
            yield case(name, "matrix", ATTENTION._launch_forward, q, k, k, *mask)
            yield case(name, "matrix", ATTENTION._launch_backward, q, k, k, q, lse, q, *mask)
        decode = ATTENTION._launch_decode, q[:, 0], cache, cache, lengths, 0
        yield case(f"decode D{D}", "decode", *decode)
        wide = [tensor.float() for tensor in decode[1:4]]
        yield case(f"decode D{D} fp32", "fp32", decode[0], *wide, *decode[4:])

    x, w, gate = meta(4096, 5120), meta(5120), meta(4096, 13824)
    yield case("norm 5120", "wide", NORM._launch_forward, x, None, w, 1e-5, None)
    yield case("add norm 5120", "wide", NORM._launch_forward, x, x, w, 1e-5, None)
    yield case("norm 5120", "wide", NORM._launch_backward, x, w, x, None, 1e-5)
    yield case("add norm 5120", "wide", NORM._launch_backward, x, w, x, x, 1e-5)
    yield case("swiglu 13824", "wide", SWIGLU._launch_forward, gate, gate)
    yield case("swiglu 13824", "wide", SWIGLU._launch_backward, gate, gate, gate)

    angles, heads = meta(4096, 64, dtype=torch.float32), meta(B, T, 40, 128)
    yield case("rope D128", "wide", ROPE._launch, heads, angles, angles, positions, 1.0)
    for V in (39478, 39488):
        loss = meta(256, 64), meta(V, 64), positions[0, :256], -100, torch.bfloat16, True, False
        yield case(f"cross-entropy {V}", "wide", CE._launch, *loss)
    yield case("scale", "wide", CE._launch_scale, x, meta(1, dtype=torch.float32), torch.float32)


def in_loops(code):
    """The instructions between a label and a later jump back to it."""
    lines, labels, loops = code.splitlines(), {}, []
    for n, line in enumerate(lines):
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = n
    for n, line in enumerate(lines):
        if jump := re.search(r"\bBRA\b.*`\((\.L\w+)\)", line):
            loops.append((labels.get(jump[1], n), n))
    inside = [any(start <= n <= stop for start, stop in loops) for n in range(len(lines))]
    return "\n".join(line for line, keep in zip(lines, inside) if keep)


def disassemble(kernel):
    """-> the resource usage and the instructions of a compiled kernel, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        commands = ["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"]
        for tool, option in commands:
            command = [BIN / tool, option, f.name]
            yield subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def examine(task):
    """-> the table's rows of one launcher for one architecture, and what is wrong with them."""
    arch, index, only = task
    case_name, needs, launch = cases(only)[index]
    triton.runtime.driver.set_active(StubDriver(arch))
    rows, wrong = [], []
    for function, kernel in collect(launch):
        name = f"{case_name} {function}"
        usage, code = disassemble(kernel)
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        spilled = int(re.search(r"STACK:(\d+)", usage)[1])
        shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
        instructions = MATRIX[arch] if needs == "matrix" else ("HMMA",)
        matrix = len(re.findall(rf"\b(?:{'|'.join(instructions)})\b", code))
        wide = len(re.findall(r"\b(?:LDG\.E\S*\.128|LDGSTS\.E\S*\.128|UTMALDG)", code))
        narrow = len(re.findall(r"\b(?:LDG|LDGSTS)\.E\S*\.[US](?:16|8)\b", in_loops(code)))
        row = (name, warps, registers, spilled, shared, matrix, wide, narrow)
        rows.append(f"| {' | '.join(map(str, row))} |")

        local_access = not SPILL_LIMIT[arch] and re.search(r"\b(?:STL|LDL)\b", code)
        if needs != "fp32" and (spilled > SPILL_LIMIT[arch] or local_access):
            wrong.append(f"sm_{arch} {name}: spills {spilled} bytes")
        if shared > SHARED_LIMIT[arch]:
            limit = SHARED_LIMIT[arch]
            wrong.append(f"sm_{arch} {name}: {shared} bytes of shared memory, the chip has {limit}")
        if needs in ("matrix", "decode") and not matrix and function != "_decode_combine":
            wrong.append(f"sm_{arch} {name}: no matrix instruction")
        if not wide:
            wrong.append(f"sm_{arch} {name}: no 16-byte load")
        if narrow:
            wrong.append(f"sm_{arch} {name}: {narrow} loads of 16 bits or less in a loop")
    return rows, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    known = list(MATRIX)
    parser.add_argument("--arch", type=int, nargs="+", default=known, choices=known)
    parser.add_argument("--only", default="", help="a regular expression for the kernels' names")
    parser.add_argument("--out", help="also write the table to this file")
    args = parser.parse_args()

    indices, results = range(len(cases(args.only))), {}
    context = get_context("fork")
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(os.cpu_count(), context) as pool,
    ):
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing from an older compiler
        for arch in args.arch:
            tasks = [(arch, n, args.only) for n in indices]
            results[arch] = list(pool.map(examine, tasks))

    lines, wrong = [], []
    for arch, examined in results.items():
        lines += [f"**sm_{arch}** (Triton {triton.__version__})", "", HEADER]
        for rows, faults in examined:
            lines += rows
            wrong += faults
        lines.append("")
    print("\n".join(lines))
    if args.out:
        title = "# The kernels, compiled\n\nWritten by `python tests/compile_kernels.py --out"
        title += f" {args.out}`."
        Path(args.out).parent.mkdir(exist_ok=True)
        Path(args.out).write_text("\n".join([title, "", *lines]), encoding="utf-8")
    print("\n".join(wrong) or "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
