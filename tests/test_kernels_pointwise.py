import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from kernel_checks import (
    DEVICE,
    DTYPES,
    RoomyEmpty,
    agree,
    guarded,
    results,
    run,
    triton_kernels,  # noqa: F401
)
from torch._dynamo.backends.common import aot_autograd

import kernels
from kernels import (
    add_rms_norm,
    attention,
    attention_with_kvcache,
    linear_cross_entropy,
    rms_norm,
    rope,
    swiglu,
)

CE, NORM, ROPE, SWIGLU = (
    sys.modules[f"kernels.{name}"] for name in ("cross_entropy", "rms_norm", "rope", "swiglu")
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,C", [(1, 1), (3, 7), (5, 64), (9, 130), (3, 4096), (4, 5120), (1, 13824)]
)
def test_rms_norm(rows, C, dtype):
    x, r, w = (guarded(*shape, dtype=dtype) for shape in ((rows, C), (rows, C), (C,)))
    agree(rms_norm, [x, w])
    agree(add_rms_norm, [x, r, w])
    wide = guarded(rows, 2 * C, dtype=dtype)
    agree(rms_norm, [wide[:, :C], w])
    agree(add_rms_norm, [wide[:, C:], r, w], 1e-2)


def test_sizes_that_do_not_fit_are_refused_where_a_kernel_would_read_past_an_end():
    x, few = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"rms_norm: weight \(4,\) for x \(4, 8\)"):
        rms_norm(x, few[0])
    with pytest.raises(ValueError, match=r"rms_norm: weight \(4,\) for x \(4, 8\)"):
        add_rms_norm(x, x, few[0])
    with pytest.raises(ValueError, match=r"swiglu: gate \(4, 8\), up \(4, 4\)"):
        swiglu(x, few)
    with pytest.raises(ValueError, match="linear_cross_entropy: 4 rows, 2 targets"):
        linear_cross_entropy(x, x, torch.zeros(2, dtype=torch.int64, device=DEVICE))


def test_the_norm_of_a_sum_sees_it_as_the_next_layer_does():
    x, r, w = (guarded(*shape, dtype=torch.float16) for shape in ((5, 64), (5, 64), (64,)))
    y, total = add_rms_norm(x, r, w)
    assert torch.equal(total, x + r) and torch.equal(y, rms_norm(total, w))


def test_a_rounded_branch_added_to_the_float32_stream_leaves_it_float32():
    """Under autocast the sum has the dtype and the digits of the residual stream, and each
    gradient the dtype of its tensor."""
    x, r, w = guarded(5, 24, dtype=torch.bfloat16), guarded(5, 24, scale=100), guarded(24)
    y, total, dx, *_ = agree(add_rms_norm, [x, r, w])
    assert y.dtype == total.dtype == torch.float32 and dx.dtype == torch.bfloat16
    assert torch.equal(total, x + r)


@pytest.mark.parametrize("choice", ["triton", "torch"])
def test_under_autocast_a_norm_gives_the_dtype_of_products_and_keeps_the_sum(choice):
    """Rounded once, and not again by each linear layer that follows."""
    kernels.set_kernels(choice)
    x, r, w = guarded(5, 24), guarded(5, 24), guarded(24)
    plain, wide, total = rms_norm(x, w), *add_rms_norm(x, r, w)
    with torch.autocast(DEVICE, torch.float16):
        rounded, y, same_total = rms_norm(x, w), *add_rms_norm(x, r, w)
    assert torch.equal(rounded, plain.half()) and torch.equal(y, wide.half())
    assert same_total.dtype == torch.float32 and torch.equal(same_total, total)

    # A gradient in fp16 gives what the same numbers in fp32 give.
    dy = torch.randn(5, 24, device=DEVICE).half()
    x.requires_grad_(), w.requires_grad_()
    expected = torch.autograd.grad(rms_norm(x, w), (x, w), dy.float())
    with torch.autocast(DEVICE, torch.float16):
        y = rms_norm(x, w)
    assert all(map(torch.equal, expected, torch.autograd.grad(y, (x, w), dy)))


