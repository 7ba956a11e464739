"""The learning rate schedule, Muon, and which parameter goes to which optimizer."""

import dataclasses

import pytest
import torch

from model import XLlava
from train import RECIPES
from training.lora import set_trainable
from training.objectives import NextTokenObjective
from training.optimizers import (
    Muon,
    lr_multiplier,
    make_optimizers,
    orthogonalise,
    set_learning_rate,
)


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [lr_multiplier(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)

    # With a decay of 0.4 the rate is full from step 9 to 60, and half of it at step 80.
    rates = [lr_multiplier(step, 100, 0.1, 0.4) for step in range(101)]
    assert rates[:9] == pytest.approx([n / 10 for n in range(1, 10)]) and rates[9:61] == [1] * 52
    assert rates[80] == pytest.approx(0.5) and rates[100] == pytest.approx(0, abs=1e-12)
    assert lr_multiplier(5, 10, 0.9, 0.5) == pytest.approx(6 / 9)  # no decay while it rises


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_is_pytorchs_and_moves_a_matrix_by_all_its_directions_alike(monkeypatch, shape):
    monkeypatch.setattr("kernels.device.has_bf16", lambda device: True)  # PyTorch's has no other
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizers = (
        Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1),
    )
    for _ in range(4):
        for our, their in zip(ours, theirs):
            our.grad = torch.randn(shape)
            their.grad = our.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # Steps of 0.01 in bfloat16.
    assert all(torch.allclose(our, their, atol=1e-4) for our, their in zip(ours, theirs))

    low, high = torch.linalg.svdvals(orthogonalise(torch.randn(2, *shape)).float()).aminmax()
    assert 0.4 < low and high < 1.3


# Fifteen products are rounded to 2⁻⁹ of at most 1; in float32 a small singular value grows 3.4⁵
# times, and with it its error of 2⁻²⁴.
@pytest.mark.parametrize("has_bf16, tolerance", [(False, 1e-4), (True, 0.03)])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_multiplies_in_what_the_hardware_is_fast_in(monkeypatch, has_bf16, tolerance, shape):
    monkeypatch.setattr("kernels.device.has_bf16", lambda device: has_bf16)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    update = orthogonalise(x)
    assert update.dtype == (torch.bfloat16 if has_bf16 else torch.float32)

    # In float64, each singular value for itself.
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s /= s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    assert torch.allclose(update.double(), u * s[:, None] @ v, atol=tolerance)


def test_muon_takes_the_matrices_inside_blocks_and_adamw_the_rest(config):
    model = XLlava(config)
    recipe = dataclasses.replace(RECIPES["instruct"], muon_lr=0.01, weight_decay=0.1)
    set_trainable(model, ("vision", "projector", "decoder"))
    adamw, muon = make_optimizers(NextTokenObjective(model), recipe)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {name_of[parameter] for parameter in muon.param_groups[0]["params"]}
    by_adamw = {name_of[parameter] for parameter in adamw.param_groups[0]["params"]}

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert by_muon | by_adamw == trained and not by_muon & by_adamw
    # The projector takes the output of the first of two layers: the second does not train.
    assert not any(name.startswith(("vision.layers.1", "vision.final_norm")) for name in trained)
    assert "decoder.layers.0.attn.q_proj.weight" in by_muon
    assert "vision.layers.0.fc1.weight" in by_muon
    outside = {"decoder.embed_tokens.weight", "decoder.lm_head.weight", "projector.0.weight"}
    assert outside | {"decoder.layers.0.attn_norm.weight", "vision.layers.0.fc1.bias"} <= by_adamw

    # Each keeps its own full rate; the schedule scales both.
    assert set_learning_rate([adamw, muon], 0.5) == recipe.lr / 2
    assert muon.param_groups[0]["lr"] == 0.005
    assert adamw.param_groups[0]["betas"] == (0.9, recipe.beta2)
    assert adamw.param_groups[0]["weight_decay"] == muon.param_groups[0]["weight_decay"] == 0.1


def test_without_a_muon_rate_adamw_takes_all(config):
    model = XLlava(config)
    (adamw,) = make_optimizers(NextTokenObjective(model), RECIPES["instruct"])
    assert len(adamw.param_groups[0]["params"]) == len(list(model.parameters()))
