"""What the kernels are for, looked at from outside: training with them is training with the definitions."""
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from model import XLlava


def test_fifty_steps_with_the_triton_kernels_follow_the_definitions(world, config, tokenizer_file, tmp_path):
    """Picture, ViT, projector and decoder learn together, one layer each: interpreted on a CPU."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    vision = dataclasses.replace(config.vision, num_hidden_layers=1, num_attention_heads=1)
    config = dataclasses.replace(config, vision=vision, text=dataclasses.replace(config.text, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1), vision_feature_layer=-1)
    checkpoint.save_model(XLlava(config).init_weights(), tokenizer_file, tmp_path / "start")
    records = [{"id": i, "image": str(world / f"{i}.png"), "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": ("red", "blue")[i % 2]}]} for i in range(2)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    curves = {}
    for kernels in ("torch", "triton"):
        done = subprocess.run(
            [sys.executable, Path(__file__).parent.parent / "train.py", "instruct", "--model", tmp_path / "start", "--data", tmp_path / "set.json", "-o", tmp_path / kernels, "--parts", "vision", "projector", "decoder",
             "--batch", "1", "--steps", "50", "--lr", "1e-2", "--warmup", "0.1", "--precision", "fp32", "--kernels", kernels], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        curves[kernels] = [json.loads(line)["loss"] for line in (tmp_path / kernels / "log.jsonl").read_text().splitlines()]
    assert len(curves["torch"]) == 50 and curves["triton"] == pytest.approx(curves["torch"], rel=1e-3 if torch.cuda.is_available() else 1e-5)  # a GPU's exp2 and rsqrt are approximations
    assert sum(curves["torch"][-5:]) < 0.2 * sum(curves["torch"][:5]), "and they learn"
    before, after = (checkpoint.load_safetensors(tmp_path / folder / "model.safetensors") for folder in ("start", "triton"))
    assert any("self_attn.q_proj" in name and not torch.equal(before[name], after[name]) for name in before if name.startswith("vision_tower")), "the ViT's attention had a gradient"
