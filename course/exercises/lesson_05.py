"""Lesson 5: attention, RoPE, RMSNorm, SwiGLU."""

import functools

import torch
from torch.nn import functional as F

from course.exercise import Check, Exercise
from course.exercises import tiny
from course.exercises.tiny import attend_by_loops, near, randn

TITLE = "Attention, RoPE, RMSNorm, SwiGLU"


# ------------------------------------------------------------------------------------ RMSNorm
def norm_of_one_vector():
    from kernels.rms_norm import rms_norm_reference

    # mean(3², 4²) = 12.5. By hand: 3 / 12.5^½ = 0.848528, 4 / 12.5^½ = 1.131371.
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0])
    got = rms_norm_reference(x, weight, 0.0)
    near(got, torch.tensor([[0.848528, 11.31371]]), "(3, 4) with weights (1, 10)")


def norm_of_small_vector():
    from kernels.rms_norm import rms_norm_reference

    # mean(x²) = 1e-6 = eps, so the vector is divided by sqrt(2e-6).
    x = torch.full((2, 8), 1e-3)
    got = rms_norm_reference(x, torch.ones(8), 1e-6)
    near(got, torch.full((2, 8), 0.5**0.5), "a vector as small as eps")


def norm_in_bf16():
    from kernels.rms_norm import rms_norm_reference

    x = 30 * randn(64, 512, dtype=torch.bfloat16)
    weight = 1 + 0.1 * randn(512, seed=1)
    got = rms_norm_reference(x, weight, 1e-5)
    assert got.dtype == torch.bfloat16, f"the result is {got.dtype}, must be x's dtype"

    # bf16 keeps 8 bits: rounded once, at the end, the relative error is at most 2^-8.
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    error = ((got.double() - want) / want).abs().max().item()
    assert error < 1.01 * 2**-8, f"a relative error of {error:.4f}: rounded more than once"


def norm_in_float64():
    from kernels.rms_norm import rms_norm_reference

    x, weight = randn(3, 6, dtype=torch.float64), randn(6, seed=1, dtype=torch.float64)
    weight.requires_grad_()
    x.requires_grad_()
    # Finite differences need all digits of float64.
    is_exact = torch.autograd.gradcheck(
        rms_norm_reference, (x, weight, 1e-5), raise_exception=False
    )
    assert is_exact, "the gradient of float64 is not that of finite differences"


def norm_with_its_gradient():
    from kernels.rms_norm import ExplicitGradient

    x, weight = randn(3, 6), randn(6, seed=1)
    want = F.rms_norm(x, (6,), weight, 1e-5)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        got = ExplicitGradient.apply(x, weight, 1e-5, dtype)
        assert got.dtype == dtype, f"{dtype} is asked for, the result is {got.dtype}"
        near(got, want, f"ExplicitGradient, {dtype} asked for", error)

    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    is_exact = torch.autograd.gradcheck(
        lambda x, weight: ExplicitGradient.apply(x, weight, 1e-5, torch.float64),
        (x, weight),
        raise_exception=False,
    )
    assert is_exact, "backward makes another gradient of what forward saved than it should"


# ------------------------------------------------------------------------------------ RoPE
def angles(length, half):
    """cos and sin of random angles, float32 (length, half)."""
    table = 3 * randn(length, half, seed=9)
    return table.cos(), table.sin()


def rope_of_one_pair():
    from kernels.rope import rope_reference

    # A quarter turn takes (x, y) to (−y, x). Head dim 2: one pair of channels.
    cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    q = torch.tensor([1.0, 2.0]).expand(1, 2, 3, 2)  # (B, T, H, D)
    k = torch.tensor([5.0, -7.0]).expand(1, 2, 1, 2)
    q_rotated, k_rotated = rope_reference(q, k, cos, sin)
    near(q_rotated[:, 0], q[:, 0], "position 0 with angle 0")
    near(q_rotated[:, 1], torch.tensor([-2.0, 1.0]).expand(1, 3, 2), "a quarter turn of (1, 2)")
    near(k_rotated[:, 1], torch.tensor([7.0, 5.0]).expand(1, 1, 2), "a quarter turn of (5, −7)")


