"""FLOPs and estimates, against numbers counted by hand."""

import argparse

import numpy as np
import torch
from training_helpers import write_captions

from data import Sample
from kernels.device import peak_flops
from model import XLlava
from train import RECIPES, StepStats
from training.cost import (
    GIB,
    SampleStats,
    flops_per_unit,
    measure_samples,
    memory_per_rank,
    memory_verdict,
    step_flops,
)
from training.lora import set_trainable


def test_of_lora_only_the_adapters_cost_a_gradient_of_their_own(config):
    model = XLlava(config)
    set_trainable(model, RECIPES["instruct"].trainable, 2)
    last = f"{config.text.num_hidden_layers - 1}."

    # Per weight: 2 forward, 2 for the gradient of its input, 2 for its own. In the last block only
    # queries, keys and values are computed for all tokens.
    want = sum(
        weight.numel() * (6 if name.endswith((".down", ".up")) else 4)
        for name, weight in model.decoder.layers.named_parameters()
        if weight.dim() == 2 and not (name.startswith(last) and ("o_proj" in name or "mlp" in name))
    )
    assert flops_per_unit(model).token == want


def test_the_flops_of_a_step_are_the_matrix_products_counted_by_hand(config):
    """The tiny model of the tests, the projector and the decoder train: C = 32, 4 heads and 2
    key-value heads of 8, I = 48, two layers; the ViT runs one layer of width 16 on 4 patches."""
    model = XLlava(config)
    set_trainable(model, RECIPES["instruct"].trainable)
    qkv, after = 32 * (32 + 16 + 16), 32 * 32 + 3 * 32 * 48
    V, flops = config.text.vocab_size, flops_per_unit(model)
    assert flops.token == 6 * (2 * qkv + after)
    assert flops.target == 6 * (after + 32 * V)
    assert flops.attention_pair == 3 * (2 * 2 * 32) * 2 // 2  # q·k and p·v, half of them masked
    layer = 4 * 16 * 16 + 2 * 16 * 32
    vit = 2 * 4 * (layer + 3 * 8 * 8 * 16 + 2 * 4 * 16)
    assert flops.image == vit + 4 * 4 * (16 * 32 + 32 * 32)

    stats = StepStats(3, 10, 12, 2, 70, 0)
    want = 10 * flops.token + 3 * flops.target + 2 * flops.image + 70 * flops.attention_pair
    assert step_flops(flops, stats) == want


