"""Which device and precision a run uses, and what GPUs reach. Imports nothing of the project."""

import re
import sys
from functools import cache

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "bf16", "fp32")

# Part of the device's name: (dense bf16 TFLOP/s with fp32 sums, GiB), by NVIDIA's data sheets. The
# first that fits counts: longer names come first. The T4's is fp16: it has no bf16.
# fmt: off
GPUS = {
    "B200": (2250, 180), "GH200": (989, 96), "H200": (989, 141), "H100 PCIe": (756, 80),
    "H100 NVL": (835, 94), "H100": (989, 80), "A100": (312, 80), "L40S": (362, 48),
    "A6000": (155, 48), "L4": (121, 24), "A10G": (70, 24), "A10": (125, 24), "T4": (65, 16),
    "RTX 5090": (209, 32), "RTX 5080": (113, 16),
    "RTX 5070 Ti": (88, 16), "RTX 5070": (62, 12), "RTX 4090": (165, 24),
    "RTX 4080 SUPER": (104, 16), "RTX 4080": (97, 16), "RTX 4070 Ti SUPER": (88, 16),
    "RTX 4070 Ti": (80, 12), "RTX 4070 SUPER": (71, 12), "RTX 4070": (58, 12),
    "RTX 4060 Ti": (44, 16), "RTX 4060": (30, 8), "RTX 3090 Ti": (80, 24), "RTX 3090": (71, 24),
    "RTX 3080 Ti": (68, 12), "RTX 3080": (59, 10), "RTX 3070": (41, 8), "RTX 3060 Ti": (32, 8),
    "RTX 3060": (25, 12),
}
# fmt: on


def pick_device(name: str = "auto") -> torch.device:
    """auto: a CUDA GPU or else the CPU; not Apple's mps, on which nothing is tested."""
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    is_missing = {"cuda": not has_cuda, "mps": not torch.backends.mps.is_available()}
    if is_missing.get(name):
        raise ValueError(f"--device {name}: PyTorch finds none here; --device cpu always works")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. auto: bfloat16 where the hardware has it, else float32."""
    if name == "bf16" and device.type == "mps":
        raise ValueError("--precision bf16: not supported with --device mps, use fp32")
    if name == "bf16" and not has_bf16(device):
        say_once(f"--precision bf16: this {device.type} imitates it; fp32 is many times faster")
    if name == "bf16" or (name == "auto" and has_bf16(device)):
        return torch.bfloat16
    return torch.float32


@cache
def say_once(text):
    print(text, file=sys.stderr)


def has_bf16(device):
    """Whether the hardware multiplies bfloat16. Of CPUs: AMD's from Zen 4 on, Intel's with AMX."""
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() is true for older GPUs, too, which emulate it slowly.
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def peak_flops(device):
    """The bf16 FLOP/s that a GPU can reach; None for a device that is not in the table."""
    if device.type == "cuda":
        for name, (teraflops, _) in GPUS.items():
            if re.search(rf"\b{name}\b", torch.cuda.get_device_name(device)):
                return teraflops * 1e12
    return None
