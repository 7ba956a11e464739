import subprocess
import sys
from pathlib import Path

import pytest

# Tensors without contents, a clock that stands at 2 ms and compilers that compile nothing: what is left is the script
STUB = """
import types, torch
import kernels.bench as bench
Event = types.SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 2.0)
for name, value in dict(Event=lambda **kind: Event, _sleep=lambda cycles: None, synchronize=lambda: None, reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 0,
                        max_memory_allocated=lambda: 3 * 10 ** 9, get_device_name=lambda: "a stub", is_available=lambda: True).items():
    setattr(torch.cuda, name, value)
torch.compile, torch.is_autocast_enabled = lambda fn, **options: fn, lambda device: False
bench.DEVICE, bench.kernels._choice = "meta", "triton"
bench.create_block_mask = lambda *args, **kind: None
bench.flex_attention = lambda q, k, v, block_mask, enable_gqa: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)
measured = bench.ceilings()
for table in bench.TABLES.values():
    table(*measured)
"""


def test_every_table_is_made():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", STUB], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out" not in done.stdout, "a rival was refused"
    copy, product = 2 * 2 ** 30 / 2e6, 2 * 8192 ** 3 / 2e9
    assert f"copy {copy:.0f} GB/s, bf16 matrix product {product:.0f} TFLOP/s" in done.stdout
    forward = 4 * 8192 ** 2 * 16 * 128 * 2 / 2e9  # two sequences of 8k, 16 heads of 128, in 2 ms
    row = next(line for line in done.stdout.splitlines() if line.startswith("| 8k D128 full"))
    assert row == f"| 8k D128 full | 2 / 2 | {forward:.0f} / {2.5 * forward:.0f} | {100 * forward / product:.3g} / {250 * forward / product:.3g} | 3 |" + f" {forward:.0f} / {2.5 * forward:.0f} |" * 3
    assert done.stdout.count("\n| ") == 22 + 4 + 6 + 4 + 4, "the rows of four tables, and their headers"