@pytest.mark.parametrize("shape", [(7,), (5, 24), (2, 3, 1)])
@pytest.mark.parametrize(
    "ours,definition",
    [(rms_norm, NORM.rms_norm_reference), (add_rms_norm, NORM.add_rms_norm_reference)],
)
def test_without_the_kernel_a_norm_has_the_definitions_gradient(ours, definition, shape):
    """Written out in kernels/rms_norm.py, against what autograd makes of the definition."""
    inputs = [guarded(*shape, dtype=torch.float64) for _ in range(2 + (ours is add_rms_norm))]
    inputs[-1] = inputs[-1].reshape(-1, shape[-1])[0]
    found, expected = (run("torch", op, inputs) for op in (ours, definition))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_norms_weight_gradient_is_summed_in_fp32():
    """Rounded at every row, a sum of like numbers stands still after a few hundred."""
    x, w = guarded(600, 8, dtype=torch.bfloat16).abs_(), guarded(8, dtype=torch.bfloat16)
    agree(rms_norm, [x, w], gradient=torch.ones_like)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm_of_small_numbers_depends_on_eps(eps):
    x, w = guarded(3, 64, scale=1e-3), guarded(64)
    agree(rms_norm, [x, w], eps)
    agree(add_rms_norm, [x, x, w], eps)


def slice_of_wider(o):
    """The gradient of one part of a concatenation."""
    return torch.randn(*o.shape[:-1], 2 * o.shape[-1]).to(o)[..., : o.shape[-1]]


def expanded(o):
    """The gradient of a sum over rows, stride 0."""
    return torch.randn(o.shape[-1:]).to(o).expand(o.shape)


@pytest.mark.parametrize("gradient", [slice_of_wider, expanded])
def test_incoming_gradients_may_have_any_strides(gradient):
    x, r, w = guarded(5, 24), guarded(5, 24), guarded(24)
    agree(rms_norm, [x, w], gradient=gradient)
    agree(add_rms_norm, [x, r, w], gradient=gradient)
    agree(swiglu, [x, r], gradient=gradient)
    q, k, angles = guarded(2, 3, 2, 8), guarded(2, 3, 1, 8), torch.rand(3, 4, device=DEVICE)
    agree(rope, [q, k], angles.cos(), angles.sin(), gradient=gradient)


def test_rms_norm_of_zeros_and_of_huge_numbers_is_finite():
    x = torch.cat((torch.zeros(1, 64), torch.full((1, 64), 1e15))).to(DEVICE)
    torch.testing.assert_close(rms_norm(x, torch.ones(64, device=DEVICE)), x.clamp(max=1))


