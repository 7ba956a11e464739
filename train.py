"""Trains one stage of the model: vision · text · align · instruct. On a laptop, or under torchrun on N processes, unchanged.

Where it stands: last, beside evaluate. Each stage reads a model folder and writes another:

    stage      trains               on                         loss                                   stands for
    vision     ViT, projector,      pictures and phrases       fine-grained contrast (vision.py)      CLIP
               word rows
    text       decoder              bilingual text             next token                             X-LLaVA's bilingual pretraining
    align      projector            captions                   next token of the caption              LLaVA's first stage
    instruct   projector, decoder   conversations              next token of the answers              LLaVA's second stage

    python train.py vision   --preset tiny --tokenizer tokenizer.model --data phrases.json -o out/vision
    python train.py text     --model out/vision --data en.txt ko.txt -o out/text
    python train.py align    --model out/text   --data captions.json -o out/align
    python train.py instruct --model out/align  --data instruct.json -o out/instruct
    torchrun --nproc_per_node=2 train.py instruct …        # the same on two processes: same losses

`make demo` shows them with the demo's values. Every step goes into OUT/log.jsonl; --resume goes on from the last checkpoint
in OUT/checkpoints, to the same weights, bit for bit, that a run without the interruption would have had.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import data
import kernels
from model import IGNORE, PRESETS
from tokenizer import Tokenizer
from vision import PhraseScore, phrase_loss


@dataclass(frozen=True)
class Recipe:
    """How a stage trains; each field is a flag of the same name. LLaVA-1.5's and X-LLaVA's values are the defaults."""

    parts: tuple  # of the model that learn
    lr: float
    batch: int  # samples in a global batch, over all processes and micro-batches
    epochs: float = 1
    warmup: float = 0.03  # share of the steps in which the learning rate rises to lr; a cosine brings it down to 0
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0  # largest norm of the gradient
    max_length: int = 2048  # tokens
    merge: int = 1  # records about the same picture that make one sample
    muon_lr: float = 0.0  # above 0: the blocks' matrices take Muon at this rate, all else AdamW at lr. For training from random weights


RECIPES = {
    "vision": Recipe(("vision", "projector", "decoder.embed_tokens"), lr=1e-3, batch=1024, epochs=32, weight_decay=0.1, beta2=0.98),
    "text": Recipe(("decoder",), lr=1e-4, batch=256, beta2=0.95),
    "align": Recipe(("projector",), lr=1e-3, batch=256),
    "instruct": Recipe(("projector", "decoder"), lr=2e-5, batch=128),
}


# ---------------------------------------------------------------------------------------------- what a step computes
class Speaker(nn.Module):
    """The model as text, align and instruct train it: a batch -> (sum of token losses, number of target tokens)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch["ids"], batch["targets"], batch.get("pixels")), (batch["targets"] != IGNORE).sum()


class Seer(nn.Module):
    """ViT, projector and word rows as the vision stage trains them: a batch -> (sum of phrase losses, number of phrases)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.score = model, PhraseScore()

    def forward(self, batch):
        gather = lambda image: AllPictures.apply(image, batch["pictures"])
        patches, rows = self.model.see(batch["pixels"]), self.model.decoder.embed_tokens.weight
        logits = self.score(patches, rows, batch["ids"], batch["offsets"], gather if len(batch["pictures"]) > 1 else lambda image: image)
        return phrase_loss(logits, batch["is_true"], batch["is_known"]), torch.tensor(len(logits), device=logits.device)


class AllPictures(torch.autograd.Function):
    """The pictures of all processes, (B, N, W) -> (B of all, N, W): a phrase's negatives are the whole global batch, however it is spread.
    Backward, each process gets back the sum of what all of them found out about its own."""

    @staticmethod
    def forward(ctx, image, counts):
        ctx.counts, most = counts, max(counts)
        padded = torch.cat([image, image.new_zeros(most - len(image), *image.shape[1:])])  # all_gather wants equal shapes
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()], None


# ---------------------------------------------------------------------------------------------- processes and numbers
def start_processes():
    """(rank, world, device): joins torchrun's processes where there are any, nccl on GPUs, gloo on CPUs."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, device


