"""Attention a tile at a time, against its definition and autograd."""

import pytest
import torch

from kernels.attention import attention_reference
from kernels.tiled import tiled_attention, tiled_attention_backward

CAUSAL = [0] * 20, list(range(1, 21))
# Two documents, and two queries that attend to nothing.
DOCUMENTS = [0] * 7 + [7] * 11 + [20] * 2, [*range(1, 8), *range(8, 19), 20, 20]


@pytest.mark.parametrize("ranges", [CAUSAL, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("blocks", [(32, 32), (8, 4), (3, 7)])
def test_tiles_give_the_definition_and_its_gradient(ranges, blocks):
    torch.manual_seed(0)
    q, k, v, do = torch.randn(4, 20, 8, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (q, k, v)]
    key_ranges = [torch.tensor(bound, dtype=torch.int32) for bound in ranges]
    batched = [each[None, :, None] for each in inputs]  # (T, D) -> (1, T, 1, D)
    want = attention_reference(*batched, key_ranges=[bound[None] for bound in key_ranges])[0, :, 0]
    gradients = torch.autograd.grad(want, inputs, do)

    with torch.no_grad():
        o, L = tiled_attention(*inputs, key_ranges, *blocks)
        found = tiled_attention_backward(*inputs, o, L, do, key_ranges, *blocks)
    assert torch.allclose(o, want, atol=1e-12)
    for ours, autograds in zip(found, gradients):
        assert torch.allclose(ours, autograds, atol=1e-12)
    is_empty = key_ranges[0] >= key_ranges[1]
    assert torch.equal(L == torch.inf, is_empty)
