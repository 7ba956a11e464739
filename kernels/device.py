"""Which device and which precision a run uses. Imports nothing of the project."""

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "bf16", "fp32")


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
    if name == "bf16" or (name == "auto" and has_bf16(device)):
        return torch.bfloat16
    return torch.float32


def has_bf16(device):
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() is true for older GPUs, too, which emulate it slowly.
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
