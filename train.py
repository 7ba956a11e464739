"""Trains one stage of the model: on a laptop, or on N processes under torchrun, unchanged.

Reading order: tokenizer → vision → model → data → **train** → generate.
Each stage reads a model folder and writes another:

    stage     trains                    on               loss                    mirrors
    vision    ViT, projector,           images with      phrase contrast         SigLIP
              token embeddings          phrases
    text      decoder                   bilingual text   next token              X-LLaVA, pretrain
    align     projector                 captions         next token (captions)   LLaVA, stage 1
    instruct  projector, decoder        conversations    next token (answers)    LLaVA, stage 2

    python train.py vision --preset tiny --tokenizer both.model --data phrases.json -o out/vision
    python train.py text     --model out/vision --data en.txt ko.txt   -o out/text
    python train.py align    --model out/text   --data captions.json   -o out/align
    python train.py instruct --model out/align  --data instruct.json   -o out/instruct
    python train.py instruct … --estimate 8 --gpu H100  # memory and hours; nothing is trained
    python train.py instruct … --validate questions.json    # right answers while it trains
    torchrun --nproc-per-node 2 train.py instruct …     # the same losses; --fsdp shards the model

The recipes' learning rates are for published weights. demo/recipe.py has those for `tiny`.
Each step is a line of OUT/log.jsonl. Ctrl-C, SIGTERM and a closed terminal finish the step and
save; --resume goes on from the last checkpoint to the same weights, bit for bit on a CPU.

What trains is float32. --precision bf16 rounds matrix products only: bf16 keeps 8 bits, so adding
an update of 2e-5 to a weight would be rounded away.
"""

import math
import os
from argparse import BooleanOptionalAction
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import kernels
from checkpoint import init_model, load_config, load_model, load_tokenizer, require_fit
from data import ConversationDataset
from kernels.device import DEVICES, GPUS, PRECISIONS
from model import PRESETS, XLlava
from training.cost import print_estimate
from training.distributed import (
    all_reduce,
    close_distributed,
    full_tensor,
    init_distributed,
    pad_micro_batches,
    print_rank0,
    to_device,
    wrap_distributed,
)
from training.graphs import Replay, can_replay, use_own_stream
from training.lora import copy_weights, export_model, set_trainable
from training.objectives import build_objective
from training.optimizers import lr_multiplier, make_optimizers, orthogonalise, set_learning_rate
from training.phrases import PhraseDataset
from training.resume import (
    StopSignals,
    claim_folder,
    load_checkpoint,
    require_shared,
    save_checkpoint,
)
from training.run_log import RunLog
from training.sampler import MicroBatchDataset, make_loader, split_weights
from training.texts import TextDataset
from training.validation import Observer, add_arguments
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.control_pieces import require_control_pieces
from vocabulary.flags import at_least


# ---------------- recipes
def flag(kind, text, default=MISSING):
    """A field of Recipe with the argparse type and the help of its flag."""
    return field(default=default, metadata={"kind": kind, "text": text})


@dataclass(frozen=True)
class Recipe:
    """How a stage trains."""

    trainable: tuple = flag(tuple, "submodules of the model that train")
    lr: float = flag(at_least(1e-12, float), "peak learning rate of AdamW")
    batch_size: int = flag(flags.count, "samples per step, over all processes and micro-batches")
    epochs: float = flag(at_least(1e-6, float), "passes over the data", 1)
    warmup_ratio: float = flag(flags.share, "of the steps, at the start: lr rises", 0.03)
    decay_ratio: float = flag(flags.share, "of the steps, at the end: lr falls, a cosine to 0", 1.0)
    weight_decay: float = flag(at_least(0, float, 10), "of AdamW and Muon", 0.0)
    beta2: float = flag(at_least(0, float, 0.999999), "of AdamW", 0.999)
    grad_clip: float = flag(at_least(1e-6, float), "largest norm of the gradient", 1.0)
    max_length: int = flag(at_least(2), "largest number of tokens of a record", 2048)
    records_per_sample: int = flag(flags.count, "records of one image that share its tokens", 1)
    muon_lr: float = flag(at_least(0, float, 9), "above 0: Muon's rate for matrices in blocks", 0.0)


