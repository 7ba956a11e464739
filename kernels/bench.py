"""
How fast are the kernels, and against what? One command: correctness first, then tables to paste into a document.

    python kernels/bench.py                 # on a GPU: all tests, then all tables; some minutes, most of them compiling
    python kernels/bench.py --no-tests --only attention

Without a GPU it says what it would measure and prints what the compiler makes of every kernel (tests/compile_kernels.py).
The ceilings, a large copy and a large bf16 matrix product, are measured in the same run, and % is of those. Times are medians of
GPU events over rotating random inputs, with the L2 cache flushed in between: zeros run faster than data, and caches flatter.
"""
import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: `import kernels` must find the package
os.environ.pop("TRITON_INTERPRET", None)
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernels
from kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from kernels.rope import rope_reference
from kernels.swiglu import swiglu_reference

torch._functorch.config.donated_buffer = False  # a compiled rival's backward is run again and again on one forward
DEVICE = "cuda"
PLAN = """no GPU here. On one, this measures: attention forward and backward (1k … 16k tokens, head dims 64 and 128, causal, full, packed
documents, grouped heads, a vision transformer's 577) against torch's flash and cuDNN attention and flex_attention; RMSNorm, RoPE, SwiGLU against
eager and torch.compile; linear cross-entropy against F.cross_entropy; decoding against the copy bandwidth. Here, the compiler's view:"""


def milliseconds(fn, sets, repeats=20):
    """Median time of fn(*inputs) over rotating input sets."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    times = []
    for n in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the CPU queues what follows: its own slowness is not measured
        start.record()
        fn(*sets[n % len(sets)])
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in times[3:])[repeats // 2]


def gigabytes(fn, *inputs):
    """What fn takes at its peak beyond what is there already, its results included."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn(*inputs)
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def forward_graph(fn, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    return out, inputs, [torch.randn_like(o) for o in out]


def backward(out, inputs, ups):
    return torch.autograd.grad(out, inputs, ups, retain_graph=True)


def both(fn, sets):
    """-> forward ms, backward ms, peak GB of the two"""
    with torch.no_grad():
        forward = milliseconds(fn, sets)
    back = milliseconds(backward, [forward_graph(fn, *inputs) for inputs in sets])
    return forward, back, gigabytes(lambda *inputs: backward(*forward_graph(fn, *inputs)), *sets[0])


def rival(fn, sets):
    """both(), or nothing where the rival does not take these inputs."""
    try:
        return both(fn, sets)
    except (RuntimeError, ValueError, AssertionError) as error:
        print(f"<!-- left out: {(str(error) or repr(error)).splitlines()[0][:120]} -->")
        return None


def pair(a, b, scale=1.0):
    return f"{scale * a:.3g} / {scale * b:.3g}" if max(a, b) * scale < 100 else f"{scale * a:.0f} / {scale * b:.0f}"


def show(header, rows):
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        cells = ("–" if c is None else f"{c:.3g}" if isinstance(c, float) and c < 100 else f"{c:.0f}" if isinstance(c, float) else str(c) for c in row)
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def ceilings():
    x = [(torch.empty(1 << 30, dtype=torch.int8, device=DEVICE).random_(), torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)) for _ in range(2)]
    copy = 2 * (1 << 30) / milliseconds(lambda a, b: b.copy_(a), x) / 1e6
    matmul = 2 * 8192 ** 3 / milliseconds(torch.mm, [(randn(8192, 8192), randn(8192, 8192)) for _ in range(3)]) / 1e9
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {kernels.triton.__version__}, {datetime.date.today()}: "
          f"copy {copy:.0f} GB/s, bf16 matrix product {matmul:.0f} TFLOP/s\n")
    return copy, matmul


def sdpa(backend, causal, G):
    def fn(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=G > 1)
    return fn


def flex(T, causal, G):
    torch._dynamo.reset()  # compiled for every shape anew; after eight of them torch would fall back to eager without a word
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE) if causal else None
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=G > 1)


