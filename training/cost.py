"""What a run costs: floating-point operations for the log's MFU, and for `train.py --plan` memory, steps and hours before anything is paid.

Where it stands: beside train.py, which calls it.

    python train.py instruct --preset x-llava-7b --tokenizer both.model --data instruct.json -o out --plan 8 --gpu H100 --shard --recompute

Letters for sizes: C width, H query heads × head width, K key-value heads × head width, I width inside the MLP.
"""

import math

import data

# bf16 FLOP/s of the tensor cores without sparsity, and GiB, by a part of the device's name (makers' data sheets)
GPUS = {
    "B200": (2250e12, 180),
    "H200": (989e12, 141),
    "H100 PCIe": (756e12, 80),
    "H100 NVL": (835e12, 94),
    "H100": (989e12, 80),
    "A100": (312e12, 80),
    "L40S": (362e12, 48),
    "A6000": (155e12, 48),
    "L4": (121e12, 24),
    "A10": (125e12, 24),
    "RTX 4090": (165e12, 24),
    "RTX 3090": (71e12, 24),
}


def work(model):
    """FLOPs of training on (a token, a target, a picture, a record's squared length): 2 for each weight that a token meets forward, 2 backward where something
    before it learns, 2 more where it learns itself. Recomputing is not counted: MFU is about useful work."""
    vision, text = model.config.vision, model.config.text
    matrices = lambda module: [p for p in module.parameters() if p.dim() == 2]
    size = lambda module: sum(p.numel() for p in matrices(module))
    learns = lambda module: any(p.requires_grad for p in module.parameters())
    before = learns(model.projector) or learns(model.vision) or learns(model.decoder)
    cost = lambda module: sum(
        p.numel() * (2 + 2 * before + 2 * p.requires_grad) for p in matrices(module)
    )  # of LoRA only what is added learns itself
    see = 6 if learns(model.vision) else 2
    depth, patches = (
        model.config.vision_feature_layer % (vision.num_hidden_layers + 1),
        vision.num_patches,
    )
    picture = (
        see
        * patches
        * (
            depth * size(model.vision.layers[0])
            + 3 * vision.patch_size**2 * vision.hidden_size
            + depth * 2 * patches * vision.hidden_size
        )
    )
    picture += (
        patches
        * size(model.projector)
        * (2 + 2 * before * learns(model.vision) + 2 * learns(model.projector))
    )
    square = (
        text.num_hidden_layers * text.num_attention_heads * text.head_dim * 2 * (3 if before else 1)
    )  # half of the scores are masked
    last = cost(model.decoder.layers[-1].attn.o_proj) + cost(
        model.decoder.layers[-1].mlp
    )  # computed for targets alone, as the head is
    return (
        sum(map(cost, model.decoder.layers)) - last,
        cost(model.decoder.lm_head) + last,
        picture,
        square,
    )


