import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_compile_for_hopper_without_spills():
    """One mask and the widest kernels; the whole table takes minutes (tests/compile_kernels.py)."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "compile_kernels.py"
    only = "attention D128 ranges|norm 5120|swiglu|cross-entropy 39478"
    command = [sys.executable, script, "--arch", "90", "--only", only]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