def attention_table(copy, matmul):
    print("### Attention, forward / backward (operations: 4·B·H·T²·D, half of it if causal; backward × 2.5)\n")
    shapes = [(f"{T // 1024}k D{D} {'causal' if c else 'full'}", 16384 // T, T, 2048 // D, 2048 // D, D, c)
              for D in (128, 64) for c in (False, True) for T in (1024, 2048, 4096, 8192, 16384)]
    shapes += [("ViT 577, 32 pictures", 32, 577, 16, 16, 64, False), ("4k, 32 heads on 8, causal", 4, 4096, 32, 8, 128, True)]
    rows = []
    for name, B, T, H, K, D, causal in shapes:
        flops = 4 * B * H * T * T * D * (0.5 if causal else 1) / 1e9
        speed = lambda times, flops=flops: None if times is None else pair(flops / times[0], 2.5 * flops / times[1])  # noqa: E731
        sets = [(randn(B, T, H, D), randn(B, T, K, D), randn(B, T, K, D)) for _ in range(3)]
        ours = both(lambda q, k, v, c=causal: kernels.attention(q, k, v, causal=c), sets)
        flash, cudnn = (rival(sdpa(b, causal, H // K), sets) for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION))
        flexed = rival(flex(T, causal, H // K), sets) if T in (577, 8192) or H != K else None  # its compilations are most of the time
        share = pair(flops / ours[0], 2.5 * flops / ours[1], 100 / matmul)
        rows.append([name, pair(*ours[:2]), speed(ours), share, ours[2], speed(flash), speed(cudnn), speed(flexed)])
    show(["shape", "ms", "TFLOP/s", "% of matrix product", "peak GB", "flash TFLOP/s", "cuDNN TFLOP/s", "flex TFLOP/s"], rows)
    sets = [(randn(2, 8192, 16, 128), randn(2, 8192, 16, 128), randn(2, 8192, 16, 128)) for _ in range(3)]
    docs = kernels.rows_from_docs((torch.arange(8192, device=DEVICE) // 512).expand(2, -1))
    causal, packed = both(kernels.attention, sets), both(lambda q, k, v: kernels.attention(q, k, v, rows=docs), sets)
    print(f"Packed documents of 512 in 8k: {packed[0] / causal[0]:.2f}× of causal forward, {packed[1] / causal[1]:.2f}× backward\n")


def memory_table(copy, matmul):
    print("### Norm, RoPE, SwiGLU, forward / backward (bytes: each tensor moves once)\n")
    N, C = 16384, 5120
    x, angles = N * C * 2, torch.rand(N, 64, device=DEVICE)
    cases = [("rms_norm 5120", kernels.rms_norm, rms_norm_reference, lambda: (randn(N, C), randn(C)), 2 * x, 3 * x),
             ("add_rms_norm 5120", kernels.add_rms_norm, add_rms_norm_reference, lambda: (randn(N, C), randn(N, C), randn(C)), 4 * x, 4 * x),
             ("rope 40×128", lambda q, k: kernels.rope(q, k, angles, angles), lambda q, k: rope_reference(q, k, angles, angles),
              lambda: (randn(1, N, 40, 128), randn(1, N, 40, 128)), 4 * x, 4 * x),
             ("swiglu 13824", kernels.swiglu, swiglu_reference, lambda: (randn(N, 13824), randn(N, 13824)), 3 * N * 13824 * 2, 5 * N * 13824 * 2)]
    rows = []
    for name, fn, reference, make, moved, moved_back in cases:
        sets = [make() for _ in range(3)]
        ours, eager = both(fn, sets), both(reference, sets)
        compiled = rival(torch.compile(reference, mode="max-autotune-no-cudagraphs", dynamic=False), sets)
        speed = lambda t, m=moved, mb=moved_back, unit=1e-6: None if t is None else pair(m / t[0], mb / t[1], unit)  # noqa: E731
        rows.append([name, pair(*ours[:2]), speed(ours), speed(ours, unit=1e-4 / copy), ours[2], speed(eager), speed(compiled)])
    show(["", "ms", "GB/s", "% of copy", "peak GB", "eager GB/s", "compiled GB/s"], rows)


def loss_table(copy, matmul):
    print("### Linear cross-entropy, forward + backward, C 5120, V 39,478 (operations: 6·N·C·V; peak: gradients included)\n")
    plain = lambda x, w, t: F.cross_entropy((x @ w.T).float(), t)  # noqa: E731
    rows = []
    for N in (8192, 16384):
        sets = [(randn(N, 5120).requires_grad_(), (randn(39478, 5120) * 0.02).requires_grad_(), torch.randint(39478, (N,), device=DEVICE))
                for _ in range(2)]
        rivals = ("F.cross_entropy", plain), ("F.cross_entropy, compiled", torch.compile(plain, dynamic=False))
        for name, fn in (("ours", kernels.linear_cross_entropy), *rivals):
            step = lambda x, w, t, fn=fn: torch.autograd.grad(fn(x, w, t), (x, w))  # noqa: E731
            ms = milliseconds(step, sets)
            speed = 6 * N * 5120 * 39478 / ms / 1e9
            rows.append([N, name, ms, speed, 100 * speed / matmul, gigabytes(step, *sets[0])])
    show(["tokens", "", "ms", "TFLOP/s", "% of matrix product", "peak GB"], rows)


def decode_table(copy, matmul):
    print("### Decoding: one query a sequence against its cache, 40 heads of 128\n")
    rows = []
    for B, S in ((1, 4096), (8, 4096), (32, 4096), (8, 16384)):
        sets = [(randn(B, 40, 128), randn(B, S, 40, 128), randn(B, S, 40, 128), torch.full((B,), S, device=DEVICE)) for _ in range(2)]
        ms = milliseconds(kernels.attend_cache, sets)
        speed = 4 * B * S * 5120 / ms / 1e6
        rows.append([B, S, ms, speed, 100 * speed / copy])
    show(["batch", "cache", "ms", "GB/s", "% of copy"], rows)


TABLES = {"attention": attention_table, "memory": memory_table, "loss": loss_table, "decode": decode_table}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="which tables")
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True, help="run the kernels' tests first")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(PLAN, flush=True)
        if not kernels.HAVE_TRITON:
            sys.exit("triton is not installed: nothing to compile")
        sys.exit(subprocess.run([sys.executable, ROOT / "tests/compile_kernels.py"]).returncode)
    if args.tests and subprocess.run([sys.executable, "-m", "pytest", "-q", *map(str, ROOT.glob("tests/test_kernels_*.py"))]).returncode:
        sys.exit("the kernels are wrong on this machine: no timings (--no-tests measures all the same)")
    measured = ceilings()
    for name in args.only:
        TABLES[name](*measured)
