"""What a run costs: FLOPs for the MFU in the log, and memory, steps and hours before it starts:

    python train.py instruct --preset x-llava-7b --tokenizer both.model --data instruct.json \\
        -o out --estimate 8 --gpu H100 --fsdp --activation-checkpointing
"""

import math
from argparse import Namespace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from data import BadSample, attention_pairs, record_lengths
from kernels.device import GPUS
from training.lora import frozen_linear_weights, set_trainable, used_layers
from training.optimizers import takes_muon
from training.validation import CACHE_BYTES

GIB = 2**30  # also the bytes of logits that linear_cross_entropy computes at a time


# ---------------- FLOPs
class FlopsPerUnit(NamedTuple):
    """FLOPs of one of each, forward and backward."""

    token: int
    target: int
    image: int
    attention_pair: int  # a record of n tokens has n²


def flops_per_unit(model):
    """2 FLOPs per weight forward, 2 for the gradient of its input, 2 for its own gradient. Useful
    work only: what is recomputed does not count."""
    vision, text = model.config.vision, model.config.text
    vit_trains = trains(model.vision)
    has_backward = trains(model)

    def product_flops(module, has_backward=has_backward):
        """Weight by weight: of a LoRA layer only the adapters have a gradient of their own."""
        weights = [weight for weight in module.parameters() if weight.dim() == 2]
        return sum(w.numel() * (2 + 2 * has_backward + 2 * w.requires_grad) for w in weights)

    # Per patch: the ViT's layers, its patch embedding and attention, then the projector.
    L, N, C = used_layers(model), vision.num_patches, vision.hidden_size
    layers = product_flops(model.vision.layers[:L], vit_trains)
    vit = layers + (6 if vit_trains else 2) * (3 * vision.patch_size**2 * C + L * 2 * N * C)
    projector = product_flops(model.projector, vit_trains)

    # The last block computes queries, keys and values for all tokens, the rest for targets.
    last_block = model.decoder.layers[-1]
    targets_only = product_flops(last_block.attn.o_proj) + product_flops(last_block.mlp)
    heads_width = text.num_hidden_layers * text.num_attention_heads * text.head_dim
    return FlopsPerUnit(
        token=product_flops(model.decoder.layers) - targets_only,
        target=product_flops(model.decoder.lm_head) + targets_only,
        image=N * (vit + projector),
        # q·k and p·v: 2 FLOPs per channel each, for the half of the pairs that is not masked.
        attention_pair=2 * heads_width * (3 if has_backward else 1),
    )


def step_flops(flops, stats):
    counts = (stats.num_tokens, stats.num_targets, stats.num_images, stats.attention_pairs)
    return sum(each * count for each, count in zip(flops, counts))


def size(parameters):
    return sum(parameter.numel() for parameter in parameters)


def trains(module):
    return any(parameter.requires_grad for parameter in module.parameters())


# ---------------- an estimate
class SampleStats(NamedTuple):
    """Means over samples."""

    num_tokens: float
    num_targets: float
    num_images: float
    attention_pairs: float
    max_tokens: int
    prefix_repeats: float  # tokens in attention ÷ tokens: each record repeats the shared image


