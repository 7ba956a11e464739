"""Checkpoints of a run, OUT/checkpoints/step-N: saving, stopping on a signal, and going on.

No step draws a random number, and its samples are a function of its number: trained weights,
optimizer state and step are the whole state, on any number of ranks. A sharded tensor is written by
the ranks that hold it (torch.distributed.checkpoint).
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import write_json
from training.device import pick_device, pick_precision
from training.distributed import is_rank0, print_rank0
from vocabulary.files import set_aside
from vocabulary.identity import describe_files, describe_model, require_same
from vocabulary.records import read_complete_lines

FINISHED = "step-*[0-9]"  # step-00000200, but not step-00000200.tmp
# What the result of a run depends on, beside the contents of its files.
SETTINGS = (
    "stage model preset data weights dictionary seed steps steps_given trainable lr batch_size "
    "epochs warmup_ratio weight_decay beta2 grad_clip max_length records_per_sample muon_lr "
    "freeze_embeddings lora_rank images files"
).split()
PATHS = ("model", "data", "dictionary")  # for people; earlier versions noted no contents


def describe_inputs(args):
    """The files that a run is made from, as vocabulary/identity.py describes them."""
    return {
        "model": describe_model(args.model) if args.model else [],
        "tokenizer": describe_model(args.tokenizer) if args.tokenizer else [],
        "data": describe_files(args.data),
        "dictionary": describe_files([args.dictionary] if args.dictionary else []),
    }


def run_settings(args):
    """The identity of a run, as it comes back from JSON. `./out/x/` is the path `out/x`."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {"packed": bool(args.pack)}
    settings["data"] = [os.path.normpath(path) for path in args.data]
    for name in ("model", "images"):
        settings[name] = settings[name] and os.path.normpath(settings[name])
    dtype = pick_precision(args.precision, pick_device(args.device))
    settings["precision"] = str(dtype).removeprefix("torch.")
    return json.loads(json.dumps(settings))


def require_same_settings(where, saved, args, is_finished=False):
    """ValueError that names what this run differs in from the one that is saved."""
    settings = run_settings(args)
    # What --epochs are in steps is known once the data is read.
    if args.steps is None:
        del settings["steps"]
    if not is_finished:
        del settings["steps_given"]
    for name in PATHS if "files" in saved else ():
        del settings[name]
    require_same(f"{where} is", saved, settings, "give the same, or --fresh, or another -o")


def claim_folder(args):
    """Whether args.out holds this run, finished. Notes in `args` what the run is made from.

    ValueError if it holds another run, or something else. --fresh moves a run aside."""
    args.files, args.steps_given = describe_inputs(args), args.steps
    out = Path(args.out)
    if args.fresh and not is_rank0():  # the other ranks wait for rank 0 before they look at it
        return False
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    # The text stage's tokens are there before the run begins.
    if names - {"tokens"} and "runs.jsonl" not in names:
        raise ValueError(f"{out}: was not written by train.py; give another -o")
    if args.fresh:
        set_aside(out)
    return args.resume and check_earlier_run(args, out)


def check_earlier_run(args, out):
    """Whether the run in `out` is complete. ValueError if it is another run."""
    is_finished, what = (out / "config.json").exists(), "model"
    if not is_finished:
        what = "checkpoint"
        if not any((out / "checkpoints").glob(FINISHED)):
            return False
    last = read_complete_lines(out / "runs.jsonl")[-1]
    require_same_settings(f"{out}: the {what}", json.loads(last)["settings"], args, is_finished)
    return is_finished


def training_state(wrapped, optimizers):
    """{name: tensor} of all parameters that train, and of what the optimizers keep for each."""
    names = {
        parameter: name.removeprefix("module.")  # DDP's prefix
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    state = {f"weight.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, kept in optimizer.state.items():
            state |= {f"{key}.{names[parameter]}": tensor for key, tensor in kept.items()}
    return state


def save_checkpoint(args, step, wrapped, optimizers):
    """Writes to a temporary folder and renames it, then deletes all but the newest
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
        with no_warnings():
            dcp.save(state, checkpoint_id=temporary, no_dist=not dist.is_initialized())
        if is_rank0():
            write_json(temporary / "settings.json", run_settings(args))
            os.replace(temporary, final)
    # A full disk raises any of these.
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if is_rank0():
            shutil.rmtree(temporary, ignore_errors=True)
            failures = getattr(error, "failures", None)  # {rank: (error, traceback)}
            cause = next(iter(failures.values()))[0] if failures else error
            reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
            free = shutil.disk_usage(folder).free / 2**30
            last_good = max(folder.glob(FINISHED), default="none yet")
            tqdm.write(
                f"step {step}: the checkpoint could not be saved ({reason}; {free:.2f} GiB free). "
                f"Last good checkpoint: {last_good}",
                file=sys.stderr,
            )
        return False

    if is_rank0():
        for old in sorted(folder.glob(FINISHED))[: -args.keep_checkpoints]:
            # Half a deleted checkpoint must not look like a checkpoint.
            shutil.rmtree(old.rename(f"{old}.tmp"))
    return True


def load_checkpoint(args, wrapped, optimizers):
    """Fills weights and optimizers from the newest checkpoint that can be read, and returns its
    step; 0 if there is none. ValueError if it has other settings than this run, or if all are
    damaged. All ranks must call it."""
    import torch.distributed.checkpoint as dcp

    folder, step = Path(args.out) / "checkpoints", 0
    found = sorted(folder.glob(FINISHED), reverse=True)
    if found:
        create_optimizer_state(optimizers)

    # The newest that is whole.
    for path in found:
        try:
            saved = json.loads((path / "settings.json").read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            print_rank0(f"{path}: damaged, passed over ({type(error).__name__})")
            continue
        require_same_settings(f"{folder}: the checkpoint", saved, args)
        try:
            state = training_state(wrapped, optimizers)
            with no_warnings():
                dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        # A torn file fails in many ways inside pickle and zip.
        except (Exception, dcp.api.CheckpointException) as error:
            print_rank0(f"{path}: damaged, passed over ({type(error).__name__})")
            continue

        step = int(path.name.removeprefix("step-"))
        break

    if found and not step:
        raise ValueError(f"{folder}: no checkpoint can be read; remove it to start again")
    if is_rank0():
        for leftover in folder.glob("step-*.tmp"):  # of a killed run
            shutil.rmtree(leftover)
    return step


def create_optimizer_state(optimizers):
    """Creates the tensors to fill, by a step with zero gradients at a rate of zero: it changes no
    weight."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def no_warnings():
    """torch.distributed.checkpoint warns about a single process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class StopSignals:
    """Counts Ctrl-C and SIGTERM: the step in progress is finished and saved before the run ends. A
    second one acts at once."""

    def __init__(self):
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.count += 1
        signal.signal(number, signal.SIG_DFL)