def rope_pairs_halves():
    from kernels.rope import rope_reference

    # As complex numbers: channel i is the real part, channel i + D/2 the imaginary part.
    q, k, (cos, sin) = randn(2, 5, 4, 8), randn(2, 5, 2, 8, seed=1), angles(7, 4)
    turn = torch.complex(cos, sin)[:5, None, :]
    for got, x in zip(rope_reference(q, k, cos, sin), (q, k)):
        turned = torch.complex(x[..., :4].contiguous(), x[..., 4:].contiguous()) * turn
        near(got, torch.cat([turned.real, turned.imag], dim=-1), "the pairs (i, i + D/2)")


def rope_keeps_dtype():
    from kernels.rope import rope_reference

    q, k, table = randn(1, 3, 2, 4).bfloat16(), randn(1, 3, 1, 4).bfloat16(), angles(3, 2)
    for name, x in zip("qk", rope_reference(q, k, *table)):
        assert x.dtype == torch.bfloat16, f"{name} is bf16 and becomes {x.dtype}"


def rope_takes_positions():
    rope_keeps_dtype()

    from kernels.rope import rope_reference

    q, k, (cos, sin) = randn(2, 3, 4, 8), randn(2, 3, 2, 8, seed=1), angles(9, 4)
    positions = torch.tensor([[4, 5, 6], [8, 0, 1]])
    got = rope_reference(q, k, cos, sin, positions)
    for b in range(2):
        for t in range(3):
            p = positions[b, t]
            one = q[b : b + 1, t : t + 1], k[b : b + 1, t : t + 1]
            alone = rope_reference(*one, cos[p : p + 1], sin[p : p + 1])
            for name, x, want in zip("qk", got, alone):
                near(x[b, t], want[0, 0], f"{name}, sample {b}, token {t}, position {p}")


# ------------------------------------------------------------------------------------ SwiGLU
def swiglu_closed_gate():
    from kernels.swiglu import swiglu_reference

    up = randn(2, 3, 8)
    near(swiglu_reference(torch.zeros(2, 3, 8), up), torch.zeros(2, 3, 8), "a gate of zeros")


def swiglu_is_linear_in_up():
    from kernels.swiglu import swiglu_reference

    gate, up = randn(4, 8), randn(4, 8, seed=1)
    got = swiglu_reference(gate, 3 * up)
    near(got, 3 * swiglu_reference(gate, up), "three times `up`, three times the result")


def swiglu_of_numbers():
    from kernels.swiglu import swiglu_reference

    # silu(1) = 1 / (1 + e^-1) = 0.731059, silu(-1) = -0.268941, silu(3) = 2.857722.
    gate, up = torch.tensor([1.0, -1.0, 3.0]), torch.tensor([2.0, 2.0, 1.0])
    near(swiglu_reference(gate, up), torch.tensor([1.462117, -0.537883, 2.857722]), "three numbers")


# ------------------------------------------------------------------------------------ attention
def random_qkv(Tq, Tk, H, K):
    return randn(2, Tq, H, 8), randn(2, Tk, K, 8, seed=1), randn(2, Tk, K, 8, seed=2)


def attends_to_everything():
    from kernels.attention import attention_reference

    q, k, v = random_qkv(3, 5, 2, 2)
    want = attend_by_loops(q, k, v, lambda b, i, j: True)
    near(attention_reference(q, k, v, causal=False), want, "3 queries, 5 keys, no mask")


def attends_causally():
    from kernels.attention import attention_reference

    q, k, v = random_qkv(6, 6, 2, 2)
    want = attend_by_loops(q, k, v, lambda b, i, j: j <= i)
    near(attention_reference(q, k, v), want, "6 queries, 6 keys, causal")


def shares_key_heads():
    from kernels.attention import attention_reference

    q, k, v = random_qkv(5, 5, 6, 2)
    want = attend_by_loops(q, k, v, lambda b, i, j: j <= i)
    near(attention_reference(q, k, v), want, "6 query heads on 2 key heads")


def aligns_last_query_with_last_key():
    from kernels.attention import attention_reference

    q, k, v = random_qkv(2, 6, 2, 1)
    want = attend_by_loops(q, k, v, lambda b, i, j: j <= i + 4)
    near(attention_reference(q, k, v), want, "the last 2 queries of 6 keys, causal")