def test_a_gpus_peak_is_found_by_its_name(monkeypatch):
    gpu = torch.device("cuda", 0)
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88e12),
        ("NVIDIA L40", None),  # neither an L4 nor an L40S
        ("NVIDIA T400 4GB", None),
        ("?", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_an_estimate_counts_what_the_run_would_hold(train_here, config, tmp_path):
    text, code = train_here("align", "captions.json", "--estimate", 2, "--gpu", "H200")
    vision, projector, decoder = (
        sum(weight.numel() for weight in part.parameters()) for part in XLlava(config).children()
    )
    assert code == 0
    assert f"{projector:,} parameters train, {vision + decoder:,} are frozen" in text
    assert "12 samples" in text and "3 steps an epoch" in text
    assert "hours on 2 × H200 at an MFU of 40%" in text
    assert text.rstrip().endswith("fits on a H200 of 141 GiB")
    # Weights, for the projector a gradient's two means.
    gib = [4 * n / 2**30 for n in (vision + projector + decoder, 3 * projector)]
    assert f"the model {gib[0]:.2f} GiB, up to 3 checkpoints of {gib[1]:.2f} GiB" in text
    assert not (tmp_path / "out").exists()


def test_the_memory_of_weights_gradients_and_optimizer_is_counted_by_hand(config):
    model = XLlava(config)
    set_trainable(model, RECIPES["instruct"].trainable)
    stats = SampleStats(40.0, 10.0, 1.0, 1600.0, 50, 1.0)
    flags = {"micro_batch_size": 0, "batch_size": 8, "estimate": 4, "pack": 0, "muon_lr": 0.01}
    flags |= {"activation_checkpointing": False, "fsdp": False, "validate": None}
    args = argparse.Namespace(**flags)
    total = sum(weight.numel() for weight in model.parameters())
    vision = sum(weight.numel() for weight in model.vision.parameters())
    # Per layer of the ViT, of width 16: q, k, v, out and two matrices of the MLP, with biases.
    linear = 2 * (4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16)
    trained = total - vision
    in_muon = sum(
        weight.numel() for weight in model.decoder.layers.parameters() if weight.dim() == 2
    )

    memory = memory_per_rank(model, args, stats)
    assert memory["weights (fp32)"] == 4 * (total - linear)
    assert memory["their bf16 copies"] == memory["weights (fp32)"] / 2
    assert memory["frozen weights (bf16)"] == 2 * linear
    assert memory["gradients (fp32)"] == 4 * trained
    assert memory["optimizer"] == 8 * (trained - in_muon) + 4 * in_muon
    # Two samples of 50 tokens; per block two residuals in fp32, two normed copies in bf16, then
    # q, k, v and output in bf16, gate, up and their product in bf16.
    block = 2 * 4 * 32 + 2 * 2 * 32 + 2 * (32 + 16 + 16 + 32) + 3 * 2 * 48
    assert memory["activations (estimate)"] == 2 * 50 * 2 * block

    args.fsdp, args.activation_checkpointing = True, True
    sharded = memory_per_rank(model, args, stats)
    for name in ("gradients (fp32)", "optimizer"):
        assert sharded[name] == memory[name] / 4
    assert sharded["weights (fp32)"] == 4 * total / 4 and not sharded["frozen weights (bf16)"]
    assert sharded["their bf16 copies"] < memory["their bf16 copies"]
    # Each block keeps its input in fp32, one block is recomputed.
    assert sharded["activations (estimate)"] == 2 * 50 * (2 * 4 * 32 + block)

    # A validation needs a whole model in bf16, and 2 GiB, when what a step needs is free again.
    args.validate, kept = "questions.json", ("weights (fp32)", "frozen weights (bf16)", "optimizer")
    watched = sum(memory_per_rank(model, args, stats).values())
    assert watched == sum(sharded[name] for name in kept) + 2 * total + 2 * 2**30


def test_the_longest_sample_decides_what_a_batch_holds():
    """Of 1,000 samples one is long, and none of the 200 that are evenly spread."""

    class Samples:
        sort_keys, paths = np.full(1000, 9), ["a.json"]
        sort_keys[501] = 90

        def __len__(self):
            return 1000

        def sample(self, i):
            n = int(self.sort_keys[i])
            return Sample([1] * (n + 1), [0] + [1] * n, [])

    stats = measure_samples(Samples(), "error")
    assert stats.max_tokens == 90 and stats.num_tokens == 9


def test_the_verdict_names_the_fewest_flags_with_which_a_run_fits(config):
    """The tiny model on a GPU of as many bytes as are left to it: 10% of them are not used."""
    stats = SampleStats(40.0, 10.0, 1.0, 1600.0, 50, 1.0)
    flags = {"micro_batch_size": 0, "batch_size": 8, "estimate": 4, "pack": 0, "muon_lr": 0}
    flags |= {"activation_checkpointing": False, "fsdp": False, "gpu": "L4", "lora_rank": 0}
    flags["validate"] = None
    args = argparse.Namespace(**flags, trainable=RECIPES["instruct"].trainable)

    def trained(rank=0):
        model = XLlava(config)
        set_trainable(model, args.trainable, rank)
        return model

    def used(rank=0, **changes):
        """The memory with other flags, in bytes."""
        changed = argparse.Namespace(**vars(args) | changes)
        return sum(memory_per_rank(trained(rank), changed, stats).values())

    def verdict(num_bytes):
        return memory_verdict(trained(), args, stats, used() / GIB, num_bytes / 0.9 / GIB)

    assert verdict(used() * 1.001).startswith("fits on a L4 of ")
    small = used(micro_batch_size=1)
    assert "; with --micro-batch-size 1 it does: " in verdict(small * 1.001)
    both = used(micro_batch_size=1, fsdp=True)
    assert both < min(small, used(fsdp=True))
    assert "; with --micro-batch-size 1 --fsdp it does: " in verdict(both * 1.001)
    assert verdict(used()) != verdict(used() * 0.9999)

    # LoRA is the last thing that is tried.
    args.estimate, args.batch_size = 1, 1
    args.activation_checkpointing = True
    assert used(rank=16) < used()
    assert "; with --lora-rank 16 it does: " in verdict(used(rank=16) * 1.001)
    told = verdict(1)
    assert "does not fit on a L4 of" in told and "nor with --lora-rank 16: " in told
    assert told.endswith("; take a larger --gpu, or more of them with --fsdp")


def test_an_estimate_says_what_it_could_not_look_at(train_here, world, tmp_path):
    write_captions(world, tmp_path)
    args = ("align", tmp_path / "set.json", "--estimate", 2)
    assert "lost3.png: no such image" in train_here(*args)[1]
    text, code = train_here(*args, "--bad-samples", "skip")
    assert code == 0 and "of 12 samples looked at 1 can't be used" in text