def print_plan(model, recipe, args, samples, processes):
    """Memory a process by arithmetic, steps, and hours from 200 samples of the data. The model may be on the meta device.

    Activations are an estimate, of the fused kernels under bf16: what a block keeps for its backward; with --recompute its input, and one block's all."""
    count = lambda parameters: sum(p.numel() for p in parameters)
    every, learns = (
        count(model.parameters()),
        count(p for p in model.parameters() if p.requires_grad),
    )
    muon = count(
        p
        for name, p in model.named_parameters()
        if recipe.muon_lr and p.requires_grad and ".layers." in name and p.dim() == 2
    )
    chosen, bad = [], 0
    for i in range(0, len(samples), max(1, len(samples) // 200)):
        try:
            chosen.append(samples.sample(i))
        except data.BadSample:
            if args.bad_samples == "error":
                raise
            bad += 1
    if not chosen:
        raise ValueError(f"{args.data[0]}: of its samples not one that was looked at can be used")
    mean = lambda values: sum(values) / len(chosen)
    lengths = [len(sample.ids) - 1 for sample in chosen]
    tokens, pictures = mean(lengths), mean(len(sample.pixels) for sample in chosen)
    flops = recipe.batch * sum(
        a * b
        for a, b in zip(
            work(model),
            (
                tokens,
                mean(sum(sample.loss_mask) for sample in chosen),
                pictures,
                mean(map(data.attention_pairs, chosen)),
            ),
        )
    )
    per_epoch = math.ceil(len(samples) / recipe.batch)
    steps = args.steps or math.ceil(recipe.epochs * per_epoch)

    text, L = model.config.text, model.config.text.num_hidden_layers
    C, H, K, I = (
        text.hidden_size,
        text.num_attention_heads * text.head_dim,
        text.num_key_value_heads * text.head_dim,
        text.intermediate_size,
    )
    again = sum(sum(data.record_lengths(sample)) for sample in chosen) / sum(
        lengths
    )  # records side by side: what they share stands in attention once for each
    # bytes a token: two residuals in fp32; in bf16 two normed copies; q, k, v, output; gate, up, product
    block = 2 * 4 * C + 2 * 2 * C + 2 * (2 * H + 2 * K) * again + 3 * 2 * I
    at_once = args.pack or (args.micro_batch or recipe.batch // processes) * max(lengths)
    targets = at_once * sum(sum(sample.loss_mask) for sample in chosen) / sum(lengths)
    many = (
        targets * 2 * text.vocab_size > 1 << 30
    )  # the loss goes by chunks of a GiB, and then adds up the head's gradient in fp32
    logits = (
        min(1 << 30, targets * 2 * text.vocab_size)
        + 2 * targets * C
        + (6 if many else 2) * model.decoder.lm_head.weight.requires_grad * text.vocab_size * C
    )
    vision, kept = (
        model.config.vision,
        model.config.vision_feature_layer % (model.config.vision.num_hidden_layers + 1)
        if any(p.requires_grad for p in model.vision.parameters())
        else 1,
    )
    see = (
        at_once
        * pictures
        / tokens
        * vision.num_patches
        * kept
        * (28 * vision.hidden_size + 6 * vision.intermediate_size)
    )  # as above; a frozen ViT keeps one block's at a time
    share = processes if args.shard else 1
    copies = (
        every
        if not args.shard
        else 2 * count(model.decoder.layers[0].parameters())
        + count(model.decoder.embed_tokens.parameters())
        + count(model.decoder.lm_head.parameters())
    )
    rows = {
        "weights (fp32)": 4 * every / share,
        "their bf16 copies": 2 * copies,
        "gradients (fp32)": 4 * learns / share,
        "optimizer": (8 * (learns - muon) + 4 * muon) / share,
        "activations (estimate)": at_once * (4 * C * L + block if args.recompute else block * L),
        "the ViT's (estimate)": see,
        "the loss's logits": logits,
    }
    peak, memory = GPUS[args.gpu]
    print(
        f"{args.stage}: {learns:,} parameters learn, {every - learns:,} are frozen; {len(samples):,} samples, about {tokens:,.0f} tokens and {pictures:.2f} pictures each"
        + (f"; of {bad + len(chosen):,} looked at {bad:,} can't be used" if bad else "")
    )
    print(
        f"{processes} process(es), a batch of {recipe.batch}: about {recipe.batch * tokens:,.0f} tokens a step, {per_epoch:,} steps an epoch, {steps:,} in all"
    )
    for name, size in rows.items():
        print(f"  {name:24} {size / 2**30:10.2f} GiB a process")
    total = sum(rows.values()) / 2**30
    print(
        f"  {'together':24} {total:10.2f} GiB of the {args.gpu}'s {memory}"
        + (
            ""
            if total < 0.9 * memory
            else ": too much; try --shard, --recompute, a smaller --micro-batch, --lora-rank"
        )
    )
    print(
        f"{flops * steps:.3g} FLOPs: {flops * steps / (processes * peak * args.mfu) / 3600:,.2f} hours on {processes} × {args.gpu} at an MFU of {args.mfu:.0%}"
    )
