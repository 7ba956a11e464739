"""Without a GPU the Triton kernels are tested inside Triton's interpreter, which has to be asked for before triton is imported."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the interpreter multiplies with numpy: threads on small tiles cost 5–13×
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
