import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Tensors without contents, a clock that stands at 2 ms and compilers that compile nothing: what
# runs is the script itself.
STUB = """
import types

import torch

import kernels.bench as bench

event = types.SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 2.0)
stubs = {
    "Event": lambda **options: event,
    "_sleep": lambda cycles: None,
    "synchronize": lambda: None,
    "reset_peak_memory_stats": lambda: None,
    "memory_allocated": lambda: 0,
    "max_memory_allocated": lambda: 3 * 10**9,
    "get_device_name": lambda: "a stub",
    "is_available": lambda: True,
}
for name, value in stubs.items():
    setattr(torch.cuda, name, value)
torch.compile = lambda fn, **options: fn
torch.is_autocast_enabled = lambda device: False


def flex_attention(q, k, v, block_mask, enable_gqa):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)


bench.DEVICE, bench.kernels._choice = "meta", "triton"
bench.kernels.Operator.__call__ = lambda self, *args: self.custom(*args)
bench.create_block_mask = lambda *args, **options: None
bench.flex_attention = flex_attention
bench.sys.argv = ["bench", "--no-tests", "--json", bench.sys.argv[1]]
bench.main()
"""


def run_python(code, interpret, *words):
    env = os.environ | {"TRITON_INTERPRET": "1"}
    if not interpret:
        del env["TRITON_INTERPRET"]
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, encoding="utf-8")


def test_every_table_is_made(tmp_path):
    pytest.importorskip("triton")
    done = run_python(STUB, False, tmp_path / "new" / "bench.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out" not in done.stdout, "a rival was refused"
    copy, product = 2 * 2**30 / 2e6, 2 * 8192**3 / 2e9
    assert f"copy {copy:.0f} GB/s, bf16 matrix product {product:.0f} TFLOP/s" in done.stdout

    # Two sequences of 8k, 16 heads of 128, in 2 ms; at 550 TFLOP/s they would take 2 and 5 ms.
    gflop = 4 * 8192**2 * 16 * 128 * 2 / 1e9
    speed = f"{gflop / 2:.0f} / {2.5 * gflop / 2:.0f}"
    floor = f"{gflop / product:.3g} / {2.5 * gflop / product:.3g}"
    share = f"{50 * gflop / product:.0f} / {125 * gflop / product:.0f}"
    row = next(line for line in done.stdout.splitlines() if line.startswith("| 8k D128 full"))
    rival = f"{speed} | 1 / 1"
    assert row == (
        f"| 8k D128 full | 2 / 2 | {floor} | {speed} | {share} | {rival} | {rival} | {rival} | 3 |"
    )
    assert done.stdout.count("\n| ") == 22 + 2 + 4 + 6 + 4 + 5, "the rows of five tables, headers"

    # The same for programs
    found = json.loads((tmp_path / "new" / "bench.json").read_text(encoding="utf-8"))
    assert found["gpu"] == "a stub" and found["product"] == product
    (row,) = (r for r in found["tables"]["How fast is attention?"] if r["shape"] == "8k D128 full")
    assert row["ms"] == [2, 2] and row["× flash"] == [1, 1] and row["peak GB"] == 3
    assert [len(rows) for rows in found["tables"].values()] == [22, 2, 4, 6, 4]


AS_A_MODULE = """
import runpy

import torch

torch.cuda.is_available = lambda: True
runpy.run_module("kernels.bench", run_name="__main__")
"""


def test_the_interpreter_is_not_timed():
    pytest.importorskip("triton")
    done = run_python(AS_A_MODULE, interpret=True)
    assert done.returncode == 1 and "TRITON_INTERPRET" in done.stderr, done.stderr