RECIPES = {
    # Epochs and beta2 as CLIP (arXiv 2103.00020); the loss is SigLIP's, on patches.
    "vision": Recipe(
        trainable=("vision", "projector", "decoder.embed_tokens"),
        lr=1e-3,
        batch_size=1024,
        epochs=32,
        weight_decay=0.1,
        beta2=0.98,
    ),
    # X-LLaVA's pretraining (2403.11399), LLaVA-1.5's two stages (2310.03744).
    "text": Recipe(trainable=("decoder",), lr=1e-4, batch_size=256, beta2=0.95),
    "align": Recipe(trainable=("projector",), lr=1e-3, batch_size=256),
    "instruct": Recipe(trainable=("projector", "decoder"), lr=2e-5, batch_size=128),
}


# ---------------- the loop
class StepStats(NamedTuple):
    """Sums over all micro-batches and ranks of one step."""

    num_targets: int
    num_tokens: int  # without padding
    padded_tokens: int  # with padding
    num_images: int
    attention_pairs: int
    stop_requests: int


def train_loop(args, process, wrapped, optimizers, log, observer):
    """False if a signal ended the run early. wrapped: the model with its loss, on all ranks.
    process: this rank. observer: validates and keeps snapshots."""
    batches = log.batches
    stop_signals = StopSignals()
    loader = make_loader(batches, args.workers, pin_memory=process.device.type == "cuda")
    wrapped.train()
    for step in range(batches.start, batches.steps):
        # Next batch: the micro-batches of this rank.
        micro_batches = next(loader)
        log.batch_ready(micro_batches)

        # The learning rate of this step: it rises, stays, falls.
        multiplier = lr_multiplier(step, batches.steps, args.warmup_ratio, args.decay_ratio)
        lr = set_learning_rate(optimizers, multiplier)

        # Forward and backward on all micro-batches.
        stats, losses = accumulate_gradients(wrapped, micro_batches, process, stop_signals)

        # Loss and gradient norm as numbers: here the loop waits for the GPU, once a step.
        norm = full_tensor(nn.utils.get_total_norm(gradients(wrapped)))
        *losses, grad_norm = torch.stack([*losses, norm]).tolist()
        (loss_sum,) = all_reduce([sum(losses)], process)
        loss = loss_sum / max(stats.num_targets, 1)

        # Clip and step, unless one of the two is infinite or NaN.
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite:
            if grad_norm > args.grad_clip:
                nn.utils.clip_grads_with_norm_(wrapped.parameters(), args.grad_clip, norm)
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=process.replay is None)

        log.write_step(step + 1, stats, loss, lr, grad_norm)
        if not is_finite:
            log.report_skip(step + 1, micro_batches, losses)

        # Save every --save-every steps, and when asked to stop. The last step saves the model.
        is_last = step + 1 == batches.steps
        is_due = args.save_every and (step + 1) % args.save_every == 0
        must_stop = stats.stop_requests and not is_last
        if must_stop or (is_due and not is_last):
            is_saved = save_checkpoint(args, step + 1, wrapped, optimizers)

        # Then validate: should that fail, the step is saved.
        observer.observe(step + 1, log)
        if must_stop:
            log.report_stop(step + 1, is_saved)
            return False
    return True


