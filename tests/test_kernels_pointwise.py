import sys

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, Roomy, agree, guarded, run, triton_kernels  # noqa: F401

import kernels
from kernels import add_rms_norm, linear_cross_entropy, rms_norm, rope, swiglu

CE, RMS = sys.modules["kernels.cross_entropy"], sys.modules["kernels.rms_norm"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,C", [(1, 1), (3, 7), (5, 64), (9, 130), (3, 4096), (4, 5120), (1, 13824)])
def test_rms_norm(rows, C, dtype):
    x, r, w = guarded(rows, C, dtype=dtype), guarded(rows, C, dtype=dtype), guarded(C, dtype=dtype)
    agree(rms_norm, [x, w])
    agree(add_rms_norm, [x, r, w])
    wide = guarded(rows, 2 * C, dtype=dtype)
    agree(rms_norm, [wide[:, :C], w])
    agree(lambda a, b, w: add_rms_norm(a, b, w, 1e-2), [wide[:, C:], r, w])


def test_the_norm_of_a_sum_sees_it_as_the_next_layer_does():
    x, r, w = (guarded(*shape, dtype=torch.float16) for shape in ((5, 64), (5, 64), (64,)))
    y, total = add_rms_norm(x, r, w)
    assert torch.equal(total, x + r) and torch.equal(y, rms_norm(total, w))


def test_a_rounded_branch_added_to_the_float32_stream_leaves_it_float32():
    """What autocast brings: the sum has the stream's dtype and its digits, and each gradient the dtype of what it belongs to."""
    x, r, w = guarded(5, 24, dtype=torch.bfloat16), guarded(5, 24), guarded(24)
    kernel, plain = [], []
    for function, seen in ((add_rms_norm, kernel), (RMS.add_rms_norm_reference, plain)):
        inputs = [t.detach().clone().requires_grad_() for t in (x, 100 * r, w)]
        y, total = function(*inputs)
        (y.square().sum() + total.sum()).backward()
        seen += [y, total, *(t.grad for t in inputs)]
    assert [t.dtype for t in kernel] == [t.dtype for t in plain] == [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(kernel[1], plain[1])
    for got, wanted in zip(kernel, plain):
        torch.testing.assert_close(got, wanted, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_incoming_gradients_may_have_any_strides():
    """The gradient of a concatenation is a slice of a wider tensor."""
    x, r, w, heads, angles = guarded(5, 24), guarded(5, 24), guarded(24), guarded(2, 3, 2, 8), torch.rand(3, 4, device=DEVICE)
    agree(lambda x, w: torch.cat((rms_norm(x, w), x), -1), [x, w])
    agree(lambda x, r, w: torch.cat((*add_rms_norm(x, r, w), x), -1), [x, r, w])
    agree(lambda x, r: torch.cat((swiglu(x, r), x), -1), [x, r])
    agree(lambda q: torch.cat((rope(q, q, angles.cos(), angles.sin())[0], q), -1), [heads])
    agree(lambda x, w: rms_norm(x, w).sum(0), [x, w])                                    # expanded, stride 0


def test_rms_norm_of_zeros_and_of_huge_numbers_is_finite():
    x = torch.cat((torch.zeros(1, 64), torch.full((1, 64), 1e15))).to(DEVICE)
    torch.testing.assert_close(rms_norm(x, torch.ones(64, device=DEVICE)), x.clamp(max=1))


def test_norm_agrees_with_torch():
    x, w = torch.randn(3, 5, 48, device=DEVICE), torch.randn(48, device=DEVICE)
    torch.testing.assert_close(rms_norm(x, w, 1e-6), torch.nn.functional.rms_norm(x, (48,), w, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H,K,D", [(1, 1, 2), (4, 2, 16), (5, 1, 80), (6, 6, 128)])
def test_rope(H, K, D, dtype):
    angles = torch.rand(40, D // 2, device=DEVICE) * 6
    cos, sin = guarded(40, D // 2).copy_(angles.cos()), guarded(40, D // 2).copy_(angles.sin())
    positions = torch.randint(0, 40, (2, 5), device=DEVICE)
    q, k = guarded(2, 5, H, D, dtype=dtype), guarded(2, 5, K, D, dtype=dtype)
    for at in (None, positions, positions[:1].expand(2, 5)):
        agree(lambda q, k: rope(q, k, cos, sin, at), [q, k])
    agree(lambda x: rope(x[:, :, :H], x[:, :, H:], cos, sin), [guarded(2, 5, H + K, D, dtype=dtype)])


def test_rope_by_hand_and_out_of_place():
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], device=DEVICE)
    c, s = torch.tensor([[0.0, 1.0]], device=DEVICE), torch.tensor([[1.0, 0.0]], device=DEVICE)  # a quarter turn, and none
    for choice in ("torch", "triton"):
        kernels.set_kernels(choice)
        assert rope(x, x, c, s)[0].flatten().tolist() == [-3.0, 2.0, 1.0, 4.0]
    assert x.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,N", [(1, 1), (3, 7), (2, 2048), (2, 2049), (2, 13824)])
def test_swiglu(rows, N, dtype):
    agree(swiglu, [guarded(rows, N, dtype=dtype, scale=3.0), guarded(rows, N, dtype=dtype)])
    agree(lambda x: swiglu(*x.chunk(2, -1)), [guarded(rows, 2 * N, dtype=dtype)])        # halves of one projection


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("N,V,C", [(1, 5, 8), (7, 128, 24), (33, 1000, 24), (7, 4096, 8), (5, 9001, 8)])
def test_linear_cross_entropy(N, V, C, reduction):
    x, w = guarded(N, C), guarded(V, C)
    target = torch.randint(0, V, (N,), device=DEVICE)
    target[1::3] = -100
    for chunk in (1 << 30, 9 * 4 * (V + 64)):
        agree(lambda x, w: linear_cross_entropy(x, w, target, reduction=reduction, chunk_bytes=chunk), [x, w])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_linear_cross_entropy_in_half_precision_and_chunks(dtype):
    x, w, target = guarded(40, 32, dtype=dtype), guarded(300, 32, dtype=dtype), torch.randint(0, 300, (40,), device=DEVICE)
    for chunk in (1 << 30, 640):                                                         # all at once, and row by row
        agree(lambda x, w: linear_cross_entropy(x, w, target, chunk_bytes=chunk), [x, w])


def every_kernel():
    """Name -> the public function on something small."""
    x, w, heads, angles, target = guarded(3, 70), guarded(70), guarded(1, 3, 5, 10), guarded(3, 5), torch.tensor([1, -100, 2], device=DEVICE)
    return {"attention": lambda: kernels.attention(heads, heads, heads), "attend_cache": lambda: kernels.attend_cache(heads[:, 0], heads, heads, target[:1]),
            "rms_norm": lambda: (rms_norm(x, w), add_rms_norm(x, x, w)), "rope": lambda: rope(heads, heads, angles, angles), "swiglu": lambda: swiglu(x, x),
            "linear_cross_entropy_rows": lambda: linear_cross_entropy(x, x, target), "linear_cross_entropy_total": lambda: linear_cross_entropy(x.requires_grad_(), x, target)}


@pytest.mark.parametrize("name", every_kernel())
def test_the_choice_is_followed(name):
    for choice in ("triton", "torch", "auto"):
        kernels.set_kernels(choice)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            every_kernel()[name]()
        ran = f"xllava::{name}" in {event.key for event in profile.key_averages()}
        assert ran == (choice == "triton" or choice == "auto" and DEVICE == "cuda"), (choice, ran)


def test_nothing_is_written_past_an_output(monkeypatch):
    x, w, heads, angles, target = guarded(3, 70), guarded(70), guarded(1, 3, 5, 10), guarded(3, 5), torch.tensor([1, -100, 2], device=DEVICE)
    norm, gate, turn = (sys.modules[f"kernels.{n}"] for n in ("rms_norm", "swiglu", "rope"))
    room = Roomy(monkeypatch)
    norm._launch_forward(x, x, w, 1e-5)
    norm._launch_backward(x, w, x, x, 1e-5)
    gate._launch_forward(x, x)
    gate._launch_backward(x, x, x)
    turn._launch(heads, angles, angles, None, 1.0)
    CE._chunks(x, x, target, w[:3], -100, 1 << 20, True, False)
    monkeypatch.undo()
    assert len(room.made) == 11 and room.whole()


def test_six_hundred_chunks_add_up_in_fp32():
    """In bf16 a sum stands still as soon as its terms are 1/512 of it."""
    x, w, target = guarded(600, 8, dtype=torch.bfloat16).abs_(), guarded(5, 8, dtype=torch.bfloat16), torch.zeros(600, dtype=torch.int64, device=DEVICE)
    agree(lambda x, w: linear_cross_entropy(x, w, target, reduction="sum", chunk_bytes=1), [x, w])


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the bytes of every tensor made, by address: a detached one is not new."""
    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.made |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t._base is None}
        return out


def test_logits_are_held_for_one_chunk_only_and_the_backward_makes_nothing_but_the_gradients():
    x, w, target, grad = (t.to(DEVICE) for t in (torch.randn(64, 8), torch.randn(1000, 8), torch.arange(64), torch.ones(64)))
    with Watch() as forward:
        CE._chunks(x, w, target, grad, -100, 16 * 1024 * 4, True, True)
    assert max(forward.made.values()) == 16 * 1024 * 4, "16 rows of 1,000 logits, each begun at a multiple of 64"
    loss = linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), target)
    with Watch() as backward:
        torch.autograd.grad(loss, (x, w))
    made = list(backward.made.values())
    assert made.count(w.nbytes) == made.count(x.nbytes) == 2, "what the forward left, and that times the incoming gradient"


def test_x_llavas_vocabulary():
    x, w, target = guarded(3, 8), guarded(39478, 8, scale=0.1), torch.tensor([0, 39477, -100], device=DEVICE)
    agree(lambda x, w: linear_cross_entropy(x, w, target), [x, w])


def test_no_targets_give_zero_and_a_divisor_of_the_callers_counts():
    x, w, none = guarded(4, 8), guarded(50, 8), torch.full((4,), -100, device=DEVICE)
    for choice in ("torch", "triton"):
        loss, dx, dw = run(choice, lambda x, w: linear_cross_entropy(x, w, none), [x, w])
        assert loss == 0 and not dx.any() and not dw.any()
    target = torch.tensor([1, 2, -100, 3], device=DEVICE)
    agree(lambda x, w: linear_cross_entropy(x, w, target, divisor=torch.tensor(7.0, device=DEVICE)) * 3.0, [x, w])
    whole = linear_cross_entropy(x, w, target, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(x, w, target, divisor=7), whole / 7)


def test_a_frozen_head_or_input_gets_no_gradient():
    x, w, target = guarded(4, 8), guarded(50, 8), torch.tensor([1, 2, -100, 3], device=DEVICE)
    for reduction in ("mean", "none"):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        linear_cross_entropy(a, w, target, reduction=reduction).sum().backward()
        linear_cross_entropy(x, b, target, reduction=reduction).sum().backward()
        assert a.grad.any() and b.grad.any()


def test_operators_keep_their_promises_and_compile():
    x, w, target = torch.randn(6, 8, device=DEVICE, requires_grad=True), torch.randn(20, 8, device=DEVICE, requires_grad=True), torch.arange(6, device=DEVICE)
    angles = torch.rand(6, 4, device=DEVICE)
    gain, other, heads = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((8,), (6, 8), (1, 6, 1, 8)))
    torch.library.opcheck(sys.modules["kernels.rms_norm"]._forward_op, (x, None, gain, 1e-5))
    torch.library.opcheck(sys.modules["kernels.rms_norm"]._forward_op, (x, other, gain, 1e-5))
    torch.library.opcheck(sys.modules["kernels.swiglu"]._forward_op, (x, other))
    torch.library.opcheck(sys.modules["kernels.rope"]._rope_op, (heads, angles, angles, None, 1.0))
    torch.library.opcheck(CE._rows_op, (x, w, target, -100, 1 << 20))
    torch.library.opcheck(CE._total_op, (x, w, target, torch.ones(6, device=DEVICE), -100, 1 << 20, True, True))

    def step(x, w):
        y, total = add_rms_norm(x, x, w[0])
        y = swiglu(y, total)
        q, _ = rope(y[None, :, None], y[None, :, None], angles.cos(), angles.sin())
        return linear_cross_entropy(q[0, :, 0], w, target)
    eager = torch.autograd.grad(step(x, w), (x, w))
    for a, b in zip(eager, torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x, w), (x, w))):
        torch.testing.assert_close(a, b)
    for a, b in zip(eager, torch.autograd.grad(torch.utils.checkpoint.checkpoint(step, x, w, use_reentrant=False), (x, w))):
        assert torch.equal(a, b)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = step(x, w)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, w)[0].dtype == torch.float32
