"""What the kernel tests share: inputs between guard bands, masks as key ranges, and `agree`, which
compares a kernel with its definition in float64.

How large may the difference be? The answer must not come from another program's error, which
differs between CPUs and their maths libraries. It comes from arithmetic, in three facts:

1. One rounding to a format changes a number x by at most |x|·eps/2, where eps is the distance from
   1 to the next number of that format (fp32 1.2e-7, fp16 9.8e-4, bf16 7.8e-3). See `rounding`.
2. A sum of products Σ a·b in fp32, in whatever order it is added, is rounded n times, each time
   by at most eps/2 of a partial sum, which is never larger than Σ |a|·|b|. The signs of n roundings
   are random, so together they are as large as √n of them. See `eps_of_sum`. The value of the sum
   does not matter: where large terms cancel, their errors remain. The gradient of a query with a
   single key is zero, computed as the difference of two equal numbers; Σ |a|·|b| tells their size.
3. An error that goes into a later step is multiplied by the derivative of that step: exp(s + d) is
   exp(s) times 1 + d, roughly; (x + d)·y is wrong by |d|·|y|.

So each `*_error` function follows the formulas of its kernel's file, in float64: fact 2 for each
sum, fact 1 wherever the kernel rounds to the dtype of its inputs, fact 3 for all that came before.
It returns for each output and each gradient, element by element, the error allowed before the
result itself is rounded.
"""

import functools
import itertools
import math

import numpy
import pytest
import torch

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if not kernels.HAVE_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)
if kernels.INTERPRET and kernels.triton.__version__.startswith("3.6"):
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        reason = "Triton 3.6 cannot interpret loops with numpy 2.4: pip install 'numpy<2.4'"
        pytest.skip(reason, allow_module_level=True)

EPS = torch.finfo(torch.float32).eps
# Some roundings and, on a GPU, two of exp2, log2, rsqrt and division: up to two eps each
FEW_EPS = 6 * EPS


def eps_of_sum(n):
    """Fact 2: the error of a sum of n products relative to Σ |a|·|b|."""
    return FEW_EPS + EPS / 2 * math.sqrt(n)


@pytest.fixture(autouse=True)
def triton_kernels():
    torch.manual_seed(0)
    kernels.set_kernels("triton")
    yield
    kernels.set_kernels("auto")


# Inputs


def guarded(*shape, dtype=torch.float32, scale=1.0):
    """Random numbers between NaNs: a kernel that reads past either end returns NaN."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 4096,), float("nan"), dtype=dtype, device=DEVICE)
    memory[2048 : 2048 + size] = (torch.randn(size) * scale).to(dtype)
    return memory[2048 : 2048 + size].view(shape)


class RoomyEmpty:
    """Replaces torch.empty and empty_like: each tensor gets a margin of sevens behind it."""

    def __init__(self, monkeypatch):
        self.made = []
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch, "empty_like", self.empty_like)

    def empty(self, *shape, **options):
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        memory = torch.full((size.numel() + 30000,), 7.0, **options)
        self.made.append((memory, size.numel()))
        return memory[: size.numel()].view(size)

    def empty_like(self, x):
        return self.empty(*x.shape, dtype=x.dtype, device=x.device)

    def margins_are_intact(self):
        return all((memory[size:] == 7).all() for memory, size in self.made)


# Masks: (start, end), int32 (B or 1, T), as attention takes them


def causal_ranges(T):
    end = torch.arange(1, T + 1, dtype=torch.int32, device=DEVICE)[None]
    return torch.zeros_like(end), end


def document_ranges(ids, causal=True):
    """ids (B, T): a run of equal numbers is one document; negative numbers are padding, which
    attends to nothing."""
    ranges = []
    for row in ids.tolist():
        ranges.append([])
        for document, tokens in itertools.groupby(row):
            first = len(ranges[-1])
            last = first + len(list(tokens))
            for i in range(first, last):
                visible = (first, i + 1 if causal else last)
                ranges[-1].append((i, i) if document < 0 else visible)
    return tuple(to_ranges(ranges).unbind(-1))


def to_ranges(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def left_padded_ranges(padding, T):
    """padding: how many of the T positions of each sequence are empty, on the left."""
    start = to_ranges([[n] * T for n in padding])
    return start, torch.maximum(start, causal_ranges(T)[1])


def prefix_ranges(prefix, T):
    """The first prefix[b] tokens attend to each other in both directions, the rest is causal."""
    start, end = causal_ranges(T)
    end = torch.maximum(end, to_ranges(prefix)[:, None])
    return torch.zeros_like(end), end


def window_ranges(T, window):
    """Causal, and at most `window` keys for each query."""
    _, end = causal_ranges(T)
    return (end - window).clamp(min=0), end


# The comparison


def random_gradient(o):
    return torch.randn(o.shape).to(o.device, o.dtype)


def run(choice, op, inputs, *rest, gradient=random_gradient, **options):
    """-> outputs, their gradients (gradient(o) for each, equal in every run) and input gradients,
    of the implementation that set_kernels(choice) selects."""
    kernels.set_kernels(choice)
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = op(*inputs, *rest, **options)
    out = out if isinstance(out, tuple) else (out,)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        out_grads = [gradient(o) for o in out]
    grads = torch.autograd.grad(out, inputs, out_grads)
    kernels.set_kernels("triton")
    return [o.detach() for o in out], out_grads, list(grads)


def results(op, inputs, *rest, **options):
    """-> outputs and input gradients of the kernel, in one list."""
    out, _, grads = run("triton", op, inputs, *rest, **options)
    return out + grads


def agree(op, inputs, *rest, gradient=random_gradient, **options):
    """Asserts that the kernel of `op` is right for these inputs: outputs, input gradients, dtypes.

    Returns the kernel's outputs and gradients."""
    out, out_grads, grads = run("triton", op, inputs, *rest, gradient=gradient, **options)
    inputs64, out_grads64 = ([x.double() for x in tensors] for tensors in (inputs, out_grads))
    given = iter(out_grads64)
    exact, _, exact_grads = run(
        "torch", op, inputs64, *rest, gradient=lambda o: next(given), **options
    )

    # A loss is fp32, everything else has the inputs' dtype; of two dtypes, the wider one.
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs))
    assert all(o.dtype == (dtype if o.dim() else torch.float32) for o in out), out
    assert all(g.dtype == x.dtype for g, x in zip(grads, inputs)), grads

    error = globals()[f"{op.__name__}_error"]
    allowed = error(*inputs64, *out_grads64, *rest, dtype=dtype, **options)
    assert len(allowed) == len(out + grads)
    for n, (ours, right, bound) in enumerate(zip(out + grads, exact + exact_grads, allowed)):
        check(ours, right, bound, f"result {n}")
    return out + grads