def measure_samples(dataset, bad_samples):
    """SampleStats of 200 samples, evenly spread; max_tokens also of the 20 that seem longest, which
    share a batch. BadSample if bad_samples is "error"."""
    samples, longest, num_bad = [], [], 0
    spread = range(0, len(dataset), max(1, len(dataset) // 200))
    rest = [i for i in np.argsort(dataset.sort_keys)[-20:].tolist() if i not in spread]
    for found, i in [(samples, i) for i in spread] + [(longest, i) for i in rest]:
        try:
            found.append(dataset.sample(i))
        except BadSample:
            if bad_samples == "error":
                raise
            num_bad += 1

    number = len(samples)
    if num_bad:
        print(f"of {len(spread) + len(rest):,} samples looked at {num_bad:,} can't be used")
    if not number:
        raise ValueError(f"{dataset.paths[0]}: none of the samples looked at can be used")
    lengths = [len(sample.ids) - 1 for sample in samples]
    in_attention = sum(sum(record_lengths(sample)) for sample in samples)
    return SampleStats(
        num_tokens=sum(lengths) / number,
        num_targets=sum(sum(sample.loss_mask) for sample in samples) / number,
        num_images=sum(len(sample.pixels) for sample in samples) / number,
        attention_pairs=sum(map(attention_pairs, samples)) / number,
        max_tokens=max(len(sample.ids) - 1 for sample in samples + longest),
        prefix_repeats=in_attention / sum(lengths),
    )


def samples_at_once(args):
    """The most samples in a micro-batch of a rank."""
    return args.micro_batch_size or math.ceil(args.batch_size / args.estimate)


def memory_per_rank(model, args, stats):
    """{what: bytes} of a rank, in bf16 with the fused kernels."""
    text, vision, decoder = model.config.text, model.config.vision, model.decoder
    C, L, V = text.hidden_size, text.num_hidden_layers, text.vocab_size

    # What parameters take. Without FSDP, frozen linear layers are in bf16 and need no copy.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    num_trained, num_muon = size(trained.values()), 0
    if args.muon_lr:
        num_muon = size(p for name, p in trained.items() if takes_muon(name, p))
    num_shards, num_bf16 = 1, size(p for _, p in frozen_linear_weights(model))
    num_fp32 = num_copied = size(model.parameters()) - num_bf16
    if args.fsdp:  # two blocks, embeddings and head are whole at a time
        num_shards, num_bf16, num_fp32 = args.estimate, 0, num_fp32 + num_bf16
        whole = (decoder.layers[0], decoder.layers[0], decoder.embed_tokens, decoder.lm_head)
        num_copied = sum(size(module.parameters()) for module in whole)

    # A micro-batch.
    samples = samples_at_once(args)
    tokens = args.pack or samples * stats.max_tokens
    targets = tokens * stats.num_targets / stats.num_tokens
    patches = tokens * stats.num_images / stats.num_tokens * vision.num_patches

    # Bytes a token that a block keeps for the backward: two residuals in fp32; in bf16 two normed
    # copies; q, k, v and output; gate, up and their product. Checkpointed, it keeps its input.
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    block = 8 * C + 4 * C + 2 * heads * stats.prefix_repeats + 6 * text.intermediate_size
    activations = tokens * (4 * C * L + block if args.activation_checkpointing else block * L)

    # The same for the ViT; frozen, it keeps one block's at a time.
    kept_layers = used_layers(model) if trains(model.vision) else 1
    vit_block = 28 * vision.hidden_size + 6 * vision.intermediate_size

    # In bf16, with the head's gradient; a loss in several chunks sums that in fp32.
    logits = 2 * targets * V
    loss = min(GIB, logits) + 2 * targets * C
    if decoder.lm_head.weight.requires_grad:
        loss += (6 if logits > GIB else 2) * V * C
    of_step = {
        "their bf16 copies": 2 * num_copied,
        "gradients (fp32)": 4 * num_trained / num_shards,
        "activations (estimate)": activations,
        "the ViT's (estimate)": patches * kept_layers * vit_block,
        "the loss's logits": loss,
    }
    # Between steps, a validation: keys and values, and with FSDP the whole model in bf16.
    validation = 2 * CACHE_BYTES + 2 * size(model.parameters()) * args.fsdp
    more = validation - sum(of_step.values())
    return {
        "weights (fp32)": 4 * num_fp32 / num_shards,
        "frozen weights (bf16)": 2 * num_bf16,
        "optimizer": (8 * (num_trained - num_muon) + 4 * num_muon) / num_shards,
        **of_step,
        **({"more, in a validation": more} if args.validate and more > 0 else {}),
    }


def print_estimate(model, dataset, args):
    """Prints memory, steps and hours on args.estimate ranks. The model has no weights."""
    stats, batch_size = measure_samples(dataset, args.bad_samples), args.batch_size
    steps_per_epoch = math.ceil(len(dataset) / batch_size)
    steps = args.steps or math.ceil(args.epochs * steps_per_epoch)
    trained = size(weight for weight in model.parameters() if weight.requires_grad)
    frozen = size(model.parameters()) - trained
    print(
        f"{args.stage}: {trained:,} parameters train, {frozen:,} are frozen; {len(dataset):,} "
        f"samples, about {stats.num_tokens:,.0f} tokens and {stats.num_images:.2f} images each\n"
        f"{args.estimate} process(es), a batch of {batch_size}: about "
        f"{batch_size * stats.num_tokens:,.0f} tokens a step, {steps_per_epoch:,} steps an epoch, "
        f"{steps:,} in all"
    )

    teraflops, available = GPUS[args.gpu]
    memory = memory_per_rank(model, args, stats)
    for name, num_bytes in memory.items():
        print(f"  {name:24} {num_bytes / GIB:10.2f} GiB a process")
    total = sum(memory.values()) / GIB
    print(f"  {'together':24} {total:10.2f} GiB of the {args.gpu}'s {available}")

    flops = steps * batch_size * step_flops(flops_per_unit(model), stats)
    hours = flops / (args.estimate * teraflops * 1e12 * args.mfu) / 3600
    gpus = f"{args.estimate} × {args.gpu}"
    print(f"{flops:.3g} FLOPs: {hours:,.2f} hours on {gpus} at an MFU of {args.mfu:.0%}")

    # float32, and for each weight that trains the optimizer's numbers.
    model_gib, optimizer_gib = 4 * size(model.parameters()) / GIB, memory["optimizer"] / GIB
    checkpoint_gib = 4 * trained / GIB + optimizer_gib * (args.estimate if args.fsdp else 1)
    # Weights of a folder are copied to the GPU one by one.
    on_cpu = f"; in CPU memory: {model_gib:.2f} GiB a process" if args.preset else ""
    print(
        f"on disk: the model {model_gib:.2f} GiB, up to {args.keep_checkpoints + 1} checkpoints of "
        f"{checkpoint_gib:.2f} GiB{on_cpu}"
    )
    print(memory_verdict(model, args, stats, total, available))


def memory_verdict(model, args, stats, total, available):
    """Whether a run of `total` GiB fits, and else the fewest flags with which it does. May change
    the model: LoRA is tried last."""
    limit = 0.9 * available  # CUDA's context, and holes
    gpu = f"a {args.gpu} of {available} GiB"
    if total <= limit:
        return f"fits on {gpu}"

    # What may still help.
    given = vars(args)
    smallest = "--micro-batch-size 1" + (" instead of --pack" if args.pack else "")
    is_smallest = not args.pack and samples_at_once(args) == 1
    options = {
        "--activation-checkpointing": {"activation_checkpointing": True},
        smallest: {} if is_smallest else {"micro_batch_size": 1, "pack": 0},
        "--fsdp": {"fsdp": True} if args.estimate > 1 else {},
    }
    options = {flag: changes for flag, changes in options.items() if given | changes != given}
    tries = [list(c) for n in range(len(options) + 1) for c in combinations(options, n)]

    # One of them, two, all; then with LoRA, too.
    can_take_lora = "decoder" in args.trainable and not args.lora_rank
    for lora in ([], ["--lora-rank 16"])[: 1 + can_take_lora]:
        if lora:
            with torch.device("meta"):
                set_trainable(model, args.trainable, 16)
        for chosen in tries:
            changed = Namespace(**given)
            for flag in chosen:
                vars(changed).update(options[flag])
            total = sum(memory_per_rank(model, changed, stats).values()) / GIB
            flags = " ".join(chosen + lora)
            if total <= limit:
                return f"does not fit on {gpu}; with {flags} it does: {total:.2f} GiB"
    also = f", nor with {flags}: {total:.2f} GiB" if flags else ""
    return f"does not fit on {gpu}{also}; take a larger --gpu, or more of them with --fsdp"
