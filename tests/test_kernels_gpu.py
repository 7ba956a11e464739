"""What only a GPU can show: the bf16 tiles as they are shipped, races (reruns must be equal to the
bit), long sequences, tensors of more than 2³¹ elements, and a second ptxas. The other kernel tests
run on a GPU as well when there is one."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from kernel_checks import agree, document_ranges, guarded, results, triton_kernels, window_ranges  # noqa: F401
from test_kernels_attention import GRID, mask, qkv

import kernels
from kernels import (
    add_rms_norm,
    attention,
    attention_with_kvcache,
    linear_cross_entropy,
    rope,
    swiglu,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16
HUGE = 2**31 + 2**20
CE = sys.modules["kernels.cross_entropy"]


def needs(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def all_equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others))


@pytest.mark.parametrize("T,D,H,K,name", GRID)
def test_attention_in_bf16_with_the_tiles_of_this_gpu(T, D, H, K, name):
    agree(attention, qkv(2, T, T, H, K, D, BF16), **mask(name, 2, T))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("D", [64, 128])
def test_twenty_seeds_are_right_and_reruns_equal_to_the_bit(D, seed):
    torch.manual_seed(seed)
    inputs, documents = qkv(4, 1000, 1000, 8, 2, D, BF16), mask("docs", 4, 1000)
    first = agree(attention, inputs, **documents)
    for _ in range(3):
        assert all_equal(first, results(attention, inputs, **documents))


def test_reruns_of_the_other_kernels_are_equal_to_the_bit(monkeypatch):
    shapes = (4096, 1024), (4096, 1024), (1024,), (39478, 1024)
    x, r, gain, w = (guarded(*shape, dtype=BF16) for shape in shapes)
    targets = torch.randint(39478, (4096,), device="cuda")
    monkeypatch.setattr(CE, "CHUNK_BYTES", 1 << 26)
    for op, inputs, *rest in (
        (add_rms_norm, [x, r, gain]),
        (swiglu, [x, r]),
        (linear_cross_entropy, [x, w], targets),
    ):
        first = results(op, inputs, *rest)
        for _ in range(5):
            assert all_equal(first, results(op, inputs, *rest))


@pytest.mark.parametrize("causal", [True, False])
def test_sixteen_thousand_tokens(causal):
    needs(60)  # the definition in float64 and the yardstick hold the scores
    agree(attention, qkv(1, 16384, 16384, 1, 1, 128, BF16), causal=causal)


def far(*shape):
    """(2, …) in bf16 whose second half lies 2³¹ elements behind the first."""
    memory = torch.zeros(HUGE, dtype=BF16, device="cuda")
    x = memory.as_strided((2, *shape), (2**31, *torch.empty(shape, device="meta").stride()))
    return x.copy_(torch.randn(2, *shape, device="cuda"))


def near(x):
    """The same a few elements apart; not contiguous either, so that the same tiles are chosen."""
    return torch.stack((x[0], x[0], x[1]))[::2]


def test_offsets_past_two_to_the_31_are_right():
    needs(60)
    q, k, v = far(128, 2, 64), far(128, 2, 64), far(128, 2, 64)
    x, r = far(1, 5120), far(1, 5120)
    gain = torch.randn(5120, dtype=BF16, device="cuda")
    cos, sin = torch.rand(2, 128, 32, device="cuda")
    for op, inputs, *rest in (
        (attention, [q, k, v]),
        (rope, [q, k], cos, sin),
        (lambda x, r: add_rms_norm(x, r, gain), [x, r]),
        (swiglu, [x, r]),
    ):
        expected = results(op, [near(x) for x in inputs], *rest)
        assert all_equal(expected, results(op, inputs, *rest))

    lengths = torch.tensor([128, 100], device="cuda")
    ours = attention_with_kvcache(q[:, 0], k, v, lengths)
    assert torch.equal(ours, attention_with_kvcache(near(q)[:, 0], near(k), near(v), lengths))


def test_more_than_two_to_the_31_elements_through_descriptors():
    needs(60)
    B, T, H, D = HUGE // (1024 * 16 * 128) + 1, 1024, 16, 128
    q = torch.randn(B, T, H, D, dtype=BF16, device="cuda").requires_grad_()
    ranges = window_ranges(T, 64)
    o = attention(q, q, q, key_ranges=ranges)
    (grad,) = torch.autograd.grad(o, q, q)
    last = q[-1:].detach().clone().requires_grad_()
    o_last = attention(last, last, last, key_ranges=ranges)
    (grad_last,) = torch.autograd.grad(o_last, last, last)
    assert torch.equal(o[-1:], o_last) and torch.equal(grad[-1:], grad_last)


def chain(q, k, x, r, gain, w, targets, angles):
    """All kernels in a row, on packed documents of 50 tokens."""
    end = torch.arange(1, q.shape[1] + 1, dtype=torch.int32, device="cuda")[None]
    q, k = rope(q, k, angles, angles)
    o = attention(q, k, k, key_ranges=((end - 1) // 50 * 50, end)).flatten(2)[0]
    y, total = add_rms_norm(o + x, r, gain)
    return linear_cross_entropy(swiglu(y, total), w, targets)


@pytest.fixture
def chain_inputs():
    shapes = (1, 200, 2, 64), (1, 200, 2, 64), (200, 128), (200, 128), (128,), (1000, 128)
    inputs = [torch.randn(*s, dtype=BF16, device="cuda").requires_grad_() for s in shapes]
    return [*inputs, torch.arange(200, device="cuda"), torch.rand(200, 32, device="cuda")]


def test_the_automatic_choice_compiles_into_one_graph(chain_inputs):
    kernels.set_kernels("auto")
    eager = torch.autograd.grad(chain(*chain_inputs), chain_inputs[:6])
    compiled = torch.compile(chain, fullgraph=True)
    for a, b in zip(eager, torch.autograd.grad(compiled(*chain_inputs), chain_inputs[:6])):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=1e-3)


def test_nothing_waits_for_the_gpu(chain_inputs):
    torch.autograd.grad(chain(*chain_inputs), chain_inputs[:6])
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(chain(*chain_inputs), chain_inputs[:6])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_ptxas_gives_right_results_too(tmp_path):
    """Triton brings a ptxas of its own; faults of one version are known (triton#9433)."""
    ptxas = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
    if not os.path.exists(ptxas):
        pytest.skip("no second ptxas: pip install nvidia-cuda-nvcc, and put its bin on the PATH")
    env = os.environ | {
        "TRITON_PTXAS_PATH": ptxas,
        "TRITON_PTXAS_BLACKWELL_PATH": ptxas,
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "seeds or reruns"], env=env, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout[-3000:]
