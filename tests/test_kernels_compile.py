import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_kernels_compile_for_hopper_without_spills():
    """One mask and the widest kernels; the whole table takes minutes (tests/compile_kernels.py)."""
    pytest.importorskip("triton")
    only = "attention D128 ranges|norm 5120|swiglu|cross-entropy 39478"
    command = [sys.executable, TESTS / "compile_kernels.py", "--arch", "90", "--only", only]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


TWO_SHAPES = """
import compile_kernels as c

c.triton.runtime.driver.set_active(c.StubDriver(90))
hashes = []
for T, H, K in ((2048, 16, 8), (77, 3, 1)):
    q, k, ranges = c.meta(1, T, H, 64), c.meta(1, T, K, 64), c.meta(1, T, dtype=c.torch.int32)
    launch = lambda: c.ATTENTION._launch_forward(q, k, k, True, ranges, ranges)
    hashes += [kernel.hash for _, kernel in c.collect(launch)]
print(len(hashes), len(set(hashes)))
"""


def test_a_new_length_causes_no_compilation():
    pytest.importorskip("triton")
    env = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", TWO_SHAPES], capture_output=True, encoding="utf-8", env=env
    )
    assert done.stdout.split() == ["2", "1"], done.stdout + done.stderr
