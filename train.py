"""Trains one stage of the model: vision · text · align · instruct. On a laptop, or under torchrun on N processes, unchanged.

Where it stands: last, beside evaluate. Each stage reads a model folder and writes another:

    stage      trains               on                         loss                                   stands for
    vision     ViT, projector,      pictures and phrases       fine-grained contrast (vision.py)      CLIP
               word rows
    text       decoder              bilingual text             next token                             X-LLaVA's bilingual pretraining
    align      projector            captions                   next token of the caption              LLaVA's first stage
    instruct   projector, decoder   conversations              next token of the answers              LLaVA's second stage

    python train.py vision   --preset tiny --tokenizer tokenizer.model --data phrases.json --dictionary words.txt -o out/vision
    python train.py text     --model out/vision --data en.txt ko.txt -o out/text
    python train.py align    --model out/text   --data captions.json -o out/align
    python train.py instruct --model out/align  --data instruct.json -o out/instruct
    torchrun --nproc_per_node=2 train.py instruct …        # the same on two processes: same losses. With --shard each holds half of the model
    python train.py instruct … --plan 8 --gpu H100         # what it would take on 8 of these: memory, steps, hours. Nothing is trained

`make demo` shows them with the demo's values. Every step goes into OUT/log.jsonl. Ctrl-C or SIGTERM finish the step and save; --resume goes on from
the last checkpoint in OUT/checkpoints, to the same weights, bit for bit, that a run without the interruption would have had (on a CPU). No step draws
a random number, and a step's samples are a function of its number: weights, optimizer and step are the whole state, on any number of processes.

Weights, gradients and optimizer are float32 throughout; with bf16 it is the matrix products that are rounded, by autocast or, with --shard, in the
copies that are gathered for a block at a time: an update of 2e-5 is lost in a weight of eight bits.
"""

import argparse
import atexit
import contextlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import data
import kernels
from model import IGNORE_INDEX, PRESETS, XLlava
from training import sampler
from training.cost import GPUS, print_plan, work
from training.device import pick_precision
from training.distributed import to_device
from training.objectives import NextTokenObjective, PhraseContrastObjective


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
    max_length: int = 2048  # tokens of a record; merged, a sample may be so many times as long
    merge: int = 1  # records about the same picture that share its tokens, side by side, without seeing each other
    muon_lr: float = 0.0  # above 0: the blocks' matrices take Muon at this rate, all else AdamW at lr. For training from random weights


RECIPES = {
    "vision": Recipe(
        ("vision", "projector", "decoder.embed_tokens"),
        lr=1e-3,
        batch=1024,
        epochs=32,
        weight_decay=0.1,
        beta2=0.98,
    ),
    "text": Recipe(("decoder",), lr=1e-4, batch=256, beta2=0.95),
    "align": Recipe(("projector",), lr=1e-3, batch=256),
    "instruct": Recipe(("projector", "decoder"), lr=2e-5, batch=128),
}


# ---------------------------------------------------------------------------------------------- what a step computes
class Lora(nn.Module):
    """A frozen linear layer and what is added to it: W + 2·up·down of rank R (arXiv 2106.09685; alpha = 2R as in LLaVA). Starts at W, for `up` is zero."""

    SCALE = 2.0

    def __init__(self, linear, rank):
        super().__init__()
        self.weight = linear.weight
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return F.linear(x, self.weight) + self.SCALE * F.linear(F.linear(x, self.down), self.up)


def choose_parts(model, recipe, lora_rank):
    """Sets which parameters learn. With lora_rank the decoder's matrices stay, and what is added to them learns."""
    model.requires_grad_(False)
    for part in recipe.parts:
        model.get_submodule(part).requires_grad_(True)
    depth = model.config.vision_feature_layer % (len(model.vision.layers) + 1)
    for beyond in (
        model.vision.post_norm,
        *model.vision.layers[depth:],
    ):  # nobody reads what comes after the feature layer
        beyond.requires_grad_(False)
    if lora_rank:
        if "decoder" not in recipe.parts:
            raise ValueError(
                f"--lora-rank: the decoder is not among the parts that learn ({', '.join(recipe.parts)})"
            )
        model.decoder.requires_grad_(False)
        for block in model.decoder.layers:
            for owner in (block.attn, block.mlp):
                for name, linear in list(owner.named_children()):
                    setattr(owner, name, Lora(linear, lora_rank))