def check(ours, exact, allowed, name=""):
    """Asserts |ours − exact| ≤ allowed, plus the rounding of the result itself, element-wise."""
    assert ours.shape == exact.shape == allowed.shape, (name, ours.shape, allowed.shape)
    assert ours.isfinite().all(), f"{name} is not finite"
    allowed = allowed + rounding(exact, ours.dtype)
    excess = ((ours.double() - exact).abs() / allowed).max().item() if ours.numel() else 0.0
    assert excess <= 1, f"{name}: an error {excess:.3g} times as large as arithmetic explains"


def rounding(x, dtype):
    """Fact 1 for each number of x. Below the smallest normal number the distances stay the same.
    The interpreter cuts bf16 off instead of rounding it, which is twice the error."""
    info = torch.finfo(dtype)
    truncates = kernels.INTERPRET and dtype == torch.bfloat16
    return x.abs() * info.eps * (1.0 if truncates else 0.5) + info.tiny * info.eps


def attention_error(q, k, v, do, *, dtype, causal=True, key_ranges=None):
    """The formulas of kernels/attention.py. The kernel rounds P, O and dS to the inputs' dtype
    and, where heads share keys, each head's dK and dV."""
    Tq, H, D = q.shape[1:]
    Tk, K = k.shape[1:3]
    q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))  # (B, T, H, D) -> (B, H, T, D)
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))

    keys, end = torch.arange(Tk, device=q.device), torch.arange(Tq, device=q.device) + Tk - Tq + 1
    visible = keys < end[:, None] if causal else torch.ones(Tq, Tk, dtype=bool, device=q.device)
    if key_ranges is not None:
        start, end = (x[:, None, :, None] for x in key_ranges)
        visible = (keys >= start) & (keys < end)

    # Scores are sums of products; exp turns their errors into relative errors of P.
    score_sums = (D**-0.5 * q.abs() @ k.abs().mT * visible).amax(-1, keepdim=True)
    eps = eps_of_sum(max(Tq, Tk, D))
    relative = torch.expm1(eps * (1 + score_sums))
    scores = (D**-0.5 * q @ k.mT).masked_fill(~visible, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    del scores

    # O = P·V divided by the sum of P, and dV = Pᵀ·dO
    o, o_sums = p @ v, p @ v.abs()
    o_error = relative * o_sums + rounding(p, dtype) @ v.abs()
    dv_error = (relative * p + 2 * rounding(p, dtype)).mT @ do.abs()

    # δ is computed from the rounded O; dS = P ∘ (dP − δ) is rounded.
    delta_error = ((o_error + rounding(o, dtype)) * do.abs()).sum(-1, keepdim=True)
    delta_sums = (o_sums * do.abs()).sum(-1, keepdim=True)
    ds = p * (do @ v.mT - (o * do).sum(-1, keepdim=True))
    ds_error = p * (relative * (do.abs() @ v.abs().mT + delta_sums) + delta_error)
    ds_error += 2 * rounding(ds, dtype)
    dq_error = D**-0.5 * ds_error @ k.abs()
    dk_error = D**-0.5 * ds_error.mT @ q.abs()

    # (B, H, T, D) -> (B, T, H, D); heads that share keys are added.
    dk_error, dv_error = (x.unflatten(1, (K, -1)).sum(2) for x in (dk_error, dv_error))
    return [x.transpose(1, 2) for x in (o_error, dq_error, dk_error, dv_error)]


def attention_with_kvcache_error(q, k_cache, v_cache, lengths, *, dtype):
    """One query with the keys 0 … length; only an output."""
    end = lengths[:, None]
    q, ranges = q[:, None], (torch.zeros_like(end), end)
    return attention_error(q, k_cache, v_cache, q, dtype=dtype, key_ranges=ranges)[0][:, 0]


def rms_norm_error(x, weight, dy, eps=1e-5, *, dtype, x_error=0.0):
    """The formulas of kernels/rms_norm.py. x_error is a relative error that x already has: it is
    once in the root, twice in n = x·root, five times in the term root·n·mean(g·n)."""
    root = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    n, g = x * root, dy * weight
    y_error = (eps_of_sum(x.shape[-1]) + 2 * x_error) * (n * weight).abs()
    dx_sums = root * (g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True))
    dx_error = (eps_of_sum(x.shape[-1]) + 5 * x_error) * dx_sums
    dw_sums = (dy * n).abs().flatten(0, -2).sum(0)
    dw_eps = eps_of_sum(x.shape[-1]) + eps_of_sum(x[..., 0].numel())
    return [y_error, dx_error, (dw_eps + 2 * x_error) * dw_sums]