def accumulate_gradients(wrapped, micro_batches, process, stop_signals):
    """Forward and backward of one step. Then p.grad is the gradient of the mean loss over all
    targets of the global batch. Returns (StepStats, the loss sum of each micro-batch)."""
    micro_batches, losses = pad_micro_batches(micro_batches, process), []
    device, use_autocast = process.device, process.dtype != torch.float32

    # The mean over targets, not a mean of means. The counts are known on the CPU beforehand. A loss
    # is a sum; × world_size undoes the division of the gradients by DDP and FSDP2.
    counts = [sum(batch[name] for batch in micro_batches) for name in StepStats._fields[:-1]]
    counts = all_reduce(counts, process)
    scale = torch.tensor(process.world_size / max(counts[0], 1))

    # Autocast keeps its bf16 copies of trained weights until it ends: one cast a weight and step.
    with torch.autocast(device.type, process.dtype, enabled=use_autocast):
        for i, micro_batch in enumerate(micro_batches):
            # DDP averages the gradients of the ranks in the last backward only. FSDP2 does it in
            # each: keeping them would take the memory of the whole model.
            wrapped.require_backward_grad_sync = i == len(micro_batches) - 1
            if process.replay:
                losses.append(process.replay(micro_batch, scale))
            else:
                losses.append(forward_backward(wrapped, to_device(micro_batch, device), scale))
    return StepStats(*counts, *all_reduce([stop_signals.count], process)), losses


def forward_backward(wrapped, batch, scale):
    """The loss sum of a micro-batch; the gradients of loss · scale are added to p.grad."""
    loss = wrapped(batch)
    with torch.autocast(loss.device.type, enabled=False):
        (loss * scale).backward()
    return loss.detach()


def gradients(wrapped):
    return [weight.grad for weight in wrapped.parameters() if weight.grad is not None]


# ---------------- the run
def train(args):
    """Trains one stage: from a model folder, or random weights, to the model folder args.out."""
    process = init_distributed(args.device, args.precision)
    check_args(args, process.world_size)
    torch.manual_seed(args.seed)

    # The model, and the data.
    tokenizer, model = build_model(args)
    dataset = build_dataset(args, tokenizer, model.config)
    if args.estimate:
        return print_estimate(model, dataset, args)
    replays = args.cuda_graphs == "auto" and can_replay(args, process, model)
    batches = MicroBatchDataset(
        dataset,
        args.batch_size,
        args.seed,
        pad_id=tokenizer.pad_id,
        micro_batch_size=args.micro_batch_size,
        rank=process.rank,
        world_size=process.world_size,
        token_budget=args.pack,
        weights=args.weights,
        few_shapes=replays,
    )
    # --resume compares args with those in runs.jsonl.
    args.steps = args.steps or math.ceil(args.epochs * batches.sampler.per_epoch)
    batches.steps = args.steps

    # The model with its loss, distributed over the ranks; its optimizers; an earlier run.
    objective = build_objective(args, model)
    if not args.fsdp:  # FSDP2 takes one dtype, and its own way
        copy_weights(model, process)
    wrapped = wrap_distributed(objective, process, args.fsdp)
    optimizers = make_optimizers(wrapped, args)
    if replays:
        use_own_stream(process.device)
        run = partial(forward_backward, wrapped)
        process = process._replace(replay=Replay(run, process.device))
        for muon in optimizers[1:]:
            muon.orthogonalise = Replay(orthogonalise, process.device)
    if args.resume:
        batches.start = load_checkpoint(args, wrapped, optimizers)

    # Train, then write the model.
    observer = Observer(args, process, model, tokenizer)
    log = RunLog(args, process, objective, dataset, batches)
    require_shared(Path(args.out) / "runs.jsonl", process)
    if train_loop(args, process, wrapped, optimizers, log, observer):
        log.require_updates()
        if hasattr(dataset, "load_image") and process.rank == 0:
            dataset.load_image.save()
        export_model(model, tokenizer, Path(args.out))
        log.print_summary()


