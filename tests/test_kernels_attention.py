import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, Roomy, agree, guarded, run, triton_kernels  # noqa: F401

import kernels
from kernels import attend_cache, attention, rows_causal, rows_from_docs, rows_left_padded, rows_prefix, rows_window

A = sys.modules["kernels.attention"]
attends = functools.partial(agree, cancel=4)  # the terms of dP − δ and of dS·K stand to the largest result about so
MASKS = ["causal", "full", "docs", "docs+pad", "left pad", "prefix", "window"]


def mask(name, B, T):
    """-> keyword arguments of attention()"""
    ids = torch.stack([(torch.arange(T) >= T // 3 + b).int() + (torch.arange(T) >= min(T, T // 3 + b + 1)) + (torch.arange(T) >= 2 * T // 3) for b in range(B)])
    padded = torch.where(torch.arange(T) >= T - T // 5, -1, ids)
    rows = {"docs": lambda: rows_from_docs(ids), "docs+pad": lambda: rows_from_docs(padded, causal=False),
            "left pad": lambda: rows_left_padded(torch.arange(B) * (T // 2), T), "prefix": lambda: rows_prefix(torch.arange(1, B + 1) * (T // 3), T),
            "window": lambda: rows_window(T, max(1, T // 4))}
    if name in rows:
        return dict(rows=tuple(r.to(DEVICE) for r in rows[name]()))
    return dict(causal=name == "causal")


def qkv(B, Tq, Tk, H, K, D, dtype=torch.float32):
    return guarded(B, Tq, H, D, dtype=dtype), guarded(B, Tk, K, D, dtype=dtype), guarded(B, Tk, K, D, dtype=dtype)


# every length with every mask (the longest with half of them); head dims and heads take turns
GRID = [(T, (16, 64, 80, 128)[(n + i) % 4], *((1, 1), (2, 2), (4, 2), (3, 1), (6, 2) if T <= 65 else (2, 1))[(n + 2 * i) % 5], m)
        for n, T in enumerate([1, 2, 63, 64, 65, 100, 127, 128, 129, 200, 257]) for i, m in enumerate(MASKS) if T < 200 or i % 2 == n % 2]


@pytest.mark.parametrize("T,D,H,K,name", GRID)
def test_attention_and_its_gradients_are_right(T, D, H, K, name):
    B = 2 if T <= 65 else 1
    attends(lambda *x: attention(*x, **mask(name, B, T)), qkv(B, T, T, H, K, D))


def test_a_vision_transformer_length_is_right(monkeypatch):
    monkeypatch.setitem(A.TILES, 0, dict.fromkeys(("forward", "queries", "keys"), {64: (128, 128, 4, 1)}))  # fewer tiles: the interpreter's time
    attends(lambda *x: attention(*x, causal=False), qkv(1, 577, 577, 2, 1, 64))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", MASKS)
def test_half_precision_is_as_near_as_torchs_own(dtype, name):
    attends(lambda *x: attention(*x, **mask(name, 1, 130)), qkv(1, 130, 130, 2, 1, 64, dtype))


@pytest.mark.parametrize("Tq,Tk,causal", [(1, 70, True), (37, 90, True), (90, 37, True), (65, 129, False), (129, 65, False)])
def test_queries_and_keys_of_different_lengths(Tq, Tk, causal):
    attends(lambda *x: attention(*x, causal=causal), qkv(2, Tq, Tk, 2, 1, 64))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", [80, 90])
def test_the_tiles_of_real_gpus_and_descriptors_give_the_same(kind, name, monkeypatch):
    monkeypatch.setitem(A.TILES, 0, A.TILES[kind])
    monkeypatch.setattr(A, "TMA_IN_INTERPRETER", kind == 90)
    for D in (64, 128) if kind == 90 else (64,):                                         # 80: the same tiles for both
        B = 2 if kind == 90 else 1                                                       # a descriptor reads on into the next sequence
        attends(lambda *x: attention(*x, **mask(name, B, 150)), qkv(B, 150, 150, 2, 1, D))


@pytest.mark.parametrize("descriptors", [False, True])
def test_any_strides_are_taken(descriptors, monkeypatch):
    monkeypatch.setattr(A, "TMA_IN_INTERPRETER", descriptors)                            # which only some of these strides allow
    fused = guarded(2, 40, 3, 2, 64)
    attends(lambda x: attention(*x.unbind(2)), [fused])                                  # slices of one projection
    for B in (1, 2):
        q, k, v = (guarded(B, 2, 40, 64).transpose(1, 2) for _ in range(3))              # (B, H, T, D) underneath
        attends(lambda *x: attention(*x), [q, k, v])
    attends(lambda *x: attention(*x), [q, k, guarded(2, 40, 2, 64)])                     # keys and values laid out differently
    q = guarded(2, 40, 2, 128)[..., ::2]                                                 # channels apart
    attends(lambda *x: attention(*x), [q, k, v])
    q, k, v = (guarded(3, 40, 2, 64)[::2] for _ in range(3))                             # sequences apart
    attends(lambda *x: attention(*x), [q, k, v])
    attends(lambda *x: attention(*x).sum(), [q, k, v])                                   # dO expanded, stride 0
    flipped = guarded(2, 40, 64, 2).transpose(2, 3)                                      # heads innermost
    attends(lambda *x: attention(*x), [flipped, k, v])


def test_a_scale_of_ones_own():
    attends(lambda *x: attention(*x, scale=0.3), qkv(1, 70, 70, 2, 1, 64))
    with pytest.raises(ValueError, match="scale"):
        attention(*qkv(1, 4, 4, 1, 1, 16), scale=-1.0)
    with pytest.raises(ValueError, match="multiple"):
        attention(*qkv(1, 4, 4, 3, 2, 16))
    q, k, v = qkv(2, 4, 4, 1, 1, 16)
    with pytest.raises(ValueError, match="one shape"):
        attention(q, k[:1], v)


def test_documents_and_the_future_do_not_leak():
    q, k, v = qkv(1, 150, 150, 2, 2, 64)
    rows = mask("docs", 1, 150)["rows"]
    before = run("triton", lambda *x: attention(*x, rows=rows), [q, k, v])
    for x in (q, k, v):
        x[:, :50] += 1.0                                                                 # the first document changes
    after = run("triton", lambda *x: attention(*x, rows=rows), [q, k, v])
    for a, b in zip(before, after):
        assert torch.equal(a[:, 50:], b[:, 50:]) and not torch.equal(a[:, :50], b[:, :50])
    before = attention(q, k, v)
    k[:, 100:], v[:, 100:] = 7.0, -3.0                                                   # the future changes
    assert torch.equal(before[:, :100], attention(q, k, v)[:, :100])


def test_causal_as_rows_is_causal_to_the_bit_and_reruns_are_equal():
    inputs = qkv(1, 130, 130, 2, 1, 64)
    rows = tuple(r.to(DEVICE) for r in rows_causal(130))
    first = run("triton", lambda *x: attention(*x), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, run("triton", lambda *x: attention(*x, rows=rows), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(first, run("triton", lambda *x: attention(*x), inputs)))


def test_queries_that_see_nothing_give_zeros_and_no_gradient():
    lo = torch.zeros(1, 70, dtype=torch.int32, device=DEVICE)
    o, *grads = run("triton", lambda *x: attention(*x, rows=(lo, lo)), qkv(1, 70, 70, 2, 2, 64))
    assert not any(t.any() for t in (o, *grads))
    o, dq, *_ = run("triton", lambda *x: attention(*x), qkv(1, 70, 20, 2, 2, 64))
    assert not o[:, :50].any() and not dq[:, :50].any() and o[:, 50:].all()


def test_documents_a_token_shorter_and_longer_than_a_tile():
    ids = torch.repeat_interleave(torch.arange(5, device=DEVICE), torch.tensor([63, 1, 65, 31, 33], device=DEVICE))[None]
    for causal in (True, False):
        attends(lambda *x: attention(*x, rows=rows_from_docs(ids, causal)), qkv(1, 193, 193, 1, 1, 16))


def test_nothing_is_written_past_an_output(monkeypatch):
    q, k, v = qkv(1, 70, 70, 2, 2, 80)
    lengths, room = torch.tensor([70], device=DEVICE), Roomy(monkeypatch)
    o, lse = A._launch_forward(q, k, v, True, None, None, 0.1)
    A._launch_backward(q, k, v, o, lse, q, True, None, None, 0.1)
    A._launch_cache(q[:, 0], k, v, lengths, 3)
    monkeypatch.undo()
    assert len(room.made) == 9 and room.whole()


def test_huge_scores_stay_finite():
    """Scores of 10⁴ are rounded to 10⁻³ in fp32, the log-sum-exp as well, and exp passes that on: one unit times the largest score, relative.
    The definition takes the same rounded score for the maximum, the sum and the exponent, so its own error is no yardstick here."""
    q, k, v = qkv(1, 100, 100, 2, 2, 64)
    q, k = q * 100, k * 10
    score = torch.einsum("bihd,bjhd->bhij", q, k).abs().max().item()
    assert score > 1e4
    agree(lambda *x: attention(*x, scale=1.0), [q, k, v], cancel=score)


def test_the_definition_agrees_with_torchs_attention_and_finite_differences():
    kernels.set_kernels("torch")
    q, k, v = (x.double().requires_grad_() for x in qkv(2, 5, 7, 4, 2, 16))
    rows = tuple(r.to(DEVICE) for r in (torch.tensor([[0, 0, 2, 2, 3]]).int(), torch.tensor([[0, 3, 3, 5, 7]]).int()))
    j = torch.arange(7, device=DEVICE)
    seen = (j >= rows[0][0, 1:, None]) & (j < rows[1][0, 1:, None])
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q[:, 1:], k, v)), attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, rows=rows)[:, 1:], theirs.transpose(1, 2))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, rows=rows), (q, k, v))


@pytest.mark.parametrize("H,K,splits", [(1, 1, 1), (4, 4, 3), (6, 2, 8), (8, 1, 0)])
def test_one_query_against_a_cache_is_the_last_row_of_attention(H, K, splits):
    q, k, v = guarded(5, H, 80), guarded(5, 300, K, 80), guarded(5, K, 300, 80).transpose(1, 2)
    lengths = torch.tensor([1, 63, 64, 65, 300], device=DEVICE)
    ours = A._cache_op(q, k, v, lengths, splits)
    for b, n in enumerate(lengths.tolist()):
        exact = A.attention_reference(q[b:b + 1, None].double(), k[b:b + 1, :n].double(), v[b:b + 1, :n].double())[0, 0]
        torch.testing.assert_close(ours[b].double(), exact, rtol=1e-5, atol=1e-5)
    k[0, 1:] = float("nan")                                                              # what lies behind the length is never read
    v[0, 1:] = float("nan")
    assert torch.equal(attend_cache(q, k, v, lengths)[0], attend_cache(q[:1], k[:1].nan_to_num(9), v[:1].nan_to_num(9), lengths[:1])[0])


def test_rows_of_documents_by_hand():
    lo, hi = rows_from_docs(torch.tensor([[4, 4, 7, 7, 7, -1]]))
    assert lo.tolist() == [[0, 0, 2, 2, 2, 5]] and hi.tolist() == [[1, 2, 3, 4, 5, 5]]
    assert rows_from_docs(torch.tensor([[4, 4, 7, 7, 7, -1]]), causal=False)[1].tolist() == [[2, 2, 5, 5, 5, 5]]
    assert rows_prefix(torch.tensor([3]), 5)[1].tolist() == [[3, 3, 3, 4, 5]]
    assert rows_window(4, 2)[0].tolist() == [[0, 0, 1, 2]]
    assert rows_left_padded(torch.tensor([2]), 4)[1].tolist() == [[2, 2, 3, 4]]


def test_the_operator_keeps_its_promises_compiles_and_follows_autocast():
    q, k, v = (x.requires_grad_() for x in (torch.randn(1, 20, 2, 16, device=DEVICE), torch.randn(1, 20, 1, 16, device=DEVICE), torch.randn(1, 20, 1, 16, device=DEVICE)))
    torch.library.opcheck(A._forward_op, (q, k, v, True, None, None, 0.25))
    torch.library.opcheck(A._cache_op, (q[:, 0].detach(), k.detach(), v.detach(), torch.tensor([9], device=DEVICE), 2))
    eager = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))):
        torch.testing.assert_close(a, b)
    again = torch.utils.checkpoint.checkpoint(attention, q, k, v, use_reentrant=False)
    for a, b in zip(eager, torch.autograd.grad(again.square().sum(), (q, k, v))):
        assert torch.equal(a, b)
    with torch.autocast(DEVICE, torch.bfloat16):
        o = attention(q, k, v)
    assert o.dtype == torch.bfloat16 and torch.autograd.grad(o.sum(), q)[0].dtype == torch.float32


def test_everything_works_without_triton():
    code = ("import sys; sys.modules['triton'] = None\nimport torch, kernels as k\nassert not k.HAVE_TRITON\nx = torch.randn(1, 4, 2, 16, requires_grad=True)\n"
            "k.attention(x, x, x).sum().backward(); k.swiglu(x, x); k.rms_norm(x, x[0, 0, 0]); k.rope(x, x, x[0, :, 0, :8], x[0, :, 0, :8])\n"
            "k.linear_cross_entropy(x[0, 0], x[0, 1], torch.tensor([0, 1])).backward()\n"
            "try: k.set_kernels('triton'); raise SystemExit(1)\nexcept RuntimeError: pass")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