def pick_precision(wanted, device):
    """torch.bfloat16 where the machine multiplies it faster than float32, else float32."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


def schedule(step, steps, warmup):
    """Share of the full learning rate at `step` (from 0): a linear rise over the share `warmup` of the steps, then a cosine down to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizers(learner, recipe):
    """AdamW; with muon_lr, Muon (Jordan 2024: momentum, made orthogonal) for the matrices inside blocks and AdamW for the rest."""
    named = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if recipe.muon_lr and ".layers." in name and p.dim() == 2]
    rest = [p for name, p in named if not any(p is q for q in muon)]
    optimizers = [torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=recipe.muon_lr, weight_decay=recipe.weight_decay))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["full_lr"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------------------------------------- checkpoints
def save_state(folder, step, state, keep=2):
    """Writes OUT/checkpoints/step-N.pt beside and renames it; older ones than the last `keep` go afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(folder / f"step-{step:08}.pt", lambda file: torch.save(state, file))
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()


def load_state(folder, say):
    """The newest checkpoint that can be read, or None; says which it passes over."""
    for file in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a torn file fails in many ways inside pickle and zip
            say(f"{file}: damaged, passed over ({type(error).__name__})")
    return None


# ---------------------------------------------------------------------------------------------- the loop
def train(args, recipe):
    try:
        kernels.set_kernels(args.kernels)
    except RuntimeError as error:
        raise ValueError(error) from None
    rank, world, device = start_processes()
    say = (lambda text: tqdm.write(text, file=sys.stderr)) if rank == 0 else (lambda text: None)
    out, vision_stage = Path(args.out), args.stage == "vision"
    if recipe.batch % (world * args.accumulate):
        raise ValueError(f"--batch {recipe.batch} is not a multiple of {world} processes × --accumulate {args.accumulate}")
    if vision_stage and args.accumulate > 1:
        raise ValueError("--accumulate: the vision stage contrasts the whole batch at once, take a smaller --batch")
    settings = {"stage": args.stage, "seed": args.seed, "data": [str(d) for d in args.data], **vars(recipe), "parts": list(recipe.parts), "freeze_rows": args.freeze_rows}
    if (out / "config.json").exists() and args.resume:
        return say(f"{out}: finished before, nothing to do")
    torch.manual_seed(args.seed)

    # 1. the model, and which parts of it learn
    if args.model:
        checkpoint.load_config(args.model)  # says so if it is no model folder
    tokenizer_file = Path(args.tokenizer) if args.tokenizer else Path(args.model) / "tokenizer.model"
    tokenizer = Tokenizer.load(tokenizer_file)
    model = checkpoint.load_model(args.model) if args.model else checkpoint.fresh_model(PRESETS[args.preset], tokenizer)
    model.requires_grad_(False)
    for part in recipe.parts:
        model.get_submodule(part).requires_grad_(True)
    depth = model.config.feature_layer % (len(model.vision.layers) + 1)
    for beyond in (model.vision.post_norm, *model.vision.layers[depth:]):  # nobody reads what comes after the feature layer
        beyond.requires_grad_(False)
    learner = (Seer if vision_stage else Speaker)(model).to(device)
    params = [p for p in learner.parameters() if p.requires_grad]
    words = model.decoder.embed_tokens.weight, model.decoder.lm_head.weight
    frozen = [(p, p.detach()[: args.freeze_rows].clone()) for p in words if p.requires_grad] if args.freeze_rows else []
    optimizers = make_optimizers(learner, recipe)
    dtype = pick_precision(args.precision, device)

    # 2. the data, a function of the step number alone
    if vision_stage:
        samples = data.Phrases(args.data, tokenizer, model.config)
        if samples.without_picture:
            say(f"left out: {samples.without_picture:,} records without a picture")
    elif args.stage == "text":
        samples = data.Texts(args.data, tokenizer, recipe.max_length)
    else:
        samples = data.Chats(args.data, tokenizer, model.config, recipe.max_length, recipe.merge)
    if not len(samples):
        raise ValueError(f"{', '.join(args.data)}: nothing to train on")
    steps = args.steps or math.ceil(recipe.epochs * math.ceil(len(samples) / recipe.batch))

    # 3. where an earlier run of the same settings stopped
    start, folder = 0, out / "checkpoints"
    settings["steps"] = steps
    if args.resume and (state := load_state(folder, say)):
        if state["settings"] != settings:
            changed = [f"{k}: {state['settings'].get(k)} → {settings.get(k)}" for k in settings if state["settings"].get(k) != settings[k]]
            raise ValueError(f"{folder}: the checkpoint is of other settings ({'; '.join(changed)}); give those, or another -o")
        start = state["step"]
        learner.load_state_dict(state["learner"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        del state
    elif folder.exists() and not args.resume:
        raise ValueError(f"{folder}: there is a run already; --resume goes on with it, or give another -o")

    engine = learner
    if world > 1:
        engine = DistributedDataParallel(learner, device_ids=[device.index] if device.type == "cuda" else None)
    batches = data.Batches(samples, recipe.batch, args.seed, tokenizer.pad_id, args.accumulate, rank, world, steps, start, args.bad_samples)
    say(f"{args.stage}: {sum(p.numel() for p in params):,} parameters learn of {sum(p.numel() for p in learner.parameters()):,}; {len(samples):,} samples, "
        f"{steps:,} steps of {recipe.batch} = {world} process(es) × {args.accumulate} × {recipe.batch // world // args.accumulate}; {str(dtype).removeprefix('torch.')} on {device.type}")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl", "a") if rank == 0 else open(os.devnull, "w")
    bar = tqdm(total=steps, initial=start, desc=args.stage, unit="step", disable=rank > 0 or None, mininterval=1)
    source, bad, began, mark = iter(data.loader(batches, args.workers)), 0, time.time(), time.time()
    learner.train()
    for step in range(start, steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["full_lr"] * schedule(step, steps, recipe.warmup)
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, targets, tokens
        for micro in range(args.accumulate):
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in next(source).items()}
            for reason in batch.pop("bad"):
                bad += 1
                say(f"left out: {reason}")
            sync = engine.no_sync() if world > 1 and micro < args.accumulate - 1 else contextlib.nullcontext()
            with sync:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, count = engine(batch)
                loss.backward()
            sums += torch.stack([loss.detach().double(), count.double(), torch.tensor(float(batch["ids"].numel()), device=device).double()])
        if world > 1:
            dist.all_reduce(sums)
        # Rule 1: the loss is the sum over all ranks and micro-batches divided by the number of targets in all of them.
        # DDP has averaged the gradients of the ranks' sums, hence `world`.
        total, count, tokens = sums.tolist()
        torch._foreach_mul_([p.grad for p in params if p.grad is not None], world / max(count, 1))
        for p, _ in frozen:
            p.grad[: args.freeze_rows] = 0
        norm = nn.utils.clip_grad_norm_(params, recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for p, rows in frozen:  # a gradient of zero doesn't stop weight decay
            p.data[: args.freeze_rows] = rows
        now = time.time()
        row = {"step": step + 1, "loss": total / max(count, 1), "lr": optimizers[0].param_groups[0]["lr"], "grad_norm": norm.item(), "tokens": int(tokens), "seconds": round(now - mark, 4)}
        mark = now
        print(json.dumps(row), file=log, flush=True)
        bar.set_postfix_str(f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, {tokens / row['seconds']:,.0f} tokens/s", refresh=False)
        bar.update()
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps and rank == 0:
            names = {name for name, p in learner.named_parameters() if p.requires_grad}
            learnt = {name: tensor for name, tensor in learner.state_dict().items() if name in names}
            save_state(folder, step + 1, {"step": step + 1, "settings": settings, "learner": learnt, "optimizers": [o.state_dict() for o in optimizers]})
    bar.close()
    if rank == 0:
        checkpoint.save_model(model, tokenizer_file, out)
        say(f"{args.stage}: loss {row['loss']:.4f} after {steps:,} steps, {now - began:,.0f} s" + (f", {bad} bad samples left out" if bad else "") + f" → {out}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=RECIPES)
    parser.add_argument("--data", nargs="+", required=True, help="files of the stage's kind (see data.py)")
    parser.add_argument("--model", help="the model folder to start from")
    parser.add_argument("--preset", choices=PRESETS, help="start from random weights of this shape instead")
    parser.add_argument("--tokenizer", help="a SentencePiece .model (default: the model folder's)")
    parser.add_argument("-o", "--out", required=True, help="the folder of this run, and of the model that comes out of it")
    for name, kind in (("lr", float), ("batch", int), ("epochs", float), ("warmup", float), ("weight_decay", float), ("beta2", float), ("clip", float), ("max_length", int), ("merge", int), ("muon_lr", float)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="default: the stage's recipe")
    parser.add_argument("--parts", nargs="+", help="what learns, of vision, projector, decoder and parts of them (default: the stage's recipe)")
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--freeze-rows", type=int, default=0, help="the first N rows of the embeddings stay as they are, to the bit: only a new language's rows learn")
    parser.add_argument("--kernels", choices=["auto", "triton", "torch"], default="auto", help="Triton or the plain definitions; auto: Triton on a GPU")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--bad-samples", choices=["error", "skip"], default="error", help="stop at a sample that can't be used, or leave it out and say so")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints; 0: none")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with the run in -o, if there is one")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches ahead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if bool(args.model) == bool(args.preset):
        parser.error("give one of --model and --preset")
    if args.preset and not args.tokenizer:
        parser.error("--preset wants --tokenizer")
    given = {k: v for k, v in vars(args).items() if k in Recipe.__dataclass_fields__ and v is not None}
    train(args, replace(RECIPES[args.stage], **given))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