def attends_in_key_ranges():
    from kernels.attention import attention_reference

    # Two packed documents of 3 and 2 tokens; in the second sample one query sees nothing.
    q, k, v = random_qkv(5, 5, 2, 1)
    start = torch.tensor([[0, 0, 0, 3, 3], [1, 1, 2, 2, 2]], dtype=torch.int32)
    end = torch.tensor([[1, 2, 3, 4, 5], [0, 3, 3, 4, 5]], dtype=torch.int32)
    want = attend_by_loops(q, k, v, lambda b, i, j: start[b, i] <= j < end[b, i])
    for causal in (True, False):  # ranges replace the causal mask
        got = attention_reference(q, k, v, causal=causal, key_ranges=(start, end))
        assert got.isfinite().all(), "a query without a visible key must give 0, not NaN"
        near(got, want, f"key ranges, causal={causal}")


def attends_at_the_edges():
    from kernels.attention import attention_reference

    # Heads of 4 channels, scores of some ten thousands, 5 queries on the last 3 places.
    q, k, v = 20_000 * randn(2, 5, 4, 4), randn(2, 3, 2, 4, seed=1), randn(2, 3, 2, 4, seed=2)
    q, k, v = q.double(), k.double(), v.double()
    inputs = [x.clone() for x in (q, k, v)]
    want = attend_by_loops(q, k, v, lambda b, i, j: j <= i - 2)
    got = attention_reference(q, k, v)
    near(got, want, "5 queries, 3 keys, large scores", 1e-9)
    want = attend_by_loops(q / 20_000, k, v, lambda b, i, j: j <= i - 2)
    near(attention_reference(q / 20_000, k, v), want, "5 queries, 3 keys, heads of 4", 1e-9)
    assert got.dtype == torch.float64, f"float64 becomes {got.dtype}"
    for name, before, after in zip("qkv", inputs, (q, k, v)):
        assert torch.equal(before, after), f"{name} itself was changed"
    got = attention_reference(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert got.dtype == torch.bfloat16, f"bf16 becomes {got.dtype}"


# ------------------------------------------------------------------------------------ the module
def given_attention(q, k, v, causal=True, key_ranges=None):
    """Attention by torch's own operator: the module can be written before the definition."""
    keys, group = torch.arange(k.shape[1]), q.shape[2] // k.shape[2]
    visible = keys <= torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    if key_ranges is not None:
        start, end = key_ranges
        visible = ((keys >= start[..., None]) & (keys < end[..., None]))[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


def given_rope(q, k, cos, sin, positions=None):
    """RoPE by complex numbers."""
    turns = torch.complex(cos, sin)
    turns = (turns[: q.shape[1]] if positions is None else turns[positions]).unsqueeze(-2)
    turned = [
        torch.complex(*(part.contiguous() for part in x.chunk(2, -1))) * turns for x in (q, k)
    ]
    return [torch.cat([x.real, x.imag], dim=-1) for x in turned]


def given_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def with_given_parts(check):
    """A check of the module that does not need the other exercises of this lesson."""

    @functools.wraps(check)
    def run():
        import model

        parts = {"attention": given_attention, "apply_rope": given_rope, "rms_norm": given_norm}
        ours = {name: getattr(model, name) for name in parts}
        for name, part in parts.items():
            setattr(model, name, part)
        try:
            check()
        finally:
            for name, part in ours.items():
                setattr(model, name, part)

    return run


def attend_as_torch(layer, x, cos, sin, normed=False):
    """The attention module in float64, by torch's own attention and complex numbers."""
    B, T, _ = x.shape

    def heads(linear):
        weight = linear.weight.double()
        return (x.double() @ weight.T).view(B, T, -1, layer.head_dim).transpose(1, 2)

    def turn(tensor, norm):
        if normed:
            scale = (tensor.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
            tensor = tensor * scale * norm.weight.double()
        half = tensor.shape[-1] // 2
        turns = torch.complex(cos.double(), sin.double())[:T]
        turned = torch.complex(tensor[..., :half], tensor[..., half:].contiguous()) * turns
        return torch.cat([turned.real, turned.imag], dim=-1)

    q, k = turn(heads(layer.q_proj), layer.q_norm), turn(heads(layer.k_proj), layer.k_norm)
    v, group = heads(layer.v_proj), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).reshape(B, T, -1) @ layer.o_proj.weight.double().T


def layer_and_input(model_type="llama"):
    model = tiny.model(model_type=model_type)
    return model.decoder.layers[0].attn, randn(2, 6, 32), model.decoder.rope_cos_sin(6, "cpu")


@with_given_parts
def module_with_one_token():
    # One token attends to itself alone: the output is o_proj(v), whatever q and k are.
    layer, x, rope = layer_and_input()
    got = layer(x[:, :1], (*rope, None))
    v = layer.v_proj(x[:, :1]).view(2, 1, 2, 8).repeat_interleave(2, dim=2)
    near(got, layer.o_proj(v.reshape(2, 1, 32)), "a sequence of one token")


@with_given_parts
def module_as_torch_computes_it():
    layer, x, rope = layer_and_input()
    near(layer(x, (*rope, None)), attend_as_torch(layer, x, *rope), "6 tokens, causal")


@with_given_parts
def module_norms_heads():
    layer, x, rope = layer_and_input("qwen3")
    want = attend_as_torch(layer, x, *rope, normed=True)
    near(layer(x, (*rope, None)), want, "Qwen3: q and k are normed before they are rotated")


@with_given_parts
def module_at_loss_positions():
    from model import Layout

    layer, x, rope = layer_and_input()
    positions = torch.tensor([1, 5, 6, 11])  # b·T + t
    got = layer(x, (*rope, None), Layout(loss_positions=positions))
    want = attend_as_torch(layer, x, *rope).reshape(12, 32)[positions]
    near(got, want, "the output at 4 of 12 positions")


@with_given_parts
def module_goes_each_way():
    from model import Layout

    layer, x, rope = layer_and_input()
    first, second = layer(x[:, :4], (*rope, None)), layer(x[:, 4:], (*rope, None))

    # Two documents of 4 and 2 tokens in one row.
    start = torch.tensor([[0, 0, 0, 0, 4, 4]]).expand(2, 6).int().contiguous()
    end = torch.arange(1, 7)[None].expand(2, 6).int().contiguous()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    got = layer(x, (*rope, positions), Layout(positions, (start, end)))
    near(got, torch.cat([first, second], dim=1), "two packed documents, as each alone")

    # Two records behind a prefix of 2 tokens: 0 1 2 3 and 0 1 4 5. Both samples lie in one row.
    prefixes = torch.tensor([[0, 1], [6, 7]])
    own = torch.tensor([[2, 3], [4, 5], [8, 9], [10, 11]])
    keys = torch.cat([prefixes.repeat_interleave(2, dim=0), own], dim=1)
    merge = torch.tensor([0, 1, 4, 5, 6, 7, 2, 3, 8, 9, 10, 11])
    positions = torch.tensor([[0, 1, 2, 3, 2, 3] * 2])
    layout = Layout(positions, None, (prefixes, ((own, keys),), merge))
    got = layer(x.view(1, 12, 32), (*rope, positions), layout).view(2, 6, 32)
    alone = layer(x[:, [0, 1, 4, 5]], (*rope, None))
    near(got, torch.cat([first, alone[:, 2:]], dim=1), "two records side by side, as each alone")

    # With a cache that holds the first 4 tokens.
    cache = (torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 8), torch.tensor([0, 0]))
    layer(x[:, :4], (*rope, None), cache=cache)
    positions = torch.tensor([[4, 5], [4, 5]])
    got = layer(x[:, 4:], (*rope, positions), cache=(*cache[:2], torch.tensor([4, 4])))
    near(got, layer(x, (*rope, None))[:, 4:], "tokens 4 and 5 behind a cache")


# ------------------------------------------------------------------------------------ exercises
EXERCISES = [
    Exercise(
        name="rms_norm",
        title="RMSNorm",
        file="kernels/rms_norm.py",
        functions=["rms_norm_reference", "ExplicitGradient.forward"],
        minutes=20,
        checks=[
            Check(
                1,
                "one vector, by hand",
                "Which number does the vector (3, 4) get divided by? Write it down first.",
                norm_of_one_vector,
            ),
            Check(
                1,
                "eps is under the root",
                "Where does the formula at the top of the file have eps?",
                norm_of_small_vector,
            ),
            Check(
                2,
                "bf16 in, bf16 out, float32 between",
                "Print the dtype after each operation. Where is the result rounded?",
                norm_in_bf16,
            ),
            Check(
                1,
                "float64 stays float64: finite differences agree with the gradient",
                "The input of finite differences is float64. Does your code make it narrower?",
                norm_in_float64,
            ),
            Check(
                1,
                "once more, for a gradient by formulas",
                "ctx.save_for_backward keeps tensors: those that `backward` unpacks, in its order.",
                norm_with_its_gradient,
            ),
        ],
        wrong={"05_rms_norm_a.py": 1, "05_rms_norm_b.py": 2, "05_rms_norm_c.py": 4},
    ),
    Exercise(
        name="rope",
        title="Rotary position embedding",
        file="kernels/rope.py",
        functions=["rope_reference"],
        minutes=30,
        checks=[
            Check(
                1,
                "a quarter turn, by hand",
                "Draw (1, 2) and turn it by 90 degrees, against the clock.",
                rope_of_one_pair,
            ),
            Check(
                2,
                "the pairs are (i, i + D/2)",
                "With D = 8, which channel turns with channel 1? Read the top of the file.",
                rope_pairs_halves,
            ),
            Check(
                2,
                "each token turns by the angle of its own position",
                "positions is (B, T). Which shape has cos[positions]?",
                rope_takes_positions,
            ),
        ],
        wrong={"05_rope_a.py": 1, "05_rope_b.py": 2},
    ),
    Exercise(
        name="swiglu",
        title="The gate of the MLP",
        file="kernels/swiglu.py",
        functions=["swiglu_reference"],
        minutes=5,
        checks=[
            Check(
                1,
                "a gate of zeros lets nothing through",
                "silu(0) = 0.",
                swiglu_closed_gate,
            ),
            Check(
                1,
                "linear in `up`",
                "Which of the two goes through the curve?",
                swiglu_is_linear_in_up,
            ),
            Check(
                1,
                "three numbers, by hand",
                "silu(x) = x · sigmoid(x). It is not GELU.",
                swiglu_of_numbers,
            ),
        ],
        wrong={"05_swiglu_a.py": 1, "05_swiglu_b.py": 2},
    ),
    Exercise(
        name="attention",
        title="Attention: the definition that the fast kernels are measured by",
        file="kernels/attention.py",
        functions=["attention_reference"],
        minutes=120,
        checks=[
            Check(
                1,
                "without a mask, as a loop in float64 computes it",
                "softmax(q kᵀ / √D) v. Over which dimension does the softmax go?",
                attends_to_everything,
            ),
            Check(
                1,
                "causal",
                "May the first token attend to itself? It must: it has nothing else.",
                attends_causally,
            ),
            Check(
                2,
                "several query heads share a key head",
                "With 6 query heads and 2 key heads, heads 0, 1, 2 use key head 0.",
                shares_key_heads,
            ),
            Check(
                2,
                "fewer queries than keys: the last ones meet",
                "2 queries, 6 keys: the queries are the tokens 4 and 5. What may token 4 see?",
                aligns_last_query_with_last_key,
            ),
            Check(
                3,
                "key ranges, and a query that sees nothing",
                "What is a softmax over −inf alone? Use a large negative number, and zeros after.",
                attends_in_key_ranges,
            ),
            Check(
                2,
                "large scores, more queries than keys, and types that stay",
                "Which number hides a key whatever the scores? Which dtype has the result?",
                attends_at_the_edges,
            ),
        ],
        wrong={
            "05_attention_a.py": 2,
            "05_attention_b.py": 3,
            "05_attention_c.py": 4,
        },
    ),
    Exercise(
        name="attention_module",
        title="From x to attention and back to x",
        file="model.py",
        functions=["Attention.forward"],
        minutes=40,
        checks=[
            Check(
                1,
                "a single token attends to itself",
                "Is o_proj applied to all heads of a token at once, side by side?",
                module_with_one_token,
            ),
            Check(
                2,
                "six tokens, as torch's attention in float64",
                "Which of q, k and v carry the position? Read the first lines of kernels/rope.py.",
                module_as_torch_computes_it,
            ),
            Check(
                1,
                "Qwen3's norms",
                "q_norm and k_norm are nn.Identity for Llama. What comes first, norm or rotation?",
                module_norms_heads,
            ),
            Check(
                1,
                "only where the loss needs it",
                "select_positions makes (B, T, C) into (n, C). Where is it cheapest?",
                module_at_loss_positions,
            ),
            Check(
                2,
                "packed documents, records side by side, a cache",
                "There is a method for each way to attend. What in `layout` tells them apart?",
                module_goes_each_way,
            ),
        ],
        wrong={"05_attention_module_a.py": 1, "05_attention_module_b.py": 2},
    ),
]