def check_args(args, world_size):
    """ValueError where flags contradict each other, before anything is loaded. Chooses the
    kernels."""
    num_processes, micro_batch_size = args.estimate or world_size, args.micro_batch_size
    if args.batch_size < num_processes:
        raise ValueError(f"--batch-size {args.batch_size}: too few for {num_processes} processes")

    if args.stage == "vision" and (micro_batch_size or args.pack or args.fsdp or args.weights):
        raise ValueError(
            "the vision stage contrasts the whole batch at once: no --micro-batch-size, --pack, "
            "--fsdp or weighted --data; take a smaller --batch-size"
        )
    if args.pack and micro_batch_size:
        raise ValueError("--pack replaces --micro-batch-size: give one of them")
    if args.pack and args.records_per_sample > 1:
        raise ValueError(
            f"--pack {args.pack} puts samples end to end, --records-per-sample "
            f"{args.records_per_sample} puts records side by side: give one of them"
        )
    if args.fsdp and not args.estimate and "RANK" not in os.environ:
        raise ValueError("--fsdp needs torchrun: torchrun --nproc-per-node N train.py …")
    kernels.set_kernels(args.kernels)


def build_model(args):
    """(tokenizer, model). For --estimate the model has no weights."""
    config = load_config(args.model) if args.model else None
    tokenizer_path = args.tokenizer or args.model
    tokenizer = load_tokenizer(tokenizer_path)
    require_control_pieces(tokenizer, tokenizer_path)

    # What does not fit is refused before weights are read, which may take minutes. This device
    # draws no random number.
    with torch.device("meta"):
        model = XLlava(config) if config else init_model(PRESETS[args.preset], tokenizer)
        set_trainable(model, args.trainable, args.lora_rank)
    require_fit(model.config, tokenizer, tokenizer_path)
    if not args.estimate:
        preset = PRESETS.get(args.preset)
        model = load_model(args.model, None) if args.model else init_model(preset, tokenizer)
        set_trainable(model, args.trainable, args.lora_rank)
    return tokenizer, model


def build_dataset(args, tokenizer, config):
    """The samples of the stage. ValueError if a file has none."""
    data, limit = args.data, config.text.max_position_embeddings
    max_length = min(args.max_length, limit)
    # The recipe's own value is for large models: cut it without a word.
    if max_length < args.max_length != RECIPES[args.stage].max_length:
        print_rank0(f"--max-length {args.max_length}: the model reads {limit}, so {limit}")
    if 0 < args.pack < max_length:
        raise ValueError(
            f"--pack {args.pack}: must hold the longest sample; --max-length is {max_length}"
        )

    if args.stage == "vision":
        options = args.dictionary, args.images, args.cache
        dataset = PhraseDataset(data, tokenizer, config, *options)
        if dataset.without_image:
            print_rank0(f"left out: {dataset.without_image:,} records without an image")
    elif args.stage == "text":
        dataset = TextDataset(data, tokenizer, max_length, args.cache or Path(args.out) / "tokens")
    else:
        options = max_length, args.records_per_sample, args.images, args.cache
        dataset = ConversationDataset(data, tokenizer, config, *options)
    if 0 in dataset.sizes:
        reason = "; ".join(["nothing to train on", *getattr(dataset, "bad", [])[:1]])
        raise ValueError(f"{data[dataset.sizes.index(0)]}: {reason}")
    return dataset


