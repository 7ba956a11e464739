"""Checkpoints of a run, OUT/checkpoints/step-N: saving, stopping on a signal, and going on.

No step draws a random number, and its number decides its samples: trained weights, optimizer state
and step are the whole state, on any number of ranks. Each rank writes the shards that it holds.
"""

import json
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.device import pick_device, pick_precision
from training.distributed import all_reduce, is_rank0, print_rank0
from training.pickles import require_plain_metadata
from vocabulary.files import entries, require_writable, set_aside
from vocabulary.identity import describe_files, describe_model, require_same
from vocabulary.records import read_complete_lines

# Ctrl-C, a supervisor's, a closed terminal's. Windows has no SIGHUP.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
CHECKPOINTS = "step-*[0-9]"  # step-00000200, but not step-00000200.tmp
# What the result of a run depends on.
SETTINGS = (
    "stage preset weights seed steps steps_given trainable lr batch_size epochs warmup_ratio "
    "decay_ratio weight_decay beta2 grad_clip max_length records_per_sample muon_lr lora_rank "
    "images files"
).split()

# torch.distributed.checkpoint warns about a single process.
warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")


def run_settings(args):
    """The identity of a run, as it comes back from JSON. `./out/x/` is the path `out/x`."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {"packed": bool(args.pack)}
    settings["images"] = args.images and os.path.normpath(args.images)
    dtype = pick_precision(args.precision, pick_device(args.device))
    settings["precision"] = str(dtype).removeprefix("torch.")
    return json.loads(json.dumps(settings))


def claim_folder(args):
    """Whether args.out holds this run, finished. ValueError if it holds anything else. --fresh
    moves a run aside. Sets args.files and args.steps_given, for the run's identity."""
    args.files = {
        "model": describe_model(args.model) if args.model else [],
        "tokenizer": describe_model(args.tokenizer) if args.tokenizer else [],
        "data": describe_files(args.data),
        "dictionary": describe_files([args.dictionary] if args.dictionary else []),
    }
    args.steps_given = args.steps
    out = Path(args.out)
    if args.fresh and not is_rank0():  # the other ranks wait for rank 0 before they look at it
        return False
    names = entries(out)
    # The text stage's tokens are there before the run begins.
    if names - {"tokens"} and "runs.jsonl" not in names:
        raise ValueError(f"{out}: was not written by train.py; give another -o")
    if args.fresh:
        set_aside(out)
    elif not args.resume and names & {"checkpoints", "config.json", "snapshots"}:
        how = "--resume goes on with it, --fresh sets it aside"
        raise ValueError(f"{out}: there is a run already; {how}")
    for folder in filter(None, (out, args.cache)):
        require_writable(folder)  # now, not at the first checkpoint
    return args.resume and check_earlier_run(args, out)


def check_earlier_run(args, out):
    """Whether the run in `out` is complete. ValueError names what this run differs in from it."""
    is_finished, settings = (out / "config.json").exists(), run_settings(args)
    if not is_finished and not any((out / "checkpoints").glob(CHECKPOINTS)):
        return False

    # What --epochs are in steps is known once the data is read.
    if args.steps is None:
        del settings["steps"]
    if not is_finished:
        del settings["steps_given"]
    where = f"{out}: the {'model' if is_finished else 'checkpoint'} is"
    last = json.loads(read_complete_lines(out / "runs.jsonl")[-1])
    require_same(where, last["settings"], settings, "give the same, or --fresh, or another -o")
    return is_finished


def require_shared(file, process, patience=60):
    """ValueError on all ranks if one of them does not see `file`, which rank 0 has written: each
    node would save its part of a checkpoint on a disk of its own. All ranks must call it."""
    if process.world_size > 1:
        dist.barrier()
    end = time.monotonic() + patience  # a network disk may show a new file late
    while not file.exists() and time.monotonic() < end:
        time.sleep(1)
    (all_see,) = all_reduce([file.exists()], process, dist.ReduceOp.MIN)
    if not all_see:
        raise ValueError(
            f"{file.parent}: not all nodes see {file.name}, which the first one wrote: give an -o "
            "on a disk that they share"
        )