def add_rms_norm_error(x, residual, weight, dy, dtotal, eps=1e-5, *, dtype):
    """The norm of a rounded sum; the gradient of the sum itself is added to that of the norm."""
    total, one = x + residual, torch.ones(())
    y_error, dx_error, dw_error = rms_norm_error(
        total, weight, dy, eps, dtype=dtype, x_error=rounding(one, dtype).item()
    )
    dx_error += FEW_EPS * dtotal.abs()
    return [y_error, FEW_EPS * total.abs(), dx_error, dx_error, dw_error]


def rope_error(q, k, dq, dk, cos, sin, positions=None, *, dtype):
    """Two products each; the gradient is a rotation as well, of the outputs' gradients."""
    positions = torch.arange(q.shape[1], device=q.device) if positions is None else positions
    c, s = cos[positions].abs().unsqueeze(-2), sin[positions].abs().unsqueeze(-2)

    def sums(x):
        a, b = x.abs().chunk(2, dim=-1)
        return torch.cat((a * c + b * s, b * c + a * s), dim=-1)

    return [FEW_EPS * sums(x) for x in (q, k, dq, dk)]


def swiglu_error(gate, up, dy, *, dtype):
    """exp(−gate) has the relative error eps·|gate|, and so has the sigmoid s. dgate has it twice:
    in s and in 1 + gate·(1 − s), whose error is at most eps·(1 + |gate|)²."""
    relative = FEW_EPS * (1 + gate.abs())
    s = torch.sigmoid(gate)
    y_error, dup_error = relative * (gate * s * up).abs(), relative * (gate * s * dy).abs()
    return [y_error, relative * (1 + gate.abs()) * (s * dy * up).abs(), dup_error]


def linear_cross_entropy_error(hidden, weight, dloss, targets, ignore_index=-100, *, dtype):
    """The formulas of kernels/cross_entropy.py. The kernel rounds the logits, their gradients, dx
    and dw, the part of dx that the last V % 64 pieces give, and the loss's gradient that dx and dw
    are multiplied by."""
    (N, C), V = hidden.shape, len(weight)
    is_target = (targets != ignore_index)[:, None]
    index = targets.where(is_target[:, 0], 0)[:, None]
    logits = hidden @ weight.T
    logits_error = eps_of_sum(C) * hidden.abs() @ weight.abs().T + rounding(logits, dtype)

    # log-sum-exp: its derivative by the logits is their softmax p.
    p = logits.softmax(-1)
    lse_error = (p * logits_error).sum(-1, keepdim=True)
    lse_error += eps_of_sum(V) + FEW_EPS * logits.abs().amax(-1, keepdim=True)
    loss = logits.logsumexp(-1, keepdim=True) - logits.gather(1, index)
    loss_error = lse_error + logits_error.gather(1, index) + eps_of_sum(N) * loss

    dlogits = (p - torch.zeros_like(p).scatter_(1, index, 1.0)) * is_target
    p_error = p * torch.expm1(logits_error + lse_error)
    dlogits_error = (p_error + rounding(dlogits, dtype)) * is_target
    dx_error = (dlogits_error + eps_of_sum(V) * dlogits.abs()) @ weight.abs()
    dw_error = (dlogits_error + eps_of_sum(N) * dlogits.abs()).T @ hidden.abs()
    last = slice(V // 64 * 64, V)
    dx_error += 2 * rounding(dlogits @ weight, dtype)
    dx_error += rounding(dlogits[:, last] @ weight[last], dtype)
    dw_error += 2 * rounding(dlogits.T @ hidden, dtype)
    return [(loss_error * is_target).sum(), dloss.abs() * dx_error, dloss.abs() * dw_error]