def test_norm_agrees_with_torch():
    x, w = torch.randn(3, 5, 48, device=DEVICE), torch.randn(48, device=DEVICE)
    theirs = torch.nn.functional.rms_norm(x, (48,), w, 1e-6)
    torch.testing.assert_close(rms_norm(x, w, 1e-6), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H,K,D", [(1, 1, 2), (4, 2, 16), (5, 1, 80), (6, 6, 128)])
def test_rope(H, K, D, dtype):
    angles = torch.rand(40, D // 2, device=DEVICE) * 6
    cos, sin = guarded(40, D // 2).copy_(angles.cos()), guarded(40, D // 2).copy_(angles.sin())
    positions = torch.randint(0, 40, (2, 5), device=DEVICE)
    q, k = guarded(2, 5, H, D, dtype=dtype), guarded(2, 5, K, D, dtype=dtype)
    for at in (None, positions, positions[:1].expand(2, 5)):
        agree(rope, [q, k], cos, sin, at)
    both = guarded(2, 5, H + K, D, dtype=dtype)
    agree(rope, [both[:, :, :H], both[:, :, H:]], cos, sin)


def test_rope_by_hand_and_out_of_place():
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], device=DEVICE)
    # The first pair is rotated by a quarter turn, the second not at all.
    cos, sin = torch.tensor([[0.0, 1.0]], device=DEVICE), torch.tensor([[1.0, 0.0]], device=DEVICE)
    for choice in ("torch", "triton"):
        kernels.set_kernels(choice)
        assert rope(x, x, cos, sin)[0].flatten().tolist() == [-3.0, 2.0, 1.0, 4.0]
    assert x.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,N", [(1, 1), (3, 7), (2, 2048), (2, 2049), (2, 13824)])
def test_swiglu(rows, N, dtype):
    agree(swiglu, [guarded(rows, N, dtype=dtype, scale=3.0), guarded(rows, N, dtype=dtype)])
    agree(swiglu, guarded(rows, 2 * N, dtype=dtype).chunk(2, -1))  # halves of one projection


@pytest.mark.parametrize(
    "N,V,C", [(2, 1, 1), (1, 5, 8), (7, 128, 24), (33, 1000, 24), (7, 4096, 8), (5, 9001, 8)]
)
def test_linear_cross_entropy(N, V, C, monkeypatch):
    hidden, weight = guarded(N, C), guarded(V, C)
    targets = torch.randint(0, V, (N,), device=DEVICE)
    targets[1::3] = -100
    for chunk_bytes in (1 << 30, 9 * 4 * (V + 64)):
        monkeypatch.setattr(CE, "CHUNK_BYTES", chunk_bytes)
        agree(linear_cross_entropy, [hidden, weight], targets)
    # Another index to ignore, one that is also a piece
    targets[1::3] = V - 1
    agree(linear_cross_entropy, [hidden, weight], targets, V - 1)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_linear_cross_entropy_in_half_precision_and_chunks(dtype, monkeypatch):
    hidden, weight = guarded(40, 32, dtype=dtype), guarded(300, 32, dtype=dtype)
    targets = torch.randint(0, 300, (40,), device=DEVICE)
    for chunk_bytes in (1 << 30, 640):  # all at once, and row by row
        monkeypatch.setattr(CE, "CHUNK_BYTES", chunk_bytes)
        agree(linear_cross_entropy, [hidden, weight], targets)


class ProductLog(torch.utils._python_dispatch.TorchDispatchMode):
    """Records (rows, summed, columns) of every matrix product."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.sizes.append((*a.shape, b.shape[1]))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 3 * 4 * 448])
def test_large_products_over_an_odd_vocabulary_are_aligned(chunk_bytes, monkeypatch):
    """389 pieces become 448. Six positions go through at once or three at a time."""
    monkeypatch.setattr(CE, "CHUNK_BYTES", chunk_bytes)
    hidden, weight = guarded(6, 8), guarded(389, 8)
    targets = torch.tensor([0, 383, 384, 388, -100, 7], device=DEVICE)
    with ProductLog() as log:
        CE._launch(hidden, weight, targets, -100, hidden.dtype, True, True)
    rows = 6 if chunk_bytes == 1 << 30 else 3
    products = [(rows, 8, 448), (rows, 448, 8), (448, rows, 8)]
    assert log.sizes == products * (6 // rows)
    agree(linear_cross_entropy, [hidden, weight], targets)


def test_a_weight_whose_rows_are_no_rows_of_memory():
    targets = torch.randint(0, 64, (5,), device=DEVICE)
    agree(linear_cross_entropy, [guarded(5, 8), guarded(8, 64).T], targets)


def test_no_rows_have_no_gradient_but_zeros_of_the_weight():
    x, w = torch.empty(0, 64, device=DEVICE).requires_grad_(), guarded(64).requires_grad_()
    dx, dw = torch.autograd.grad(rms_norm(x, w).sum(), (x, w))
    assert dx.shape == (0, 64) and not dw.any()


def test_a_second_derivative_is_refused():
    x = guarded(3, 70).requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def every_kernel():
    """Operator -> the public function on something small."""
    x, w, angles = guarded(3, 70), guarded(70), guarded(3, 5)
    heads, targets = guarded(1, 3, 5, 10), torch.tensor([1, -100, 2], device=DEVICE)
    return {
        "attention": lambda: attention(heads, heads, heads),
        "attention_with_kvcache": lambda: attention_with_kvcache(
            heads[:, 0], heads, heads, targets[:1]
        ),
        "rms_norm": lambda: (rms_norm(x, w), add_rms_norm(x, x, w)),
        "rope": lambda: rope(heads, heads, angles, angles),
        "swiglu": lambda: swiglu(x, x),
        "linear_cross_entropy": lambda: linear_cross_entropy(x, x, targets),
    }


@pytest.mark.parametrize("name", every_kernel())
def test_the_choice_is_followed(name, monkeypatch):
    ran, call = set(), kernels.Operator.__call__
    monkeypatch.setattr(
        kernels.Operator, "__call__", lambda self, *args: ran.add(self.name) or call(self, *args)
    )
    for choice in ("triton", "torch", "auto"):
        kernels.set_kernels(choice)
        every_kernel()[name]()
        expected = choice == "triton" or (choice == "auto" and DEVICE == "cuda")
        assert (name in ran) == expected, (choice, ran)
        ran.clear()


@pytest.mark.parametrize(
    "name", ["attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy"]
)
def test_torch_compile_gets_the_custom_operator_and_the_same_gradients(name):
    """The backend runs what was traced as it is: operators it cannot look into."""
    torch.manual_seed(0)
    kernels.set_kernels("triton")
    x, w, angles = guarded(3, 70), guarded(70), guarded(3, 5)
    heads, targets = guarded(1, 3, 5, 10), torch.tensor([1, -100, 2], device=DEVICE)
    run = {
        "attention": lambda x: attention(heads * x.sum(), heads, heads),
        "rms_norm": lambda x: add_rms_norm(x, x, w)[0],
        "rope": lambda x: rope(heads * x.sum(), heads, angles, angles)[0],
        "swiglu": lambda x: swiglu(x, x + 1),
        "linear_cross_entropy": lambda x: linear_cross_entropy(x, x, targets),
    }[name]
    x.requires_grad_()
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return make_boxed_func(graph.forward)

    eager = torch.autograd.grad(run(x).square().sum(), x)
    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    assert torch.equal(eager[0], torch.autograd.grad(compiled(x).square().sum(), x)[0])
    assert any(f"xllava.{name}" in graph for graph in graphs)


def test_nothing_is_written_past_an_output(monkeypatch):
    x, w, angles = guarded(3, 70), guarded(70), guarded(3, 5)
    heads, targets = guarded(1, 3, 5, 10), torch.tensor([1, -100, 2], device=DEVICE)
    room = RoomyEmpty(monkeypatch)
    NORM._launch_forward(x, x, w, 1e-5, None)
    NORM._launch_backward(x, w, x, x, 1e-5)
    SWIGLU._launch_forward(x, x)
    SWIGLU._launch_backward(x, x, x)
    ROPE._launch(heads, angles, angles, None, 1.0)
    CE._launch(x, x, targets, -100, x.dtype, True, False)
    monkeypatch.undo()
    assert len(room.made) == 12 and room.margins_are_intact()


def test_six_hundred_chunks_add_up_in_fp32(monkeypatch):
    """In bf16 a sum stands still as soon as its terms are 1/512 of it."""
    hidden = guarded(600, 8, dtype=torch.bfloat16).abs_()
    targets = torch.zeros(600, dtype=torch.int64, device=DEVICE)
    monkeypatch.setattr(CE, "CHUNK_BYTES", 1)
    agree(linear_cross_entropy, [hidden, guarded(5, 8, dtype=torch.bfloat16)], targets)


class AllocationLog(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the bytes of every new tensor by address, so that a detached one is not new."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x._base is None:
                storage = x.untyped_storage()
                self.made[storage.data_ptr()] = storage.nbytes()
        return out


def test_logits_are_held_for_one_chunk_and_the_backward_makes_only_the_gradients(monkeypatch):
    hidden, weight = torch.randn(64, 8, device=DEVICE), torch.randn(1000, 8, device=DEVICE)
    targets = torch.arange(64, device=DEVICE)
    # 16 rows of 1,000 logits, each starting at a multiple of 64
    chunk_bytes = 16 * 1024 * 4
    monkeypatch.setattr(CE, "CHUNK_BYTES", chunk_bytes)
    with AllocationLog() as forward:
        CE._launch(hidden, weight, targets, -100, hidden.dtype, True, True)
    assert max(forward.made.values()) == chunk_bytes

    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    with AllocationLog() as backward:
        torch.autograd.grad(loss, (hidden, weight))
    # What the forward left, dw with 24 rows of padding, and that times the incoming gradient
    made = list(backward.made.values())
    assert made.count(1024 * 8 * 4) == made.count(weight.nbytes) == 1
    assert made.count(hidden.nbytes) == 2


def test_x_llavas_vocabulary():
    targets = torch.tensor([0, 39477, -100], device=DEVICE)
    agree(linear_cross_entropy, [guarded(3, 8), guarded(39478, 8, scale=0.1)], targets)


def test_without_targets_loss_and_gradients_are_zero():
    hidden, weight = guarded(4, 8), guarded(50, 8)
    for rows in (4, 0):
        targets = torch.full((rows,), -100, device=DEVICE)
        for choice in ("torch", "triton"):
            inputs = [hidden[:rows], weight]
            (loss,), _, grads = run(choice, linear_cross_entropy, inputs, targets)
            assert loss == 0 and not any(g.any() for g in grads)
            assert [g.shape for g in grads] == [x.shape for x in inputs]


def test_a_mean_is_the_sum_divided_by_the_number_of_targets():
    hidden, weight = guarded(4, 8).requires_grad_(), guarded(50, 8).requires_grad_()
    targets = torch.tensor([1, 2, -100, 3], device=DEVICE)
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    ours = linear_cross_entropy(hidden, weight, targets) / 3
    torch.testing.assert_close(ours, theirs)
    grads = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_a_frozen_head_or_input_gets_no_gradient():
    hidden, weight = guarded(4, 8), guarded(50, 8)
    targets = torch.tensor([1, 2, -100, 3], device=DEVICE)
    _, dx, dw = results(linear_cross_entropy, [hidden, weight], targets)
    for x, w, expected in (
        (hidden.clone().requires_grad_(), weight, dx),
        (hidden, weight.clone().requires_grad_(), dw),
    ):
        linear_cross_entropy(x, w, targets).backward()
        grads = [t.grad for t in (x, w) if t.grad is not None]
        assert len(grads) == 1 and grads[0].shape == expected.shape and grads[0].any()


def chain(x, w, targets, angles):
    """Several kernels in a row."""
    y, total = add_rms_norm(x, x, w[0])
    y = swiglu(y, total)
    q, _ = rope(y[None, :, None], y[None, :, None], angles.cos(), angles.sin())
    return linear_cross_entropy(q[0, :, 0], w, targets)


def test_operators_keep_their_promises():
    x, w, other = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (6, 20, 6))
    gain = torch.randn(8, device=DEVICE, requires_grad=True)
    heads = torch.randn(1, 6, 1, 8, device=DEVICE, requires_grad=True)
    targets, angles = torch.arange(6, device=DEVICE), torch.rand(6, 4, device=DEVICE)
    torch.library.opcheck(NORM._forward_op.custom, (x, None, gain, 1e-5, None))
    torch.library.opcheck(NORM._forward_op.custom, (x, other, gain, 1e-5, torch.bfloat16))
    torch.library.opcheck(SWIGLU._forward_op.custom, (x, other))
    torch.library.opcheck(ROPE._rope_op.custom, (heads, angles, angles, None, 1.0))
    torch.library.opcheck(CE._loss_op.custom, (x, w, targets, -100, x.dtype, True, True))
    torch.library.opcheck(
        CE._loss_op.custom, (x.detach(), w.detach(), targets, -100, x.dtype, False, False)
    )


def test_operators_compile_recompute_and_follow_autocast():
    x, w = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (6, 20))
    rest = torch.arange(6, device=DEVICE), torch.rand(6, 4, device=DEVICE)
    eager = torch.autograd.grad(chain(x, w, *rest), (x, w))
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, torch.autograd.grad(compiled(x, w, *rest), (x, w))):
        torch.testing.assert_close(a, b)
    again = torch.utils.checkpoint.checkpoint(chain, x, w, *rest, use_reentrant=False)
    for a, b in zip(eager, torch.autograd.grad(again, (x, w))):
        assert torch.equal(a, b)

    with torch.autocast(DEVICE, torch.bfloat16):
        loss = chain(x, w, *rest)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, w)[0].dtype == torch.float32