# ---------------- command line
# fmt: off
FLAGS = (  # beside the recipe: name, type or choices, default, help
    ("model", flags.folder, None, "the model folder to start from"),
    ("preset", tuple(PRESETS), None, "instead: random weights of this shape"),
    ("tokenizer", flags.path, None, "a SentencePiece .model (default: the model folder's)"),
    ("images", flags.folder, None, "the images' folder (default: that of each data file)"),
    ("steps", flags.count, None, "instead of --epochs"),
    ("lora_rank", at_least(0, most=4096), 0, "train adapters of this rank for a frozen decoder"),
    ("micro_batch_size", at_least(0), 0, "samples a process computes at once; 0: all of its share"),
    ("pack", at_least(0), 0, "instead: samples end to end, N tokens at once, without padding"),
    ("fsdp", bool, False, "FSDP2: shard weights, gradients and optimizer over the processes"),
    ("activation_checkpointing", bool, False, "recompute blocks backward: less memory, +1/3 work"),
    ("compile", bool, False, "torch.compile the blocks"),
    ("cuda_graphs", ("auto", "off"), "auto", "one launch a step; auto: small models on one GPU"),
    ("kernels", ("auto", "triton", "torch"), "auto", "auto: Triton on a GPU, else plain PyTorch"),
    ("precision", PRECISIONS, "auto", "of matrix products; auto: bf16 where it is fast"),
    ("device", DEVICES, "auto", "auto: a CUDA GPU, else the CPU"),
    ("bad_samples", ("error", "skip"), "error", "stop at an unusable sample, or leave it out"),
    ("max_skips", flags.count, 10, "end the run after N steps in a row without a finite loss"),
    ("save_every", at_least(0), 200, "steps between checkpoints; 0: none"),
    ("keep_checkpoints", flags.count, 2, "the newest N stay"),
    ("resume", bool, False, "go on with the run in -o, if there is one"),
    ("fresh", bool, False, "set aside what is in -o, and begin anew"),
    ("workers", at_least(0, most=256), 4 * torch.cuda.is_available(), "processes for batches"),
    ("dictionary", flags.file, None, "vision: words that mean the same, cat = 고양이 = 猫"),
    ("cache", flags.text, None, "folder where images and tokens are kept for other runs"),
    ("estimate", flags.count, None, "do not train: print memory, steps and hours on N processes"),
    ("gpu", tuple(GPUS), "H100", "for --estimate"),
    ("mfu", at_least(0.001, float, 1), 0.4, "for --estimate: reached share of the GPU's peak"),
    ("seed", flags.seed, 0, "of random weights and of the order of samples"),
)
# fmt: on


def add_flag(parser, name, kind, default, text):
    """kind: a type, a tuple of choices, bool for --x and --no-x, the type tuple for many words."""
    options = {"type": kind}
    if kind is bool:
        options = {"action": BooleanOptionalAction}
    elif kind is tuple:
        options = {"nargs": "+", "type": flags.text, "metavar": "MODULE"}
    elif isinstance(kind, tuple):
        options = {"choices": kind}
    elif kind.__name__ in ("int", "float"):
        options["metavar"] = "N"
    parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **options)


def parse_args():
    """The flags of the stage that is given; the recipe's values are defaults."""
    parser = Parser(prog="train.py", description=__doc__)
    about = "files of the stage's kind, see data.py; FILE:0.7 FILE:0.3 mixes by weight"
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, recipe in RECIPES.items():
        stage_parser = stages.add_parser(stage, help=f"trains {', '.join(recipe.trainable)}")
        add, required = stage_parser.add_argument, {"required": True, "type": flags.text}
        add("--data", nargs="+", **required, metavar="FILE", help=about)
        add("-o", "--out", **required, help="folder of the run and its model")
        group = stage_parser.add_argument_group("the recipe")
        for entry in fields(Recipe):
            add_flag(group, entry.name, default=getattr(recipe, entry.name), **entry.metadata)
        for row in FLAGS:
            add_flag(stage_parser, *row)
        add_arguments(stage_parser)
    args = parser.parse_args()

    if bool(args.model) == bool(args.preset):
        parser.error("give one of --model and --preset")
    if args.preset and not args.tokenizer:
        parser.error("--preset needs --tokenizer")
    if args.dictionary and args.stage != "vision":
        parser.error("--dictionary: for the vision stage")
    if args.estimate and args.stage == "vision":
        parser.error("--estimate: for the stages with a decoder")
    if args.estimate and args.precision == "fp32":
        parser.error("--estimate counts bf16: leave --precision fp32 out")
    args.data, args.weights = split_weights(args.data)
    return args


def main():
    args = parse_args()
    if not args.estimate and claim_folder(args):
        return print_rank0(f"{args.out}: finished before, nothing to do")
    train(args)
    close_distributed()


if __name__ == "__main__":
    run_main(main, "train.py")
