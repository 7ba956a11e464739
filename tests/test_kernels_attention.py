import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    RoomyEmpty,
    agree,
    attention_error,
    attention_with_kvcache_error,
    causal_ranges,
    check,
    document_ranges,
    guarded,
    left_padded_ranges,
    prefix_ranges,
    results,
    rounding,
    to_ranges,
    triton_kernels,  # noqa: F401
    window_ranges,
)

import kernels
from kernels import attention, attention_with_kvcache

A = sys.modules["kernels.attention"]
MASKS = ["causal", "full", "docs", "docs+pad", "left pad", "prefix", "window"]


def mask(name, B, T):
    """-> keyword arguments of attention()"""
    if name in ("causal", "full"):
        return {"causal": name == "causal"}
    # Four documents, the second with a single token, at other positions in each sequence
    ids = torch.zeros(B, T)
    for b in range(B):
        ids[b, T // 3 + b :] += 1
        ids[b, T // 3 + b + 1 :] += 1
        ids[b, 2 * T // 3 :] += 1
    padded = ids.clone()
    padded[:, T - T // 5 :] = -1
    ranges = {
        "docs": lambda: document_ranges(ids),
        "docs+pad": lambda: document_ranges(padded, causal=False),
        "left pad": lambda: left_padded_ranges([b * (T // 2) for b in range(B)], T),
        "prefix": lambda: prefix_ranges([(b + 1) * (T // 3) for b in range(B)], T),
        "window": lambda: window_ranges(T, max(1, T // 4)),
    }
    return {"key_ranges": ranges[name]()}


def qkv(B, Tq, Tk, H, K, D, dtype=torch.float32, q_scale=1.0):
    q = guarded(B, Tq, H, D, dtype=dtype, scale=q_scale)
    return q, guarded(B, Tk, K, D, dtype=dtype), guarded(B, Tk, K, D, dtype=dtype)


def grid():
    """Every length with every mask (half of them for long ones); head dims and heads alternate."""
    for n, T in enumerate([1, 2, 63, 64, 65, 100, 127, 128, 129, 200, 257]):
        for i, name in enumerate(MASKS):
            if T < 200 or i % 2 == n % 2:
                D = (16, 64, 80, 128)[(n + i) % 4]
                heads = [(1, 1), (2, 2), (4, 2), (3, 1), (6, 2) if T <= 65 else (2, 1)]
                yield T, D, *heads[(n + 2 * i) % 5], name


GRID = list(grid())


@pytest.mark.parametrize("T,D,H,K,name", GRID)
def test_attention_and_its_gradients_are_right(T, D, H, K, name):
    B = 2 if T <= 65 else 1
    agree(attention, qkv(B, T, T, H, K, D), **mask(name, B, T))


def test_a_vision_transformer_length_is_right(monkeypatch):
    # Large tiles are fewer tiles, which saves the interpreter's time.
    tiles = {(kernel, 64): [(128, 128, 4, 1)] * 2 for kernel in ("forward", "dq", "dkdv")}
    monkeypatch.setitem(A.TILES, 0, tiles)
    agree(attention, qkv(1, 577, 577, 2, 1, 64), causal=False)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", MASKS)
def test_half_precision_rounds_where_it_may_and_nowhere_else(dtype, name):
    """Sharp scores: a score or a log-sum-exp in half precision would be wrong by far more."""
    agree(attention, qkv(1, 130, 130, 2, 1, 64, dtype, q_scale=4.0), **mask(name, 1, 130))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("Tq,Tk", [(64, 2048), (2048, 64)])
def test_long_sums_are_kept_in_fp32(Tq, Tk, dtype):
    """A sum of 64 blocks that is rounded at each of them loses several digits. Nothing may cancel,
    or it would not show: values and keys have one sign per key, and all that is summed over
    queries is positive."""
    q, k, v = (x.abs() for x in qkv(1, Tq, Tk, 1, 1, 16, dtype))
    q *= 0.02

    def positive(o):
        return torch.rand(o.shape).to(o.device, o.dtype)

    agree(attention, [q, k, v], causal=False, gradient=positive)
    signs = torch.randint(0, 2, (1, Tk, 1, 1), device=DEVICE) * 2 - 1
    agree(attention, [q, k * signs, v * signs], causal=False, gradient=positive)


@pytest.mark.parametrize(
    "Tq,Tk,causal",
    [(1, 70, True), (37, 90, True), (90, 37, True), (65, 129, False), (129, 65, False)],
)
def test_queries_and_keys_of_different_lengths(Tq, Tk, causal):
    agree(attention, qkv(2, Tq, Tk, 2, 1, 64), causal=causal)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("generation", [80, 90])
def test_the_tiles_of_real_gpus_and_descriptors_give_the_same(generation, name, monkeypatch):
    monkeypatch.setitem(A.TILES, 0, A.TILES[generation])
    monkeypatch.setattr(A, "TMA_IN_INTERPRETER", generation == 90)
    # Two sequences where a descriptor reads on into the next one. At 80 both D have like tiles.
    B, head_dims = (2, (64, 128)) if generation == 90 else (1, (64,))
    for D in head_dims:
        agree(attention, qkv(B, 150, 150, 2, 1, D), **mask(name, B, 150))


@pytest.mark.parametrize("generation", A.TILES)
def test_the_kernels_before_wrote_all_that_the_last_one_reads(generation):
    """Of log-sum-exp and δ, in rows that are padded to a multiple of 128."""
    for (kernel, D), tiles in A.TILES[generation].items():
        if kernel != "dkdv":
            for writer, reader in zip(tiles, A.TILES[generation]["dkdv", D]):
                assert 128 % writer[0] == 0 and writer[0] % reader[0] == 0, (kernel, D)


@pytest.mark.parametrize("descriptors", [False, True])
def test_any_strides_are_taken(descriptors, monkeypatch):
    # Only some of these strides allow descriptors.
    monkeypatch.setattr(A, "TMA_IN_INTERPRETER", descriptors)
    agree(attention, guarded(2, 40, 3, 2, 64).unbind(2))  # slices of one projection
    for B in (1, 2):
        q, k, v = (
            guarded(B, 2, 40, 64).transpose(1, 2) for _ in range(3)
        )  # (B, H, T, D) in memory
        agree(attention, [q, k, v])
    agree(attention, [q, k, guarded(2, 40, 2, 64)])  # keys and values laid out differently
    agree(attention, [guarded(2, 40, 2, 128)[..., ::2], k, v])  # channels apart
    agree(attention, [guarded(3, 40, 2, 64)[::2] for _ in range(3)])  # sequences apart
    agree(attention, [guarded(2, 40, 64, 2).transpose(2, 3), k, v])  # heads innermost


def test_gradients_of_any_strides_are_taken():
    inputs = qkv(2, 40, 40, 2, 2, 64)
    agree(attention, inputs, gradient=lambda o: torch.ones((), device=DEVICE).expand(o.shape))
    agree(attention, inputs, gradient=lambda o: torch.randn(*o.shape, 2, device=DEVICE)[..., 0])
    agree(
        attention,
        inputs,
        gradient=lambda o: torch.randn(2, 2, 40, 64, device=DEVICE).transpose(1, 2),
    )


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple"):
        attention(*qkv(1, 4, 4, 3, 2, 16))
    with pytest.raises(ValueError, match="at most 128"):
        attention(*qkv(1, 4, 4, 1, 1, 160))
    q, k, v = qkv(2, 4, 4, 1, 1, 16)
    with pytest.raises(ValueError, match="one shape"):
        attention(q, k[:1], v)
    three, four = (torch.zeros(2, n, dtype=torch.int32, device=DEVICE) for n in (3, 4))
    with pytest.raises(ValueError, match=r"key_ranges \(2, 3\), q \(2, 4, 1, 16\)"):
        attention(q, k, v, key_ranges=(four, three))


def test_documents_and_the_future_do_not_leak():
    q, k, v = qkv(1, 150, 150, 2, 2, 64)
    documents = mask("docs", 1, 150)
    before = results(attention, [q, k, v], **documents)
    for x in (q, k, v):
        x[:, :50] += 1.0  # the first document changes
    after = results(attention, [q, k, v], **documents)
    for a, b in zip(before, after):
        assert torch.equal(a[:, 50:], b[:, 50:]) and not torch.equal(a[:, :50], b[:, :50])

    before = attention(q, k, v)
    k[:, 100:], v[:, 100:] = 7.0, -3.0  # the future changes
    assert torch.equal(before[:, :100], attention(q, k, v)[:, :100])


def test_causal_as_ranges_is_causal_to_the_bit_and_reruns_are_equal():
    inputs = qkv(1, 130, 130, 2, 1, 64)
    first = results(attention, inputs)
    for options in ({"key_ranges": causal_ranges(130)}, {}):
        again = results(attention, inputs, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_queries_without_a_visible_key_give_zeros_and_no_gradient():
    zero = to_ranges([[0] * 70])
    everything = results(attention, qkv(1, 70, 70, 2, 2, 64), key_ranges=(zero, zero))
    assert not any(x.any() for x in everything)
    o, dq, *_ = results(attention, qkv(1, 70, 20, 2, 2, 64))
    assert not o[:, :50].any() and not dq[:, :50].any() and o[:, 50:].all()


def test_documents_a_token_shorter_and_longer_than_a_tile():
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([63, 1, 65, 31, 33]))[None]
    for causal in (True, False):
        agree(attention, qkv(1, 193, 193, 1, 1, 16), key_ranges=document_ranges(ids, causal))


def test_nothing_is_written_past_an_output(monkeypatch):
    q, k, v = qkv(1, 70, 70, 2, 2, 80)
    lengths, room = torch.tensor([70], device=DEVICE), RoomyEmpty(monkeypatch)
    o, lse = A._launch_forward(q, k, v, True, None, None)
    A._launch_backward(q, k, v, o, lse, q, True, None, None)
    A._launch_decode(q[:, 0], k, v, lengths, 3)
    monkeypatch.undo()
    assert len(room.made) == 9 and room.margins_are_intact()


def test_huge_scores_stay_finite():
    """Scores of 10⁴ are rounded to 10⁻³ in fp32, and exp turns this into a relative error."""
    q, k, v = qkv(1, 100, 100, 2, 2, 64)
    q, k = q * 800, k * 10
    assert torch.einsum("bihd,bjhd->bhij", q, k).abs().max() / 8 > 1e4
    agree(attention, [q, k, v])


def test_the_yardstick_is_never_zero_where_the_kernel_rounds():
    """One key per query: dq and dk are exactly zero, as differences of equal numbers."""
    for dtype in DTYPES:
        q, k, v = (x.double() for x in qkv(1, 1, 1, 1, 1, 16, dtype))
        _, dq_error, dk_error, _ = attention_error(q, k, v, v, dtype=dtype)
        size = rounding(v.square(), dtype).sum() / 4  # scale = 1/4
        assert (dq_error >= size * k.abs()).all() and (dk_error >= size * q.abs()).all()


def test_the_definition_agrees_with_torchs_attention_and_finite_differences():
    kernels.set_kernels("torch")
    q, k, v = (x.double().requires_grad_() for x in qkv(2, 5, 7, 4, 2, 16))
    start, end = to_ranges([[0, 0, 2, 2, 3]]), to_ranges([[0, 3, 3, 5, 7]])
    j = torch.arange(7, device=DEVICE)
    visible = (j >= start[0, 1:, None]) & (j < end[0, 1:, None])
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q[:, 1:], k, v)), attn_mask=visible, enable_gqa=True
    )

    def ranged(q, k, v):
        return attention(q, k, v, key_ranges=(start, end))

    torch.testing.assert_close(ranged(q, k, v)[:, 1:], theirs.transpose(1, 2))
    assert not ranged(q, k, v)[:, 0].any()
    assert torch.autograd.gradcheck(ranged, (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k[:, :5], v[:, :5])), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attention(q, k[:, :5], v[:, :5]), theirs.transpose(1, 2))


@pytest.mark.parametrize("Tq,Tk", [(250, 250), (96, 96), (100, 130), (3, 200)])
def test_blocks_of_queries_give_what_the_whole_definition_gives(Tq, Tk):
    def inputs():
        torch.manual_seed(0)
        shapes = (2, Tq, 4, 8), (2, Tk, 2, 8), (2, Tk, 2, 8)
        return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    whole, blocks = inputs(), inputs()
    expected, out = A.attention_reference(*whole), A.attention_in_blocks(*blocks)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out)
    for result in (expected, out):
        (result * weights).sum().backward()
    for a, b in zip(whole, blocks):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("H,K,splits", [(1, 1, 1), (4, 4, 3), (6, 2, 8), (8, 1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_against_a_cache_is_the_last_row_of_attention(H, K, splits, dtype):
    q, k = guarded(5, H, 80, dtype=dtype), guarded(5, 300, K, 80, dtype=dtype)
    v = guarded(5, K, 300, 80, dtype=dtype).transpose(1, 2)
    lengths = torch.tensor([1, 63, 64, 65, 300], device=DEVICE)
    ours = A._decode_op(q, k, v, lengths, splits)

    q64, k64, v64 = (x.double() for x in (q, k, v))
    allowed = attention_with_kvcache_error(q64, k64, v64, lengths, dtype=dtype)
    for b, n in enumerate(lengths.tolist()):
        exact = A.attention_reference(q64[b : b + 1, None], k64[b : b + 1, :n], v64[b : b + 1, :n])
        check(ours[b], exact[0, 0], allowed[b])

    # What lies behind the length is never read.
    k[0, 1:] = float("nan")
    v[0, 1:] = float("nan")
    padded = attention_with_kvcache(q, k, v, lengths)[0]
    k, v = k.nan_to_num(9), v.nan_to_num(9)
    assert torch.equal(padded, attention_with_kvcache(q[:1], k[:1], v[:1], lengths[:1])[0])


def test_mask_ranges_by_hand():
    ids = torch.tensor([[4, 4, 7, 7, 7, -1]])
    start, end = document_ranges(ids)
    assert start.tolist() == [[0, 0, 2, 2, 2, 5]] and end.tolist() == [[1, 2, 3, 4, 5, 5]]
    assert document_ranges(ids, causal=False)[1].tolist() == [[2, 2, 5, 5, 5, 5]]
    assert prefix_ranges([3], 5)[1].tolist() == [[3, 3, 3, 4, 5]]
    assert window_ranges(4, 2)[0].tolist() == [[0, 0, 1, 2]]
    assert left_padded_ranges([2], 4)[1].tolist() == [[2, 2, 3, 4]]
    assert [x.tolist() for x in A._causal_ranges(3, 2, DEVICE)] == [[[0, 0, 0]], [[0, 1, 2]]]
    # Keys 0 … 5 of the documents above: the queries that attend to them
    first, last = A._query_ranges((start, end), 6)
    assert first.tolist() == [[0, 1, 2, 3, 4, 6]] and last.tolist() == [[2, 2, 5, 5, 5, 6]]


def test_the_operator_keeps_its_promises_compiles_and_follows_autocast():
    shapes = (1, 20, 2, 16), (1, 20, 1, 16), (1, 20, 1, 16)
    q, k, v = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes)
    # 128 queries: the padding of the log-sum-exp holds whatever was in memory, and is compared.
    whole = torch.randn(1, 128, 2, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(A._forward_op.custom, (whole, whole, whole, True, None, None))
    cache = (q[:, 0].detach(), k.detach(), v.detach(), torch.tensor([9], device=DEVICE), 2)
    torch.library.opcheck(A._decode_op.custom, cache)

    eager = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(eager, grads):
        torch.testing.assert_close(a, b)
    again = torch.utils.checkpoint.checkpoint(attention, q, k, v, use_reentrant=False)
    grads = torch.autograd.grad(again.square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(eager, grads))

    with torch.autocast(DEVICE, torch.bfloat16):
        o = attention(q, k, v)
    assert o.dtype == torch.bfloat16
    assert torch.autograd.grad(o.sum(), q)[0].dtype == torch.float32


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import kernels

assert not kernels.HAVE_TRITON
x = torch.randn(1, 4, 2, 16, requires_grad=True)
angles = x[0, :, 0, :8]
kernels.attention(x, x, x).sum().backward()
kernels.swiglu(x, x)
kernels.rms_norm(x, x[0, 0, 0])
kernels.rope(x, x, angles, angles)
kernels.linear_cross_entropy(x[0, 0], x[0, 1], torch.tensor([0, 1])).backward()
try:
    kernels.set_kernels("triton")
    raise SystemExit(1)
except ValueError:
    pass
"""


def test_everything_works_without_triton():
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, cwd=root)