# ---------------------------------------------------------------------------------------------- processes and numbers
def start_processes():
    """(rank, world, device): joins torchrun's processes where there are any, nccl on GPUs, gloo on CPUs."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, device


def spread(learner, device, dtype, shard):
    """The learner as all processes train it: each a copy whose gradients are averaged (DDP), or each a part of every tensor (FSDP2), gathered for one
    block at a time; gradients are summed in float32."""
    if not shard:
        return DistributedDataParallel(
            learner,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    half = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
    )  # rope's angles stay float32
    for block in (*learner.model.vision.layers, *learner.model.decoder.layers):
        fully_shard(block, mp_policy=policy)
    return fully_shard(learner, mp_policy=policy)


def backward(engine, params, parts, device, dtype, world=1, asked=()):
    """A step up to its gradients, from this process's micro-batches: afterwards p.grad is the gradient of the mean over all targets of the global batch.

    Returns the sums over all processes of loss, targets, tokens, places (tokens and padding), pictures, squared lengths, and the number of signals `asked`; and the loss of each micro-batch."""
    most = torch.tensor(len(parts), device=device)
    if (
        world > 1
    ):  # packed, one process may need more micro-batches than another, which then repeats its last with nothing to learn
        dist.all_reduce(most, dist.ReduceOp.MAX)
    while len(parts) < most:
        parts = [
            *parts,
            parts[-1]
            | {
                "targets": torch.full_like(parts[-1]["targets"], IGNORE_INDEX),
                "num_tokens": 0,
                "attention_pairs": 0,
            },
        ]
    sums, losses = torch.zeros(7, dtype=torch.float64, device=device), []
    for n, part in enumerate(parts):
        batch = to_device(part, device)
        # DDP sends no gradients between micro-steps. FSDP does: a process that kept them would hold the whole model's
        quiet_step = (
            engine.no_sync()
            if isinstance(engine, DistributedDataParallel) and n < len(parts) - 1
            else contextlib.nullcontext()
        )
        with quiet_step:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss, count = engine(batch)
            loss.backward()
        losses.append(loss.detach())
        seen = len(part.get("pixels", ())) if part["num_tokens"] else 0
        sums += torch.stack(
            [
                losses[-1].double(),
                count.double(),
                *torch.tensor(
                    [part["num_tokens"], part["ids"].numel(), seen, part["attention_pairs"], 0.0],
                    dtype=torch.float64,
                ).to(device),
            ]
        )
    sums[6] = len(asked)
    if world > 1:
        dist.all_reduce(sums)
    # Rule 1: the loss is the sum over all ranks and micro-batches divided by the number of targets in all of them.
    # DDP and FSDP have averaged the gradients of the ranks' sums, hence `world`.
    torch._foreach_mul_(
        [p.grad for p in params if p.grad is not None], world / max(sums[1].item(), 1)
    )
    return sums.tolist(), losses


def schedule(step, steps, warmup):
    """Share of the full learning rate at `step` (from 0): a linear rise over the share `warmup` of the steps, then a cosine down to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: every matrix moves by all its directions alike (Jordan et al. 2024, kellerjordan.github.io/posts/muon). To the same numbers as
    torch.optim.Muon, but all matrices of a shape at once: one by one they cost a tenth to a quarter of the demo's step."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @staticmethod
    def orthogonal(x):
        """Matrices (N, A, B) -> bfloat16 U·Vᵀ of their singular value decompositions, nearly: five Newton-Schulz iterations bring all singular values to about 0.5 … 1.2."""
        tall, x = x.shape[1] > x.shape[2], x.bfloat16()
        x = x.mT if tall else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(
                x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445
            )
        return x.mT if tall else x

    @torch.no_grad()
    def step(self):
        whole = lambda t: (
            t.full_tensor() if isinstance(t, DTensor) else t
        )  # sharded ones are put together for this, and each process keeps its part of the outcome
        part = lambda update, p: (
            distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
            if isinstance(p, DTensor)
            else update
        )
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for (A, B), params in alike.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, buffers = (
                    [p.grad for p in params],
                    [self.state[p]["momentum_buffer"] for p in params],
                )
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov's
                updates = self.orthogonal(torch.stack([whole(t) for t in ahead])).to(
                    params[0].dtype
                )
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    params,
                    [part(update, p) for update, p in zip(updates, params)],
                    alpha=-group["lr"] * max(1, A / B) ** 0.5,
                )


