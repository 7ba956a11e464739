"""What only a GPU can show: bf16 tiles as they are shipped, races (reruns must be equal to the bit), long sequences, tensors of more than
2³¹ elements, and a second ptxas. The other kernel tests run on a GPU as well when there is one."""
import os
import shutil
import subprocess
import sys

import pytest
import torch
from kernel_checks import guarded, run, triton_kernels  # noqa: F401
from test_kernels_attention import GRID, attends, mask, qkv

import kernels
from kernels import add_rms_norm, attend_cache, attention, linear_cross_entropy, rope, rows_from_docs, rows_window, swiglu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16
HUGE = 2 ** 31 + 2 ** 20


def needs(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


@pytest.mark.parametrize("T,D,H,K,name", GRID)
def test_attention_in_bf16_with_the_tiles_of_this_gpu(T, D, H, K, name):
    attends(lambda *x: attention(*x, **mask(name, 2, T)), qkv(2, T, T, H, K, D, BF16))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("D", [64, 128])
def test_twenty_seeds_are_right_and_reruns_equal_to_the_bit(D, seed):
    torch.manual_seed(seed)
    inputs = qkv(4, 1000, 1000, 8, 2, D, BF16)
    first = attends(lambda *x: attention(*x, **mask("docs", 4, 1000)), inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run("triton", lambda *x: attention(*x, **mask("docs", 4, 1000)), inputs)))


def test_reruns_of_the_other_kernels_are_equal_to_the_bit():
    x, r, gain, w = (guarded(*shape, dtype=BF16) for shape in ((4096, 1024), (4096, 1024), (1024,), (39478, 1024)))
    target = torch.randint(39478, (4096,), device="cuda")
    for fn, inputs in ((add_rms_norm, [x, r, gain]), (swiglu, [x, r]), (lambda x, w: linear_cross_entropy(x, w, target, chunk_bytes=1 << 26), [x, w])):
        first = run("triton", fn, inputs)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, run("triton", fn, inputs)))


@pytest.mark.parametrize("causal", [True, False])
def test_sixteen_thousand_tokens(causal):
    needs(40)  # the float64 definition holds the scores
    attends(lambda *x: attention(*x, causal=causal), qkv(1, 16384, 16384, 1, 1, 128, BF16))


def far(*shape):
    """(2, …) in bf16 whose second half lies 2³¹ elements behind the first."""
    memory = torch.zeros(HUGE, dtype=BF16, device="cuda")
    x = memory.as_strided((2, *shape), (2 ** 31, *torch.empty(shape, device="meta").stride()))
    return x.copy_(torch.randn(2, *shape, device="cuda"))


def near(x):
    """The same a few elements apart; not contiguous either, so that the same tiles are chosen."""
    return torch.stack((x[0], x[0], x[1]))[::2]


def test_offsets_past_two_to_the_31_are_right():
    needs(60)
    q, k, v, x, r = far(128, 2, 64), far(128, 2, 64), far(128, 2, 64), far(1, 5120), far(1, 5120)
    lengths, gain, (cos, sin) = torch.tensor([128, 100], device="cuda"), torch.randn(5120, dtype=BF16, device="cuda"), torch.rand(2, 128, 32, device="cuda")
    for fn, inputs in ((attention, [q, k, v]), (lambda q, k: rope(q, k, cos, sin), [q, k]), (lambda x, r: add_rms_norm(x, r, gain), [x, r]), (swiglu, [x, r])):
        assert all(torch.equal(a, b) for a, b in zip(run("triton", fn, inputs), run("triton", fn, [near(x) for x in inputs])))
    assert torch.equal(attend_cache(q[:, 0], k, v, lengths), attend_cache(near(q)[:, 0], near(k), near(v), lengths))


def test_more_than_two_to_the_31_elements_through_descriptors():
    needs(60)
    B, T, H, D = HUGE // (1024 * 16 * 128) + 1, 1024, 16, 128
    q = torch.randn(B, T, H, D, dtype=BF16, device="cuda").requires_grad_()
    rows = tuple(r.to("cuda") for r in rows_window(T, 64))
    o = attention(q, q, q, rows=rows)
    grad, = torch.autograd.grad(o, q, q)
    last = q[-1:].detach().clone().requires_grad_()
    o_last = attention(last, last, last, rows=rows)
    assert torch.equal(o[-1:], o_last) and torch.equal(grad[-1:], torch.autograd.grad(o_last, last, last)[0])


def step(q, k, x, r, gain, w, target, angles):
    """All kernels in a row."""
    doc_ids = torch.arange(q.shape[1], device="cuda")[None] // 50
    o = attention(*rope(q, k, angles, angles), k, rows=rows_from_docs(doc_ids)).flatten(2)[0]
    y, total = add_rms_norm(o + x, r, gain)
    return linear_cross_entropy(swiglu(y, total), w, target)


@pytest.fixture
def step_inputs():
    shapes = (1, 200, 2, 64), (1, 200, 2, 64), (200, 128), (200, 128), (128,), (1000, 128)
    return [*(torch.randn(*s, dtype=BF16, device="cuda").requires_grad_() for s in shapes), torch.arange(200, device="cuda"), torch.rand(200, 32, device="cuda")]


def test_the_automatic_choice_compiles_into_one_graph(step_inputs):
    kernels.set_kernels("auto")
    eager = torch.autograd.grad(step(*step_inputs), step_inputs[:6])
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(*step_inputs), step_inputs[:6])
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=1e-3)


def test_nothing_waits_for_the_gpu(step_inputs):
    torch.autograd.grad(step(*step_inputs), step_inputs[:6])
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(step(*step_inputs), step_inputs[:6])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_ptxas_gives_right_results_too(tmp_path):
    """Triton brings a ptxas of its own; faults of one version are known (triton#9433)."""
    ptxas = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
    if not os.path.exists(ptxas):
        pytest.skip("no second ptxas: pip install nvidia-cuda-nvcc, and put its bin folder on the PATH")
    env = os.environ | {"TRITON_PTXAS_PATH": ptxas, "TRITON_PTXAS_BLACKWELL_PATH": ptxas, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "seeds or reruns"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
