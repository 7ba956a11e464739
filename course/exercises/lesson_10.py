"""Lesson 10: key ranges, online softmax tile by tile and its gradient, two Triton kernels."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from course.exercise import Check, Exercise, expect
from course.exercises.tiny import near, randn

TITLE = "Kernels: online softmax, a Triton kernel in the interpreter, roofline"


# ------------------------------------------------------------------------- ranges
def listed(ranges):
    return [bound.tolist() for bound in ranges]


def causal_by_hand():
    from kernels.attention import _causal_ranges

    found = listed(_causal_ranges(3, 3, "cpu"))
    expect("key ranges of 3 queries and 3 keys", found, [[[0, 0, 0]], [[1, 2, 3]]])


def causal_of_other_lengths():
    from kernels.attention import _causal_ranges

    found = listed(_causal_ranges(2, 5, "cpu"))
    expect("key ranges of 2 queries behind 3 cached keys", found, [[[0, 0]], [[4, 5]]])
    found = listed(_causal_ranges(4, 2, "cpu"))
    expect("key ranges of 4 queries and 2 keys", found, [[[0, 0, 0, 0]], [[0, 0, 1, 2]]])


def queries_of_a_causal_mask():
    from kernels.attention import _query_ranges

    start, end = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([[1, 2, 3, 4]]).int()
    found = listed(_query_ranges((start, end), 4))
    expect("the queries of each key", found, [[[0, 1, 2, 3]], [[4, 4, 4, 4]]])


def both_say_the_same():
    from kernels.attention import _query_ranges

    # Documents, windows, queries without a key, more keys than queries, two sequences.
    generator = torch.Generator().manual_seed(0)
    for Tk in (5, 9):
        bounds = torch.randint(0, Tk + 1, (2, 40, 7), generator=generator, dtype=torch.int32)
        start, end = (bound.sort(dim=1).values for bound in bounds)
        first, last = _query_ranges((start, end), Tk)
        keys, queries = torch.arange(Tk), torch.arange(7)[:, None]
        visible = (keys >= start[..., None]) & (keys < end[..., None])  # (40, 7, Tk)
        found = (queries >= first[:, None]) & (queries < last[:, None])
        # Where nothing is visible a range may be empty in any way.
        wrong = int((found != visible).any(dim=(1, 2)).sum())
        assert wrong == 0, f"{wrong} of 40 masks differ from the one that the key ranges give"


RANGES = Exercise(
    "ranges",
    "A mask as ranges",
    "kernels/attention.py",
    ["_causal_ranges", "_query_ranges"],
    25,
    [
        Check(
            1,
            "the ranges of a causal mask",
            "Query i attends to the keys 0 … i. A batch of one: shape (1, Tq), int32.",
            causal_by_hand,
        ),
        Check(
            1,
            "the last query stands beside the last key",
            "With a cache, query 0 is not at position 0. No range ends below 0.",
            causal_of_other_lengths,
        ),
        Check(
            1,
            "the same mask by its columns",
            "Key j: how many queries end at or before it?",
            queries_of_a_causal_mask,
        ),
        Check(
            2,
            "rows and columns agree for any rising ranges",
            "torch.searchsorted, once on end and once on start. Which side counts equal values?",
            both_say_the_same,
        ),
    ],
    {"10_ranges_a.py": 1, "10_ranges_b.py": 3},
)


# ------------------------------------------------------------------------- tiled attention
def causal(Tq, Tk):
    return torch.zeros(Tq, dtype=torch.int32), torch.arange(Tk - Tq + 1, Tk + 1).int()


def heads(Tq, Tk, D, dtype=torch.float64):
    return (randn(n, D, seed=i, dtype=dtype) for i, n in enumerate((Tq, Tk, Tk)))


def exact(q, k, v, key_ranges):
    """softmax(q·kᵀ/√D)·v in one piece, float64, and the log-sum-exp."""
    start, end = (bound[:, None] for bound in key_ranges)
    keys = torch.arange(len(k))
    scores = q.double() @ k.double().T / q.shape[1] ** 0.5
    scores = scores.masked_fill((keys < start) | (keys >= end), -torch.inf)
    return scores.softmax(1).nan_to_num() @ v.double(), scores.logsumexp(1)


def compare(q, k, v, key_ranges, what, blocks, tolerance=1e-9):
    from kernels.tiled import tiled_attention

    o, L = tiled_attention(q, k, v, key_ranges, *blocks)
    want_o, want_L = exact(q, k, v, key_ranges)
    near(o, want_o, f"o of {what}", tolerance)
    has_keys = want_L > -torch.inf
    near(L[has_keys], want_L[has_keys], f"L of {what}", tolerance)
    return o, L


def one_tile():
    compare(*heads(4, 4, 8), causal(4, 4), "a single tile, causal", (16, 16))


def tiles_of_any_shape():
    compare(*heads(33, 50, 8), causal(33, 50), "33 queries, 50 keys, tiles of 8 × 16", (8, 16))
    compare(*heads(20, 20, 4), causal(20, 20), "20 queries, tiles of 16 × 4", (16, 4))


def large_scores():
    q, k, v = heads(24, 24, 8)
    # Scores of thousands, rising along the keys: each tile has a larger maximum.
    k = k.sign() * torch.linspace(1, 900, 24, dtype=torch.float64)[:, None]
    compare(q, k, v, causal(24, 24), "scores of thousands", (8, 8))


def documents_and_holes():
    # Two documents, and queries that attend to nothing: their first tiles may be all hidden.
    q, k, v = heads(24, 24, 8)
    start = torch.tensor([0] * 5 + [5] * 15 + [24] * 4).int()
    end = torch.tensor([1, 2, 3, 4, 5, *range(6, 21), 24, 24, 24, 24]).int()
    o, L = compare(q, k, v, (start, end), "two documents", (8, 4))
    assert (o[20:] == 0).all(), "queries without a visible key must give 0"
    assert (L[20:] == torch.inf).all(), "queries without a visible key must have L = +inf"


class Watch(TorchDispatchMode):
    """Notes the largest tensor that is made, and counts products."""

    def __init__(self):
        super().__init__()
        self.largest, self.counts = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.counts[function.overloadpacket.__name__] += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def little_memory_and_work():
    from kernels.tiled import tiled_attention

    T = 256
    q, k, v = heads(T, T, 8)
    end = torch.arange(1, T + 1)
    window = (end - 16).clamp(min=0).int(), end.int()
    with Watch() as watch:
        tiled_attention(q, k, v, window, 16, 16)
    assert watch.largest <= 4096, (
        f"a tensor of {watch.largest:,} numbers: the result has 2,048, a tile 256"
    )
    # Each block of queries attends to two blocks of keys.
    products = watch.counts["mm"] + watch.counts["addmm"] + watch.counts["bmm"]
    assert products <= 2 * 3 * 16, f"{products} products; 64 are enough for a window of 16 keys"


TILED = Exercise(
    "tiled",
    "Online softmax: attention tile by tile",
    "kernels/tiled.py",
    ["tiled_attention"],
    120,
    [
        Check(
            1,
            "one tile: an ordinary softmax",
            "Begin with o = softmax(s)·v and L = logsumexp(s).",
            one_tile,
        ),
        Check(
            2,
            "tiles of any shape give the same",
            "When the maximum grows, what was summed is too large by exp(m_new − m_old).",
            tiles_of_any_shape,
        ),
        Check(
            2,
            "scores of thousands do not overflow",
            "Subtract a maximum before each exp: which one, of what has been read so far?",
            large_scores,
        ),
        Check(
            2,
            "documents, and queries that attend to nothing",
            "−inf − (−inf) is NaN. What may stand in place of a maximum of −inf?",
            documents_and_holes,
        ),
        Check(
            3,
            "no tensor larger than a result, and no tile without work",
            "Where does the first visible key of a block of queries lie, and the last?",
            little_memory_and_work,
        ),
    ],
    {"10_tiled_a.py": 1, "10_tiled_b.py": 2, "10_tiled_c.py": 3, "10_tiled_d.py": 4},
)


# ------------------------------------------------------------------------- its gradient
def gradients(Tq, Tk, D, key_ranges, blocks):
    """[(name, ours, autograd's)] of dq, dk, dv, float64."""
    from kernels.tiled import tiled_attention_backward

    inputs = [each.requires_grad_() for each in heads(Tq, Tk, D)]
    start, end = (bound[:, None] for bound in key_ranges)
    keys = torch.arange(Tk)
    hidden = (keys < start) | (keys >= end)
    q, k, v = inputs
    scores = (q @ k.T / D**0.5).masked_fill(hidden, -1e300)
    o = (scores.softmax(1) @ v).masked_fill((start >= end), 0.0)
    L = scores.logsumexp(1).masked_fill((start >= end)[:, 0], torch.inf)
    do = randn(Tq, D, seed=7, dtype=torch.float64)
    wanted = torch.autograd.grad(o, inputs, do)
    with torch.no_grad():
        found = tiled_attention_backward(*inputs, o, L, do, key_ranges, *blocks)
    return list(zip(("dq", "dk", "dv"), found, wanted))


def gradient_of_values():
    _, _, (name, found, want) = gradients(6, 6, 4, causal(6, 6), (8, 8))
    near(found, want, name, 1e-9)


def gradient_of_one_tile():
    for name, found, want in gradients(6, 6, 4, causal(6, 6), (8, 8)):
        near(found, want, name, 1e-9)


def gradient_of_many_tiles():
    for name, found, want in gradients(21, 30, 4, causal(21, 30), (8, 4)):
        near(found, want, f"{name} of many tiles", 1e-9)


def gradient_with_holes():
    start = torch.tensor([0] * 6 + [6] * 8 + [16] * 2).int()
    end = torch.tensor([*range(1, 7), *range(7, 15), 16, 16]).int()
    for name, found, want in gradients(16, 16, 4, (start, end), (4, 8)):
        near(found, want, f"{name} of two documents and two queries without keys", 1e-9)


def gradient_in_little_memory():
    from kernels.tiled import tiled_attention, tiled_attention_backward

    q, k, v = heads(256, 256, 8)
    o, L = tiled_attention(q, k, v, causal(256, 256), 16, 16)
    with Watch() as watch:
        tiled_attention_backward(q, k, v, o, L, q, causal(256, 256), 16, 16)
    assert watch.largest <= 4096, (
        f"a tensor of {watch.largest:,} numbers: a gradient has 2,048, a tile 256"
    )


TILED_BACKWARD = Exercise(
    "tiled_backward",
    "The gradient, tile by tile",
    "kernels/tiled.py",
    ["tiled_attention_backward"],
    120,
    [
        Check(
            1,
            "the gradient of the values",
            "dV = Pᵀ·dO, and P = exp(s − L) needs no second softmax.",
            gradient_of_values,
        ),
        Check(
            2,
            "all three gradients of one tile",
            "The docstring of kernels/attention.py has the formulas. s has a scale.",
            gradient_of_one_tile,
        ),
        Check(
            2,
            "all three of many tiles",
            "δ of a query is one number for all of its tiles. Which gradients are sums?",
            gradient_of_many_tiles,
        ),
        Check(
            2,
            "documents, and queries without keys",
            "With L = +inf, exp(s − L) is 0. A hidden pair has no probability.",
            gradient_with_holes,
        ),
        Check(
            2,
            "no tensor larger than a gradient",
            "Only tiles of P and dS are ever there.",
            gradient_in_little_memory,
        ),
    ],
    {"10_tiled_backward_a.py": 1, "10_tiled_backward_b.py": 2, "10_tiled_backward_c.py": 4},
)


# ------------------------------------------------------------------------- Triton kernels
@contextmanager
def interpreter():
    """Triton's interpreter, and an error that is not wrapped in its own."""
    import kernels

    assert kernels.INTERPRET, "set TRITON_INTERPRET=1 and check again"
    kernels.set_kernels("triton")
    try:
        yield
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        raise error from None
    finally:
        kernels.set_kernels("auto")


def swiglu_agrees(gate, up, what, tolerance=1e-5):
    from kernels.swiglu import swiglu

    y = swiglu(gate, up)
    wide = gate.double()
    near(y, wide / (1 + (-wide).exp()) * up.double(), what, tolerance)


def swiglu_of_one_row():
    with interpreter():
        swiglu_agrees(randn(1, 2048), randn(1, 2048, seed=1), "one row of 2,048 numbers")


def swiglu_of_rows():
    with interpreter():
        swiglu_agrees(randn(3, 2048), randn(3, 2048, seed=1), "three rows")
        # Halves of one projection: rows do not follow each other in memory.
        both = randn(3, 4096, seed=2)
        swiglu_agrees(*both.chunk(2, dim=1), "the two halves of one tensor")
        swiglu_agrees(both[:, :2048], randn(3, 2048, seed=3), "half of a tensor and a whole one")


def swiglu_of_any_width():
    with interpreter():
        swiglu_agrees(randn(2, 4099), randn(2, 4099, seed=1), "rows of 4,099 numbers")
        swiglu_agrees(randn(5, 7), randn(5, 7, seed=1), "rows of 7 numbers")


def swiglu_in_bf16():
    with interpreter():
        gate, up = randn(2, 512).bfloat16(), randn(2, 512, seed=1).bfloat16()
        from kernels.swiglu import swiglu

        y, wide = swiglu(gate, up).double(), gate.double()
        want = wide / (1 + (-wide).exp()) * up.double()
        error = ((y - want).abs() / want.abs().clamp(min=1e-3)).max().item()
        # The interpreter cuts digits off, it does not round them: an error of 2^-7, once.
        assert error < 1.01 * 2**-7, f"a relative error of {error:.4f}: rounded more than once"


SWIGLU = Exercise(
    "swiglu_kernel",
    "A first Triton kernel",
    "kernels/swiglu.py",
    ["_forward_kernel"],
    40,
    [
        Check(
            1,
            "one row of one block",
            "tl.arange(0, BLOCK) are the offsets; tl.load, compute, tl.store.",
            swiglu_of_one_row,
        ),
        Check(
            1,
            "several rows, also of a wider tensor",
            "tl.program_id(0) is the row. gate and up have strides of their own.",
            swiglu_of_rows,
        ),
        Check(
            2,
            "rows of any width",
            "tl.program_id(1) is the block in the row. Offsets from N on need a mask.",
            swiglu_of_any_width,
        ),
        Check(
            1,
            "bf16 is rounded once, at the end",
            "Compute in tl.float32, then .to(y.dtype.element_ty).",
            swiglu_in_bf16,
        ),
    ],
    {"10_swiglu_a.py": 1, "10_swiglu_b.py": 2, "10_swiglu_c.py": 3},
    needs="triton",
)


def normalised(x, weight, eps=1e-5):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def norm_of_a_power_of_two():
    from kernels.rms_norm import rms_norm

    with interpreter():
        x, weight = 3 * randn(4, 64), 1 + 0.3 * randn(64, seed=1)
        near(rms_norm(x, weight), normalised(x, weight), "rows of 64 numbers", 1e-5)


def norm_of_any_width():
    from kernels.rms_norm import rms_norm

    with interpreter():
        for C in (5, 100):
            x, weight = 3 * randn(4, C), 1 + 0.3 * randn(C, seed=1)
            near(rms_norm(x, weight), normalised(x, weight), f"rows of {C} numbers", 1e-5)


def norm_of_part_of_a_tensor():
    from kernels.rms_norm import rms_norm

    with interpreter():
        x, weight = randn(4, 96)[:, 10:70], 1 + 0.3 * randn(60, seed=1)
        near(rms_norm(x, weight), normalised(x, weight), "columns 10 to 69 of a tensor", 1e-5)
        near(rms_norm(x, weight, 2.0), normalised(x, weight, 2.0), "eps = 2", 1e-5)


def norm_with_residual():
    from kernels.rms_norm import add_rms_norm

    with interpreter():
        x, residual, weight = randn(3, 20), randn(3, 40, seed=1)[:, 5:25], randn(20, seed=2)
        y, total = add_rms_norm(x, residual, weight)
        near(total, x.double() + residual.double(), "the sum", 1e-5)
        near(y, normalised(x + residual, weight), "the normalised sum", 1e-5)

        # In bf16 the next layer gets the rounded sum, so that one is normalised.
        x, residual = (30 * randn(64, 48)).bfloat16(), randn(64, 48, seed=9).bfloat16()
        weight = torch.ones(48)
        y, total = add_rms_norm(x, residual, weight)
        want = normalised(total, weight)
        error = ((y.double() - want).abs() / want.abs().clamp(min=1e-6)).max().item()
        assert error < 1.01 * 2**-7, f"bf16: not the norm of the rounded sum ({error:.4f})"


RMS_NORM = Exercise(
    "rms_norm_kernel",
    "RMSNorm as a Triton kernel",
    "kernels/rms_norm.py",
    ["_forward_kernel"],
    60,
    [
        Check(
            1,
            "rows of 64 numbers",
            "A program owns a row: tl.sum(xs * xs, 0), tl.rsqrt.",
            norm_of_a_power_of_two,
        ),
        Check(
            1,
            "rows of any width",
            "BLOCK is a power of two, C is not: what does the mean divide by?",
            norm_of_any_width,
        ),
        Check(
            1,
            "part of a wider tensor, and another eps",
            "Row r of x begins at r · x_stride, row r of y at r · C.",
            norm_of_part_of_a_tensor,
        ),
        Check(
            2,
            "with a residual (ADD)",
            "residual has its own stride. Store the sum in total's dtype; go on with that.",
            norm_with_residual,
        ),
    ],
    {"10_rms_norm_a.py": 1, "10_rms_norm_b.py": 2, "10_rms_norm_c.py": 3},
    needs="triton",
)

EXERCISES = [RANGES, TILED, TILED_BACKWARD, SWIGLU, RMS_NORM]
