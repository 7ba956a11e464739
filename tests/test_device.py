"""Which device and precision a run takes, on machines that are simulated."""

import pytest
import torch

from kernels.device import pick_device, pick_precision, say_once

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def machine(monkeypatch):
    """Simulates a machine: the compute capability of its GPU, its CPU's features, an Apple GPU."""

    def simulate(capability=None, cpu=(), mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        # On a T4 PyTorch says True: it emulates bfloat16.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(cpu, True))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return simulate


@pytest.mark.parametrize(
    "capability, dtype",
    [
        ((7, 5), torch.float32),  # T4
        ((7, 0), torch.float32),  # V100
        ((8, 0), torch.bfloat16),  # A100
        ((9, 0), torch.bfloat16),  # H100
        ((12, 0), torch.bfloat16),  # RTX 5090
    ],
)
def test_a_gpu_takes_bf16_where_the_hardware_has_it(machine, capability, dtype):
    machine(capability=capability)
    assert pick_device("auto") == pick_device("cuda") == CUDA
    assert pick_precision("auto", CUDA) == dtype
    assert pick_precision("fp32", CUDA) == torch.float32
    assert pick_precision("bf16", CUDA) == torch.bfloat16


@pytest.mark.parametrize(
    "cpu, dtype",
    [
        (("avx2", "avx512_bf16"), torch.bfloat16),
        (("avx2", "amx_bf16"), torch.bfloat16),
        (("avx2", "avx512_f"), torch.float32),
        ((), torch.float32),
    ],
)
def test_a_cpu_takes_bf16_where_it_has_the_instructions(machine, capsys, cpu, dtype):
    machine(cpu=cpu)
    say_once.cache_clear()
    assert pick_device("auto") == CPU
    assert pick_precision("auto", CPU) == dtype
    assert capsys.readouterr().err == ""

    # Asked for, it is taken; that it is slow is said once.
    assert pick_precision("bf16", CPU) == pick_precision("bf16", CPU) == torch.bfloat16
    assert capsys.readouterr().err.count("this cpu imitates it") == (dtype == torch.float32)


def test_apples_gpu_is_taken_on_request_only_and_in_fp32(machine):
    machine(mps=True)
    assert pick_device("auto") == CPU
    assert pick_device("mps") == MPS
    assert pick_precision("auto", MPS) == pick_precision("fp32", MPS) == torch.float32
    with pytest.raises(ValueError, match="--precision bf16: not supported with --device mps"):
        pick_precision("bf16", MPS)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_in_one_line(machine, name):
    machine()
    with pytest.raises(ValueError, match=f"--device {name}: PyTorch finds none") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


def test_the_cpu_can_be_chosen_on_a_machine_with_a_gpu(machine):
    machine(capability=(9, 0))
    assert pick_device("cpu") == CPU
