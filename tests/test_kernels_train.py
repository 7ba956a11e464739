"""What the kernels are for, seen from outside: training with them is training with the
definitions."""

import dataclasses
import json

import pytest
import torch
from training_helpers import losses, run, weights, write_random_model


def test_fifty_steps_with_the_triton_kernels_follow_the_definitions(
    world, config, tokenizer_file, tmp_path
):
    """Image, ViT, projector and decoder train together, one layer each: interpreted on a CPU."""
    pytest.importorskip("triton")
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_hidden_layers=1, num_attention_heads=1),
        text=dataclasses.replace(
            config.text, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        ),
        vision_feature_layer=-1,
    )
    start = write_random_model(config, tokenizer_file, tmp_path / "start")
    records = [
        {
            "id": i,
            "image": str(world / f"{i}.png"),
            "conversations": [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": colour},
            ],
        }
        for i, colour in enumerate(("red", "blue"))
    ]
    (tmp_path / "set.json").write_text(json.dumps(records), encoding="utf-8")

    curves = {}
    more = "--batch-size 1 --steps 50 --lr 1e-2 --warmup-ratio 0.1 "
    more += "--trainable vision projector decoder"
    for kernels in ("torch", "triton"):
        out = tmp_path / kernels
        args = (*more.split(), "--kernels", kernels)
        done = run("instruct", start, tmp_path / "set.json", out, *args)
        assert done.returncode == 0, done.stderr
        curves[kernels] = losses(out)
    # A GPU's exp2 and rsqrt are approximations.
    tolerance = 1e-3 if torch.cuda.is_available() else 1e-5
    assert len(curves["torch"]) == 50
    assert curves["triton"] == pytest.approx(curves["torch"], rel=tolerance)
    assert sum(curves["torch"][-5:]) < 0.2 * sum(curves["torch"][:5]), "and they learn"

    before, after = weights(start), weights(tmp_path / "triton")
    assert any(
        not torch.equal(before[name], after[name])
        for name in before
        if name.startswith("vision_tower") and "self_attn.q_proj" in name
    ), "the ViT's attention had a gradient"
