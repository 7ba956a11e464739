"""
The speed of the kernels against PyTorch's own operators: the tests first, then tables in Markdown.

    python -m kernels.bench      # on a GPU: all tests and tables; some minutes, mostly compilation
    python -m kernels.bench --no-tests --only attention --json attention.json
    python -m kernels.bench --profile …    # … are words of train.py: where training spends its time

Without a GPU it prints what the compiler makes of every kernel (tests/compile_kernels.py).

The ceilings, a large copy and a large bf16 matrix product, are measured in the same run; each %
refers to them, and the floor is the time in which they would do the same work. A time is the median
of GPU events over rotating random inputs, with the L2 cache flushed in between, because zeros run
faster than data and a warm cache flatters. "3 / 7" is forward / backward; "1.2×" is how many times
as fast as the rival to its left the kernel is.
"""

import argparse
import datetime
import functools
import subprocess
import sys
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernels
from kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from kernels.rope import rope_reference
from kernels.swiglu import swiglu_reference
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.files import claim_output, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"

# The backward of a compiled rival runs several times on one forward.
torch._functorch.config.donated_buffer = False


def median_ms(fn, input_sets, repeats=20):
    """Median time of fn(*inputs) in ms over rotating input sets."""
    cache_filler = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    events = []
    for n in range(repeats + 3):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        cache_filler.zero_()
        # About 1 ms in which the CPU queues the launches: its own time is not measured.
        torch.cuda._sleep(2_000_000)
        start.record()
        fn(*input_sets[n % len(input_sets)])
        end.record()
        events.append((start, end))
    # The first three runs compile and warm up.
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events[3:])
    return times[repeats // 2]


def peak_gb(fn, *inputs):
    """The memory that fn needs at its peak beyond what is allocated before, results included."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn(*inputs)
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def forward_graph(fn, *inputs):
    """-> outputs, inputs and random gradients of the outputs: what `backward` takes."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    return out, inputs, [torch.randn_like(o) for o in out]


def backward(out, inputs, grads):
    return torch.autograd.grad(out, inputs, grads, retain_graph=True)


def measure(fn, input_sets):
    """-> forward ms, backward ms, peak GB of both together."""
    with torch.no_grad():
        forward_ms = median_ms(fn, input_sets)
    backward_ms = median_ms(backward, [forward_graph(fn, *inputs) for inputs in input_sets])
    peak = peak_gb(lambda *inputs: backward(*forward_graph(fn, *inputs)), *input_sets[0])
    return forward_ms, backward_ms, peak


def measure_rival(fn, input_sets):
    """The result of measure(), or None where the rival does not take these inputs."""
    try:
        return measure(fn, input_sets)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        print(f"<!-- left out: {reason[:120]} -->")
        return None


class Report:
    """Prints tables in Markdown and keeps them for --json. A cell is a text, a number, None or a
    pair (forward, backward)."""

    def __init__(self):
        self.tables = {}

    def table(self, question, note, header, rows):
        print(f"### {question}\n{note}\n")
        print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
        for row in rows:
            print(f"| {' | '.join(map(format_cell, row))} |")
        print(flush=True)
        self.tables[question] = [dict(zip(header, row)) for row in rows]


def format_cell(value):
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return " / ".join(map(format_cell, value))
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


def rates(result, amounts, scale=1.0):
    """(forward, backward) amounts per ms of a result of measure(); None for None."""
    if result is None:
        return None
    return tuple(scale * amount / ms for amount, ms in zip(amounts, result))


def versus(rivals, ours, amounts, scale=1.0):
    """Two cells for each rival: its rate, and how many times as fast as it the kernel is."""
    cells = []
    for rival in rivals:
        faster = None
        if rival is not None:
            faster = tuple(theirs / mine for theirs, mine in zip(rival[:2], ours))
        cells += [rates(rival, amounts, scale), faster]
    return cells


def randn(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def ceilings():
    """Prints and returns what was measured where; "copy" in GB/s and "product" in TFLOP/s."""
    # Far larger than any cache: what is measured is memory.
    size = 1 << 30
    buffers = [torch.empty(size, dtype=torch.int8, device=DEVICE).random_() for _ in range(4)]
    copy = 2 * size / median_ms(torch.Tensor.copy_, [buffers[:2], buffers[2:]]) / 1e6
    matrices = [(randn(8192, 8192), randn(8192, 8192)) for _ in range(3)]
    matmul = 2 * 8192**3 / median_ms(torch.mm, matrices) / 1e9
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": kernels.triton.__version__,
        "date": str(datetime.date.today()),
        "copy": copy,
        "product": matmul,
    }
    print(
        "{gpu}, torch {torch}, Triton {triton}, {date}: copy {copy:.0f} GB/s, "
        "bf16 matrix product {product:.0f} TFLOP/s\n".format(**machine)
    )
    return machine


def sdpa(backend, causal, grouped):
    def fn(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return fn


def flex(T, causal, grouped):
    # A new compilation for every shape: after eight of them torch would silently run eagerly.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE)

    def fn(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped)

    return fn


def attention_shapes():
    """(name, B, T, H, K, D, causal) of every row."""
    for D in (128, 64):
        for causal in (False, True):
            for T in (1024, 2048, 4096, 8192, 16384):
                name = f"{T // 1024}k D{D} {'causal' if causal else 'full'}"
                yield name, 16384 // T, T, 2048 // D, 2048 // D, D, causal
    yield "ViT 577, 32 images", 32, 577, 16, 16, 64, False
    yield "4k, 32 heads on 8, causal", 4, 4096, 32, 8, 128, True


def attention_row(name, B, T, H, K, D, causal, matmul):
    gflop = 4 * B * H * T * T * D * (0.5 if causal else 1) / 1e9
    amounts = gflop, 2.5 * gflop
    input_sets = [(randn(B, T, H, D), randn(B, T, K, D), randn(B, T, K, D)) for _ in range(3)]

    ours = measure(functools.partial(kernels.attention, causal=causal), input_sets)
    backends = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    rivals = [measure_rival(sdpa(backend, causal, H != K), input_sets) for backend in backends]

    # flex_attention only for some shapes: it compiles for longer than everything else takes.
    rivals.append(None)
    if T in (577, 8192) or H != K:
        rivals[2] = measure_rival(flex(T, causal, H != K), input_sets)

    # Forward has two matrix products, backward five: it computes the scores again.
    floor = tuple(amount / matmul for amount in amounts)
    tflops, share = rates(ours, amounts), rates(ours, amounts, 100 / matmul)
    return [name, ours[:2], floor, tflops, share, *versus(rivals, ours, amounts), ours[2]]


def attention_table(report, copy, matmul):
    header = ["shape", "ms", "floor ms", "TFLOP/s", "% of product", "flash", "× flash", "cuDNN"]
    header += ["× cuDNN", "flex", "× flex", "peak GB"]
    rows = [attention_row(*shape, matmul) for shape in attention_shapes()]
    note = "Operations: 4·B·H·T²·D, half of it if causal; backward × 2.5. Rivals in TFLOP/s"
    report.table("How fast is attention?", note, header, rows)

    # Packing: each query attends to its own document of 512 tokens.
    end = torch.arange(1, 8193, dtype=torch.int32, device=DEVICE)[None]
    packed = functools.partial(kernels.attention, key_ranges=((end - 1) // 512 * 512, end))
    input_sets = [[randn(2, 8192, 16, 128) for _ in range(3)] for _ in range(3)]
    whole, parts = measure(kernels.attention, input_sets), measure(packed, input_sets)
    share = tuple(part / all_of_it for part, all_of_it in zip(parts[:2], whole))
    rows = [["causal", whole[:2], None], ["documents of 512", parts[:2], share]]
    header = ["8k D128", "ms", "time ÷ causal"]
    report.table("What does packing save?", "Two sequences of 8k tokens", header, rows)


def memory_cases():
    """(name, ours, the definition, sets of inputs, bytes moved forward, bytes moved backward)"""
    N, C, M = 16384, 5120, 13824
    size = N * C * 2
    angles = torch.rand(N, 64, device=DEVICE)

    rope, plain_rope = (
        functools.partial(fn, cos=angles, sin=angles) for fn in (kernels.rope, rope_reference)
    )

    def inputs(*shapes):
        return [[randn(*shape) for shape in shapes] for _ in range(3)]

    x, heads, wide = (N, C), (1, N, 40, 128), (N, M)
    norm, add_norm = kernels.rms_norm, kernels.add_rms_norm
    yield "rms_norm 5120", norm, rms_norm_reference, inputs(x, (C,)), 2 * size, 3 * size
    two = inputs(x, x, (C,))
    yield "add_rms_norm 5120", add_norm, add_rms_norm_reference, two, 4 * size, 4 * size
    yield "rope 40×128", rope, plain_rope, inputs(heads, heads), 4 * size, 4 * size
    size = N * M * 2
    yield "swiglu 13824", kernels.swiglu, swiglu_reference, inputs(wide, wide), 3 * size, 5 * size


def memory_table(report, copy, matmul):
    rows = []
    for name, fn, reference, input_sets, *moved in memory_cases():
        # The definition twice: as it is, and compiled
        ours, eager = measure(fn, input_sets), measure(reference, input_sets)
        compiled = torch.compile(reference, mode="max-autotune-no-cudagraphs", dynamic=False)
        rivals = eager, measure_rival(compiled, input_sets)
        floor = tuple(1e-6 * number / copy for number in moved)
        speed, share = rates(ours, moved, 1e-6), rates(ours, moved, 1e-4 / copy)
        cells = versus(rivals, ours, moved, 1e-6)
        rows.append([name, ours[:2], floor, speed, share, *cells, ours[2]])
    header = ["", "ms", "floor ms", "GB/s", "% of copy", "eager", "× eager", "compiled"]
    header += ["× compiled", "peak GB"]
    note = "Bytes: each tensor moves once. Rivals in GB/s"
    report.table("How fast are norm, RoPE and SwiGLU?", note, header, rows)


def plain_loss(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def loss_table(report, copy, matmul):
    losses = {
        "ours": kernels.linear_cross_entropy,
        "F.cross_entropy": plain_loss,
        "F.cross_entropy, compiled": torch.compile(plain_loss, dynamic=False),
    }
    rows = []
    for N in (8192, 16384):
        # Small weights, so that the losses are near log V
        input_sets = []
        for _ in range(2):
            hidden, weight = randn(N, 5120), randn(39478, 5120) * 0.02
            targets = torch.randint(39478, (N,), device=DEVICE)
            input_sets.append((hidden.requires_grad_(), weight.requires_grad_(), targets))
        flop, ours = 6 * N * 5120 * 39478 / 1e9, None
        for name, fn in losses.items():

            def step(hidden, weight, targets, fn=fn):
                return torch.autograd.grad(fn(hidden, weight, targets), (hidden, weight))

            ms = median_ms(step, input_sets)
            ours = ours or ms
            peak = peak_gb(step, *input_sets[0])
            speed = flop / ms
            share = 100 * speed / matmul
            rows.append([N, name, ms, flop / matmul, speed, share, ms / ours, peak])
    header = ["tokens", "", "ms", "floor ms", "TFLOP/s", "% of product", "time ÷ ours", "peak GB"]
    note = "Forward + backward, C 5120, V 39,478; operations: 6·N·C·V; the peak includes gradients"
    report.table("How fast is the last layer with its loss?", note, header, rows)


def decode_table(report, copy, matmul):
    rows = []
    for B, S in ((1, 4096), (8, 4096), (32, 4096), (8, 16384)):
        lengths = torch.full((B,), S, device=DEVICE)
        cache = B, S, 40, 128
        input_sets = [(randn(B, 40, 128), randn(*cache), randn(*cache), lengths) for _ in range(2)]
        ms = median_ms(kernels.attention_with_kvcache, input_sets)
        # Each key and value is read once. All else is too small to count.
        gigabytes = 4 * B * S * 5120 / 1e6  # per ms: GB/s
        speed = gigabytes / ms
        rows.append([B, S, ms, gigabytes / copy, speed, 100 * speed / copy])
    header = ["batch", "cache", "ms", "floor ms", "GB/s", "% of copy"]
    note = "One query per sequence against its cache, 40 heads of 128"
    report.table("How fast is decoding?", note, header, rows)


TABLES = {
    "attention": attention_table,
    "memory": memory_table,
    "loss": loss_table,
    "decode": decode_table,
}


def profile_training(words):
    """Runs train.py with these words, and prints the operators that take most time."""
    import train

    sys.argv = ["train.py", *words]
    with torch.profiler.profile() as profiler:
        train.main()
    device = "device" if torch.cuda.is_available() else "cpu"
    print(profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=30))


def main():
    parser = Parser(prog="python -m kernels.bench", description=__doc__)
    add, some = parser.add_argument, {"nargs": "+", "metavar": "TABLE"}
    add("--only", **some, choices=TABLES, default=list(TABLES), help="tables to measure")
    flag = argparse.BooleanOptionalAction
    add("--tests", action=flag, default=True, help="run the kernels' tests first")
    add("--json", type=flags.text, metavar="FILE", help="also write the tables to this file")
    about = "only this: a profile of train.py with the words that follow"
    add("--profile", nargs=argparse.REMAINDER, metavar="WORD", help=about)
    args = parser.parse_args()
    if args.json:
        claim_output(args.json, lambda path: "tables" in read_json(path))
    if args.profile is not None:
        return profile_training(args.profile)

    # Without a GPU only the compiler can tell something.
    if not torch.cuda.is_available():
        print("No GPU here, so there is nothing to time. What the compiler makes of the kernels:")
        if not kernels.HAVE_TRITON:
            sys.exit("triton is not installed: run `pip install triton`")
        sys.exit(subprocess.run([sys.executable, ROOT / "tests/compile_kernels.py"]).returncode)
    if kernels.INTERPRET:
        sys.exit("TRITON_INTERPRET is set, which times the interpreter: unset it")

    tests = map(str, ROOT.glob("tests/test_kernels_*.py"))
    if args.tests and subprocess.run([sys.executable, "-m", "pytest", "-q", *tests]).returncode:
        sys.exit("the kernels are wrong on this machine (--no-tests measures all the same)")
    machine, report = ceilings(), Report()
    for name in args.only:
        TABLES[name](report, machine["copy"], machine["product"])
    if args.json:
        write_json(args.json, machine | {"tables": report.tables}, indent=1)


if __name__ == "__main__":
    run_main(main, "kernels.bench")