def make_optimizers(learner, recipe):
    """AdamW; with muon_lr, Muon for the matrices inside blocks and AdamW for the rest."""
    named = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if recipe.muon_lr and ".layers." in name and p.dim() == 2]
    rest = [p for name, p in named if not any(p is q for q in muon)]
    optimizers = [
        torch.optim.AdamW(
            rest,
            lr=recipe.lr,
            betas=(0.9, recipe.beta2),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    ]
    if muon:
        optimizers.append(Muon(muon, lr=recipe.muon_lr, weight_decay=recipe.weight_decay))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["full_lr"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------------------------------------- checkpoints
def training_state(learner, optimizers):
    """What a checkpoint holds, {name: tensor}: all that learns, and what the optimizers keep for it. Sharded tensors are saved by those who have them."""
    names = {p: name for name, p in learner.named_parameters() if p.requires_grad}
    state = {f"weight.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p, kept in optimizer.state.items():
            state |= {f"{key}.{names[p]}": tensor for key, tensor in kept.items()}
    return state


def save_state(folder, step, settings, state, keep, rank):
    """Writes OUT/checkpoints/step-N beside and renames it; older ones than the last `keep` go afterwards. False, and a word, where it can't be written."""
    import torch.distributed.checkpoint as dcp  # takes a second to import

    final, beside = folder / f"step-{step:08}", folder / f"step-{step:08}.tmp"
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with quiet():
            dcp.save(state, checkpoint_id=beside, no_dist=not dist.is_initialized())
        if rank == 0:
            checkpoint.write_atomically(
                beside / "settings.json", lambda file: file.write(json.dumps(settings).encode())
            )
            os.replace(beside, final)
    except (
        OSError,
        RuntimeError,
        dcp.api.CheckpointException,
    ) as error:  # a full disk comes as any of these
        cause = (
            next(iter(error.failures.values()))[0]
            if isinstance(error, dcp.api.CheckpointException)
            else error
        )
        if rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
            good = max(folder.glob("step-*[0-9]"), default="there is none yet")
            tqdm.write(
                f"step {step}: the checkpoint could not be saved ({type(cause).__name__}: {str(cause).partition(chr(10))[0]}; {shutil.disk_usage(folder).free / 2**30:.2f} GiB free); the last good one stands: {good}",
                file=sys.stderr,
            )
        return False
    for old in sorted(folder.glob("step-*[0-9]"))[:-keep] if rank == 0 else []:
        old.rename(f"{old}.tmp")  # half a deleted one must not look like a checkpoint
        shutil.rmtree(f"{old}.tmp")
    return True


def load_state(folder, settings, learner, optimizers, say):
    """Fills learner and optimizers from the newest checkpoint that can be read, says which it passes over, and returns its step; 0 if there is none at all.
    Raises ValueError where it is of other settings, and where none of those that are there can be read."""
    import torch.distributed.checkpoint as dcp

    found = sorted(folder.glob("step-*[0-9]"), reverse=True)
    if found:  # a step with gradients of zero and a rate of zero changes nothing, and makes the tensors to be filled
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for file in found:
        try:
            saved = json.loads((file / "settings.json").read_text())
        except (OSError, ValueError) as error:
            say(f"{file}: damaged, passed over ({type(error).__name__})")
            continue
        if saved != settings:
            changed = [
                f"{k}: {saved.get(k)} → {settings.get(k)}"
                for k in settings
                if saved.get(k) != settings[k]
            ]
            raise ValueError(
                f"{folder}: the checkpoint is of other settings ({'; '.join(changed)}); give those, or another -o"
            )
        try:
            with quiet():
                dcp.load(
                    training_state(learner, optimizers),
                    checkpoint_id=file,
                    no_dist=not dist.is_initialized(),
                )
            return int(file.name.removeprefix("step-"))
        except (
            Exception,
            dcp.api.CheckpointException,
        ) as error:  # a torn file fails in many ways inside pickle and zip
            say(f"{file}: damaged, passed over ({type(error).__name__})")
    if found:
        raise ValueError(f"{folder}: none of its checkpoints can be read; remove it to begin again")
    return 0


@contextlib.contextmanager
def quiet():
    """Without the warnings that torch.distributed.checkpoint has for a single process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gathered(model, adapters):
    """(name, tensor) of the model that comes out, one at a time: sharded tensors whole again (all processes take part), and what LoRA learnt added
    to the weights; by itself it goes into `adapters`."""
    whole = lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith((".down", ".up")):
            continue
        tensor, layer = whole(tensor), name.removesuffix(".weight")
        if f"{layer}.down" in state:
            down, up = (
                adapters.setdefault(f"{layer}.{part}", whole(state[f"{layer}.{part}"]).cpu())
                for part in ("down", "up")
            )
            tensor = tensor.cpu() + Lora.SCALE * up @ down
        yield name, tensor


def export(model, tokenizer_file, out, rank):
    """Process 0 writes the model folder, a tensor at a time, and adapters.pt if there are any."""
    adapters = {}
    tensors = gathered(model, adapters)
    if rank == 0:
        checkpoint.write_model(model.config, tensors, tokenizer_file, out)
        if adapters:
            checkpoint.write_atomically(
                out / "adapters.pt",
                lambda file: torch.save({"scale": Lora.SCALE, "adapters": adapters}, file),
            )
    else:
        for _ in tensors:  # takes part in the gathering
            pass


# ---------------------------------------------------------------------------------------------- the loop
def note_start(out, settings, world, device):
    """Adds to OUT/runs.jsonl how this run was started: command, settings, code, versions, machine."""
    commit = (
        subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
        if shutil.which("git")
        else ""
    )
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "settings": settings,
        "processes": world,
        "commit": commit or None,
        "python": platform.python_version(),
        "packages": {
            d.metadata["Name"]: d.version
            for d in metadata.distributions()
            if d.metadata["Name"] in ("torch", "numpy", "sentencepiece", "pillow", "triton")
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU",
    }
    with open(out / "runs.jsonl", "a") as file:
        print(json.dumps(row), file=file)


def open_log(file, start):
    """The log, open for appending, without the steps that a checkpoint of step `start` takes back."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start]
    checkpoint.write_atomically(file, lambda out: out.write("".join(kept).encode()))
    return open(file, "a")


def train(args, recipe):
    try:
        kernels.set_kernels(args.kernels)
    except RuntimeError as error:
        raise ValueError(error) from None
    rank, world, device = start_processes()
    say = (lambda text: tqdm.write(text, file=sys.stderr)) if rank == 0 else (lambda text: None)
    out, vision_stage = Path(args.out), args.stage == "vision"
    processes, micro = args.plan or world, args.micro_batch
    paths, weights = split_weights(args.data)
    if recipe.batch % (processes * (micro or 1)):
        raise ValueError(
            f"--batch {recipe.batch} is not a multiple of {processes} process(es)"
            + (f" × --micro-batch {micro}" if micro else "")
        )
    if vision_stage and (micro or args.pack or args.shard or weights):
        raise ValueError(
            "the vision stage contrasts the whole batch at once, and its ViT is small: no --micro-batch, --pack, --shard or weighted --data; take a smaller --batch"
        )
    if args.pack and (micro or args.pack < recipe.max_length):
        raise ValueError(
            f"--pack {args.pack}: must hold the longest sample (--max-length {recipe.max_length}), and takes the place of --micro-batch"
        )
    if args.pack and recipe.merge > 1:
        raise ValueError(
            f"--pack {args.pack} puts samples end to end, --merge {recipe.merge} records side by side: give one of them"
        )
    if args.shard and not dist.is_initialized() and not args.plan:
        raise ValueError("--shard wants torchrun: torchrun --nproc_per_node=N train.py …")
    settings = {
        "stage": args.stage,
        "seed": args.seed,
        "model": args.model or args.preset,
        "data": paths,
        "weights": weights,
        **vars(recipe),
        "parts": list(recipe.parts),
        "freeze_rows": args.freeze_rows,
        "lora_rank": args.lora_rank,
        "packed": bool(args.pack),
    } | ({"dictionary": args.dictionary} if args.dictionary else {})
    if (out / "config.json").exists() and args.resume:
        return say(f"{out}: finished before, nothing to do")
    torch.manual_seed(args.seed)

    # 1. the model, and which parts of it learn
    if args.model:
        checkpoint.load_config(args.model)  # says so if it is no model folder
    tokenizer_file = (
        Path(args.tokenizer) if args.tokenizer else Path(args.model) / "tokenizer.model"
    )
    tokenizer = checkpoint.load_tokenizer(tokenizer_file)
    if args.plan:
        config = checkpoint.load_config(args.model) if args.model else None
        with torch.device("meta"):
            model = XLlava(
                config
                or replace(
                    PRESETS[args.preset],
                    text=replace(PRESETS[args.preset].text, vocab_size=tokenizer.vocab_size),
                    image_token_id=tokenizer.image_id,
                )
            )
    else:
        model = (
            checkpoint.load_model(args.model)
            if args.model
            else checkpoint.init_model(PRESETS[args.preset], tokenizer)
        )
    if (
        tokenizer.pad_id is None
        or tokenizer.vocab_size > model.config.text.vocab_size
        or tokenizer.image_id != model.config.image_token_id
    ):
        raise ValueError(
            f"{tokenizer_file}: {tokenizer.vocab_size:,} pieces, <image> is {tokenizer.image_id}, <pad> {tokenizer.pad_id}; the model has {model.config.text.vocab_size:,} rows, "
            f"its <image> is {model.config.image_token_id}: python checkpoint.py build --tokenizer … makes them fit"
        )
    choose_parts(model, recipe, args.lora_rank)

    # 2. the data, a function of the step number alone
    if vision_stage:
        samples = data.PhraseDataset(paths, tokenizer, model.config, args.dictionary)
        if samples.without_picture:
            say(f"left out: {samples.without_picture:,} records without a picture")
    elif args.stage == "text":
        samples = data.TextDataset(
            paths, tokenizer, recipe.max_length, args.cache or out / "tokens"
        )
    else:
        samples = data.ConversationDataset(
            paths, tokenizer, model.config, recipe.max_length, recipe.merge
        )
    if not all(samples.sizes):
        raise ValueError(f"{paths[samples.sizes.index(0)]}: nothing to train on")
    if args.plan:
        return print_plan(model, recipe, args, samples, args.plan)
    bad = 0

    def leave_out(reasons):
        nonlocal bad
        for reason in reasons:
            if args.bad_samples == "error":
                raise ValueError(reason)
            bad += 1
            tqdm.write(f"left out: {reason}", file=sys.stderr)

    if vision_stage:
        leave_out(samples.bad if rank == 0 or args.bad_samples == "error" else [])

    # 3. where an earlier run of the same settings stopped
    dtype, folder = pick_precision(args.precision, device), out / "checkpoints"
    model.always_encode, model.decoder.activation_checkpointing = (
        args.shard and args.stage != "text",
        args.recompute,
    )
    learner = (PhraseContrastObjective if vision_stage else NextTokenObjective)(model)
    total, learning = (
        sum(p.numel() for p in learner.parameters()),
        sum(p.numel() for p in learner.parameters() if p.requires_grad),
    )
    flops, peak = (
        work(model),
        next(
            (
                peak
                for name, (peak, _) in GPUS.items()
                if device.type == "cuda" and name in torch.cuda.get_device_name(device)
            ),
            None,
        ),
    )
    if args.compile:
        for block in (*model.vision.layers, *model.decoder.layers):
            block.compile()
    engine = (
        spread(learner if args.shard else learner.to(device), device, dtype, args.shard)
        if world > 1 or args.shard
        else learner.to(device)
    )
    params = [p for p in learner.parameters() if p.requires_grad]
    words = model.decoder.embed_tokens.weight, model.decoder.lm_head.weight
    frozen = [
        (mine, mine[:n].clone(), p)
        for p in words
        if p.requires_grad and args.freeze_rows
        for mine, n in [own_rows(p, args.freeze_rows)]
    ]
    optimizers = make_optimizers(learner, recipe)
    batches = sampler.MicroBatchDataset(
        samples,
        recipe.batch,
        args.seed,
        tokenizer.pad_id,
        micro,
        rank,
        world,
        0,
        0,
        args.pack,
        weights,
    )
    steps = batches.steps = settings["steps"] = args.steps or math.ceil(
        recipe.epochs * batches.plan.per_epoch
    )
    if (folder.exists() or (out / "config.json").exists()) and not args.resume:
        raise ValueError(
            f"{out}: there is a run already; --resume goes on with it, or give another -o"
        )
    start = batches.start = (
        load_state(folder, json.loads(json.dumps(settings)), learner, optimizers, say)
        if args.resume
        else 0
    )
    for stale in folder.glob("step-*.tmp") if rank == 0 else []:  # what a killed run was writing
        shutil.rmtree(stale)

    if vision_stage:
        paths = [", ".join(paths)]  # what several files say of a picture was put together
    mix = "; ".join(
        f"{path} {w:.0%}"
        + (
            f" ({', '.join(f'{name} {n / sum(said.values()):.0%}' for name, n in said.most_common())})"
            if said
            else ""
        )
        for path, w, said in zip(
            paths,
            (q / batches.plan.length for q in batches.plan.quotas or samples.sizes),
            samples.languages,
        )
    )
    say(
        f"{args.stage}: {learning:,} parameters learn of {total:,}; {len(samples):,} samples, {steps:,} steps of {recipe.batch} = {world} process(es) × "
        + (
            f"micro-batches of up to {args.pack:,} tokens"
            if args.pack
            else f"{batches.parts} × {micro or recipe.batch // world}"
        )
        + f"; {str(dtype).removeprefix('torch.')} on {device.type}"
        + (f"; from step {start}" if start else "")
        + f"\n{args.stage}: {mix}"
    )
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        note_start(out, settings, world, device)
    log = open_log(out / "log.jsonl", start) if rank == 0 else open(os.devnull, "w")
    bar = tqdm(
        total=steps,
        initial=start,
        desc=args.stage,
        unit="step",
        disable=rank > 0 or None,
        mininterval=1,
    )
    asked = []  # signals that arrived: the step is finished and saved before they are obeyed; a second one acts at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, lambda number, _: (asked.append(number), signal.signal(number, signal.SIG_DFL))
        )
    workers = args.workers if args.workers is not None else 4 * (device.type == "cuda")
    source, in_row, skipped, began = (
        sampler.make_loader(batches, workers, device.type == "cuda"),
        0,
        0,
        time.time(),
    )
    mark, printed, done = began, began, start
    learner.train()
    for step in range(start, steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["full_lr"] * schedule(step, steps, recipe.warmup)
        parts = next(source)
        wait = time.time() - mark
        for part in parts:
            leave_out(part["bad_samples"])
        (total, count, tokens, places, pictures, squares, stop), losses = backward(
            engine, params, parts, device, dtype, world, asked
        )
        for _, rows, p in frozen:
            (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad)[: len(rows)] = 0
        norm = nn.utils.clip_grad_norm_(params, recipe.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        healthy = math.isfinite(total) and math.isfinite(norm)
        if healthy:
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                for mine, rows, _ in frozen:  # a gradient of zero doesn't stop weight decay
                    mine[: len(rows)] = rows
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        in_row, skipped, done = 0 if healthy else in_row + 1, skipped + (not healthy), step + 1
        seconds, mark = time.time() - mark, time.time()
        memory = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024)
        ) / 2**30
        mfu = (
            sum(a * b for a, b in zip(flops, (tokens, count, pictures, squares)))
            / seconds
            / peak
            / world
            if peak and not vision_stage
            else None
        )
        row = {
            "step": done,
            "loss": total / max(count, 1) if healthy else None,
            "lr": optimizers[0].param_groups[0]["lr"],
            "grad_norm": norm if healthy else None,
            "tokens": int(tokens),
            "targets": int(count),
            "fill": round(tokens / max(places, 1), 4),
            "seconds": round(seconds, 4),
            "data_wait": round(wait, 4),
            "memory_gib": round(memory, 3),
            "mfu": mfu,
            "skipped": skipped,
        }
        print(json.dumps(row), file=log, flush=True)
        line = (
            f"loss {row['loss'] if healthy else math.nan:.3f}, lr {row['lr']:.1e}, norm {norm:.2f}, {tokens / seconds:,.0f} tokens/s"
            + (f", MFU {mfu:.0%}" if mfu else "")
            + f", fill {row['fill']:.0%}, {memory:.1f} GiB, waited {wait / seconds:.0%}"
            + (f", {skipped} skipped" if skipped else "")
        )
        bar.set_postfix_str(line, refresh=False)
        bar.update()
        if bar.disable and mark - printed > 30:
            printed = mark
            say(
                f"{args.stage}: step {done:,} of {steps:,}: {line}, {(mark - began) / (done - start) * (steps - done) / 60:,.0f} min to go"
            )
        if not healthy:
            ours = [
                i
                for part, loss in zip(parts, losses)
                if not math.isfinite(loss)
                for i in part["sample_indices"]
            ] or [i for part in parts for i in part["sample_indices"]]
            names = "; ".join(map(samples.name, ours[:8])) + (
                f"; and {len(ours) - 8} more" if len(ours) > 8 else ""
            )
            tqdm.write(
                f"step {done}: {'loss' if not math.isfinite(total) else 'gradient'} not finite, the step is left out ({in_row} in a row). Samples: {names}",
                file=sys.stderr,
            )
            if in_row >= args.max_skips:
                raise ValueError(
                    f"step {done}: {in_row} steps in a row without a finite loss and gradient; a lower --lr, or look at the samples named above"
                )
        due = args.save_every and done % args.save_every == 0 and done < steps
        if (
            (due or stop and done < steps)
            and not save_state(
                folder, done, settings, training_state(learner, optimizers), args.keep, rank
            )
            and stop
        ):
            raise ValueError(
                f"asked to stop after step {done}, but its checkpoint could not be saved"
            )
        if stop and done < steps:
            break
    bar.close()
    if done < steps:
        say(
            f"{args.stage}: asked to stop; saved after step {done:,} of {steps:,}. The same command with --resume goes on from here"
        )
    else:
        if world > 1:
            every = torch.tensor(bad, device=device)
            dist.all_reduce(every)
            bad = int(every)
        export(model, tokenizer_file, out, rank)
        say(
            f"{args.stage}: loss {row['loss'] if healthy else math.nan:.4f} after {steps:,} steps, {time.time() - began:,.0f} s"
            + (f", {bad} bad samples left out" if bad else "")
            + (f", {skipped} steps skipped" if skipped else "")
            + f" → {out}"
        )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def own_rows(p, n):
    """(the rows of matrix p that this process has, how many of them are among the first n)."""
    if not isinstance(p, DTensor):
        return p.data, n
    share = -(-p.shape[0] // dist.get_world_size())
    return p.detach().to_local(), min(
        max(n - share * dist.get_rank(), 0), len(p.detach().to_local())
    )


def split_weights(entries):
    """["a.json:0.7", "b.json:0.3"] -> (["a.json", "b.json"], [0.7, 0.3]); without weights (…, None)."""
    pairs = []
    for entry in entries:
        path, _, weight = entry.rpartition(":")
        try:
            pairs.append(
                (path, float(weight)) if path and not Path(entry).exists() else (entry, None)
            )
        except ValueError:
            pairs.append((entry, None))
    given = [weight for _, weight in pairs if weight is not None]
    if given and (len(given) < len(pairs) or min(given) <= 0 or not math.isfinite(sum(given))):
        raise ValueError(
            f"--data: {len(given)} of {len(pairs)} files have a weight; all must, above 0, or none"
        )
    return [path for path, _ in pairs], given or None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=RECIPES)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="files of the stage's kind (see data.py); FILE:0.7 FILE:0.3 mixes them by weight",
    )
    parser.add_argument("--model", help="the model folder to start from")
    parser.add_argument(
        "--preset", choices=PRESETS, help="start from random weights of this shape instead"
    )
    parser.add_argument("--tokenizer", help="a SentencePiece .model (default: the model folder's)")
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        help="the folder of this run, and of the model that comes out of it",
    )
    for name, kind in (
        ("lr", float),
        ("batch", int),
        ("epochs", float),
        ("warmup", float),
        ("weight_decay", float),
        ("beta2", float),
        ("clip", float),
        ("max_length", int),
        ("merge", int),
        ("muon_lr", float),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, help="default: the stage's recipe"
        )
    parser.add_argument(
        "--parts",
        nargs="+",
        help="what learns, of vision, projector, decoder and parts of them (default: the stage's recipe)",
    )
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument(
        "--freeze-rows",
        type=int,
        default=0,
        help="the first N rows of the embeddings stay as they are, to the bit: only a new language's rows learn",
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        help="instead of the decoder's matrices, learn additions of this rank to them; merged in the model that comes out",
    )
    parser.add_argument(
        "--kernels",
        choices=["auto", "triton", "torch"],
        default="auto",
        help="Triton or the plain definitions; auto: Triton on a GPU",
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=0,
        help="samples a process takes at once; a step takes as many micro-batches as the batch needs (default: one)",
    )
    parser.add_argument(
        "--pack",
        type=int,
        default=0,
        metavar="TOKENS",
        help="instead: as many samples at once as fit into so many tokens, end to end, without padding",
    )
    parser.add_argument(
        "--shard",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="each process holds a part of weights, gradients and optimizer (FSDP2)",
    )
    parser.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep only each block's input, and compute the rest again backward: less memory, a third more work",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile for the blocks",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="of matrix products; auto: bf16 where the machine is faster with it",
    )
    parser.add_argument(
        "--bad-samples",
        choices=["error", "skip"],
        default="error",
        help="stop at a sample that can't be used, or leave it out and say so",
    )
    parser.add_argument(
        "--max-skips",
        type=int,
        default=10,
        help="a step whose loss or gradient is not finite is left out; so many in a row end the run",
    )
    parser.add_argument(
        "--save-every", type=int, default=200, help="steps between checkpoints; 0: none"
    )
    parser.add_argument("--keep", type=int, default=2, help="checkpoints that stay")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="go on with the run in -o, if there is one",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that prepare batches ahead (default: 4 with a GPU, else none)",
    )
    parser.add_argument(
        "--dictionary",
        metavar="FILE",
        help='vision: lines of words that mean the same, "cat = 고양이 = 猫"; what was named in one language is then found in the others',
    )
    parser.add_argument(
        "--cache", type=Path, help="folder of tokenized texts (default: tokens in the run's folder)"
    )
    parser.add_argument(
        "--plan",
        type=int,
        metavar="N",
        help="don't train: print memory, steps and hours on N processes",
    )
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="for --plan")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="for --plan: share of the GPU's peak that is reached"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if bool(args.model) == bool(args.preset):
        parser.error("give one of --model and --preset")
    if args.preset and not args.tokenizer:
        parser.error("--preset wants --tokenizer")
    if args.keep < 1:
        parser.error("--keep: at least 1")
    if args.dictionary and args.stage != "vision":
        parser.error("--dictionary: for the vision stage")
    if args.plan and args.stage == "vision":
        parser.error("--plan: for the stages with a decoder")
    given = {
        k: v for k, v in vars(args).items() if k in Recipe.__dataclass_fields__ and v is not None
    }
    train(args, replace(RECIPES[args.stage], **given))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # a first one during training finishes the step and saves
        sys.exit("train.py: interrupted before the first step")
    if (
        "RANK" in os.environ
    ):  # under torchrun: a thread of gloo's that wakes while the interpreter ends would abort the process, its work done
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