def training_state(wrapped, optimizers):
    """{"weight.NAME": of each parameter that trains; "exp_avg.NAME" …: what optimizers keep}."""
    names, state = {}, {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            names[parameter] = name.removeprefix("module.")  # DDP's prefix
            state[f"weight.{names[parameter]}"] = parameter.detach()
    for optimizer in optimizers:
        for parameter, kept in optimizer.state.items():
            state |= {f"{key}.{names[parameter]}": tensor for key, tensor in kept.items()}
    return state


def save_checkpoint(args, step, wrapped, optimizers):
    """Writes a folder under another name, renames it, and deletes all but the newest
    args.keep_checkpoints. On failure prints why and returns False. All ranks must call it."""
    import torch.distributed.checkpoint as dcp  # takes a second to import

    folder = Path(args.out) / "checkpoints"
    final, temporary = folder / f"step-{step:08}", folder / f"step-{step:08}.tmp"
    if is_rank0():
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there
        folder.mkdir(parents=True, exist_ok=True)

    # All ranks write their part.
    try:
        state = training_state(wrapped, optimizers)
        dcp.save(state, checkpoint_id=temporary, no_dist=not dist.is_initialized())
        if is_rank0():
            os.replace(temporary, final)
    # A full disk raises any of these.
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if is_rank0():
            shutil.rmtree(temporary, ignore_errors=True)
            failures = getattr(error, "failures", {0: (error, None)})  # {rank: (error, traceback)}
            cause = next(iter(failures.values()))[0]
            reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
            free = shutil.disk_usage(folder).free / 2**30
            last_good = max(folder.glob(CHECKPOINTS), default="none yet")
            print_rank0(
                f"step {step}: the checkpoint could not be saved ({reason}; {free:.2f} GiB free). "
                f"Last good checkpoint: {last_good}"
            )
        return False

    if is_rank0():
        for old in sorted(folder.glob(CHECKPOINTS))[: -args.keep_checkpoints]:
            # Half a deleted checkpoint must not look like a checkpoint.
            shutil.rmtree(old.rename(f"{old}.tmp"))
    return True


def load_checkpoint(args, wrapped, optimizers):
    """Fills weights and optimizers from the newest checkpoint that can be read, and returns its
    step; 0 if there is none. ValueError if all are damaged. All ranks must call it."""
    import torch.distributed.checkpoint as dcp

    folder = Path(args.out) / "checkpoints"
    if is_rank0():
        for leftover in folder.glob("step-*.tmp"):  # of a killed run
            shutil.rmtree(leftover)
    found = sorted(folder.glob(CHECKPOINTS), reverse=True)
    if not found:
        return 0

    create_optimizer_state(optimizers)
    for path in found:
        try:
            require_plain_metadata(path)
            state = training_state(wrapped, optimizers)
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
            return int(path.name.removeprefix("step-"))
        # A torn file fails in many ways inside pickle and zip.
        except (Exception, dcp.api.CheckpointException) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print_rank0(f"{path}: can't be read, passed over ({reason[:200]})")
    raise ValueError(f"{folder}: no checkpoint can be read; remove it to start again")


def create_optimizer_state(optimizers):
    """Creates the tensors to fill, by a step at a rate of zero: it changes no weight."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class StopSignals:
    """Counts STOP_SIGNALS: the run ends after its step, saved. A second Ctrl-C acts at once. A
    second SIGTERM does not: a supervisor and torchrun may both send one."""

    def __init__(self):
        self.count = 0
        for number in STOP_SIGNALS:
            # Under nohup a closed terminal is ignored, and stays so.
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if number in (signal.SIGINT, signal.SIGTERM) or not is_ignored:
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.count += 1
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
