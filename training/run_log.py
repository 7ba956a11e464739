"""What a run reports: its progress on the terminal, a line per step in log.jsonl, a line per start
in runs.jsonl."""

import json
import math
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import write_atomically
from kernels.device import peak_flops
from training.cost import flops_per_unit, size, step_flops
from training.distributed import all_reduce, is_rank0, print_rank0
from training.resume import run_settings
from vocabulary.command import first_few
from vocabulary.records import read_complete_lines

try:
    import resource
except ImportError:  # on Windows
    resource = None


class RunLog:
    """Logs each step, and counts what is left out."""

    def __init__(self, args, process, objective, dataset, batches):
        self.args, self.process, self.dataset, self.batches = args, process, dataset, batches
        self.flops = flops_per_unit(objective.model)
        self.peak_flops = None if args.stage == "vision" else peak_flops(process.device)
        self.num_bad_samples, self.num_targets = 0, 0
        self.num_skips, self.skips_in_a_row = 0, 0  # steps without an update
        self.loss = math.nan  # of the last step

        if is_rank0():
            self.report_bad_samples(getattr(dataset, "bad", ()))
            self.file = open_files(args, process, batches.start)
        print_rank0(describe_run(args, process, objective, dataset, batches))
        is_shown = is_rank0() and sys.stderr.isatty()
        self.bar = make_bar(args.stage, batches.start, batches.steps, is_shown)
        self.start_time = self.step_time = self.print_time = time.perf_counter()

    def batch_ready(self, micro_batches):
        """Notes how long the step waited for its data, and reports what was left out of it."""
        self.data_wait = time.perf_counter() - self.step_time
        for micro_batch in micro_batches:
            self.report_bad_samples(micro_batch["bad_samples"])

    def report_bad_samples(self, reasons):
        """ValueError with --bad-samples error."""
        for reason in reasons:
            if self.args.bad_samples == "error":
                raise ValueError(reason)
            self.num_bad_samples += 1
            tqdm.write(f"left out: {reason}", file=sys.stderr)

    def write_step(self, step, stats, loss, lr, grad_norm):
        """Logs a step, counted from 1. It was skipped if loss or norm is infinite or NaN."""
        seconds, self.step_time = time.perf_counter() - self.step_time, time.perf_counter()
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if stats.num_targets:  # else the loss is 0, and says nothing
            self.loss = loss
        self.skips_in_a_row = 0 if is_finite else self.skips_in_a_row + 1
        self.num_skips += not is_finite
        self.num_targets += stats.num_targets

        # Model FLOPs utilisation: the share of the GPUs' peak that is useful work.
        mfu = None
        if self.peak_flops:
            flops = step_flops(self.flops, stats)
            mfu = flops / seconds / self.peak_flops / self.process.world_size

        # One line for programs.
        row = {
            "step": step,
            "loss": loss if is_finite and stats.num_targets else None,
            "lr": lr,
            "grad_norm": grad_norm if is_finite else None,
            "tokens": int(stats.num_tokens),
            "targets": int(stats.num_targets),
            "non_padding_share": round(stats.num_tokens / max(stats.padded_tokens, 1), 4),
            "seconds": round(seconds, 4),
            "data_wait": round(self.data_wait, 4),
            "memory_gib": peak_memory_gib(self.process.device),
            "mfu": mfu,
            "skipped": self.num_skips,
        }
        if is_rank0():
            print(json.dumps(row), file=self.file, flush=True)

        # Two lines for people: how it learns, and how fast.
        shown = f"loss {loss:.3f}" if stats.num_targets else "no targets"
        learning = f"{shown}, lr {lr:.1e}, norm {grad_norm:.3g}"
        speed = [f"{tqdm.format_sizeof(stats.num_tokens / seconds)} tokens/s"]
        if mfu:
            speed.append(f"MFU {mfu:.0%}")
        if row["memory_gib"]:
            speed.append(f"{row['memory_gib']:.1f} GiB")
        if self.num_skips:
            speed.append(f"{self.num_skips:,} skipped")
        speed.append(f"{row['non_padding_share']:.0%} non-padding")
        speed.append(f"waited {self.data_wait / seconds:.0%}")
        self.show_progress(step, learning, speed)

    def write_validation(self, step, accuracy, seconds):
        """Logs the shares of exact answers, {"n", "full", "blind": {skill: number}}."""
        row = {"step": step, "validation": accuracy, "seconds": round(seconds, 4)}
        print(json.dumps(row, ensure_ascii=False), file=self.file, flush=True)
        n, full, blind = (accuracy[key] for key in ("n", "full", "blind"))
        skills = ", ".join(f"{skill} {full[skill]:.0%}" for skill in n if skill != "all")
        right = f"{full['all']:.1%} of {n['all']} right, blind {blind['all']:.1%}"
        self.print_line(f"step {step:,}: validation: {right} ({skills})")

    def restart_clock(self):
        """What was done between two steps does not count in the time of the next one."""
        self.step_time = time.perf_counter()

    def show_progress(self, step, learning, speed):
        """Moves the bar on a terminal; elsewhere prints every 30 seconds. On 80 columns."""
        # The bar has room for three numbers.
        short = [learning.partition(",")[0], *speed[:2]]
        self.bar.set_postfix_str(", ".join(short), refresh=False)
        self.bar.update()

        if self.bar.disable and self.step_time - self.print_time > 30:
            self.print_time = self.step_time
            done, total = step - self.batches.start, self.batches.steps
            minutes = (self.step_time - self.start_time) / done * (total - step) / 60
            progress = f"{self.args.stage} {step:,}/{total:,}, {minutes:,.0f} min to go"
            print_rank0(f"{progress}: {learning}\n  {', '.join(speed)}")

    def report_skip(self, step, micro_batches, losses):
        """Names this rank's samples whose loss is not finite; all, if only the gradient is not.
        ValueError after --max-skips steps in a row."""
        wrong = [batch for batch, loss in zip(micro_batches, losses) if not math.isfinite(loss)]
        indices = [i for batch in wrong or micro_batches for i in batch["sample_indices"]]
        names = first_few(map(self.dataset.name, indices), separator="; ")

        # Too many of them end the run.
        cause, in_a_row = "gradient" if math.isfinite(self.loss) else "loss", self.skips_in_a_row
        skipped = f"the step is skipped ({in_a_row} in a row)"
        tqdm.write(f"step {step}: {cause} not finite, {skipped}. Samples: {names}", file=sys.stderr)
        if in_a_row >= self.args.max_skips:
            raise ValueError(
                f"step {step}: {in_a_row} steps in a row without a finite loss and gradient; try a "
                "lower --lr, or look at the samples named above"
            )

    def report_stop(self, step, is_saved):
        """After a signal. ValueError if the checkpoint could not be saved."""
        self.bar.close()
        if not is_saved:
            raise ValueError(f"asked to stop after step {step}, but its checkpoint is not saved")
        done = f"saved after step {step:,} of {self.batches.steps:,}"
        self.print_line(f"asked to stop; {done}. The same command with --resume goes on from here")

    def require_updates(self):
        """ValueError if no step of this run had a target, or all steps were skipped."""
        nothing = "nothing was trained, no model is written"
        if not self.num_targets and self.batches.start < self.batches.steps:
            raise ValueError(f"no sample could be used: {nothing}")
        if self.num_skips == self.batches.steps:
            raise ValueError(f"no step had a finite loss: {nothing}")

    def print_summary(self):
        """The last line of a finished run. All ranks must call it."""
        self.bar.close()
        seconds = time.perf_counter() - self.start_time
        line = f"loss {self.loss:.4f} after {self.batches.steps:,} steps, {seconds:,.0f} s"
        counts = {
            "bad samples left out": all_reduce([self.num_bad_samples], self.process)[0],
            "first turns of the model left out": getattr(self.dataset, "num_dropped", 0),
            "steps skipped": self.num_skips,
        }
        for what, count in counts.items():
            line += f", {count:,.0f} {what}" if count else ""
        self.print_line(f"{line} → {self.args.out}")

    def print_line(self, text):
        print_rank0(f"{self.args.stage}: {text}")


def make_bar(stage, start, steps, is_shown):
    """The progress in numbers. Without a drawn bar the line fits on 80 columns."""
    text = "{desc} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
    options = {"bar_format": text, "disable": not is_shown, "mininterval": 1}
    return tqdm(total=steps, initial=start, desc=stage, **options)


def describe_run(args, process, objective, dataset, batches):
    """What trains on what: a line for the run, and one per file."""
    trained = size(weight for weight in objective.parameters() if weight.requires_grad)
    micro_batch_size = args.micro_batch_size or args.batch_size // process.world_size
    micro_batches = f"{batches.num_micro_batches} × {micro_batch_size}"
    if args.pack:
        micro_batches = f"micro-batches of up to {args.pack:,} tokens"
    dtype = str(process.dtype).removeprefix("torch.")
    text = (
        f"{args.stage}: {trained:,} of {size(objective.parameters()):,} parameters train; "
        f"{len(dataset):,} samples, {batches.steps:,} steps of {args.batch_size} = "
        f"{process.world_size} process(es) × {micro_batches}; {dtype} on {process.device.type}"
    )
    if batches.start:
        text += f"; from step {batches.start}"

    # Shares of the files, and of their languages. The vision stage makes one of all files.
    paths = [", ".join(args.data)] if args.stage == "vision" else args.data
    sizes = batches.sampler.quotas or dataset.sizes
    for path, num_samples, languages in zip(paths, sizes, dataset.languages):
        text += f"\n  {num_samples / batches.sampler.length:.0%} {path}"
        for name, number in Counter(languages).most_common():
            text += f", {name} {number / sum(languages.values()):.0%}"
    return text


def open_files(args, process, last_step):
    """Adds a row to runs.jsonl, and opens log.jsonl, without rows of steps after last_step."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "runs.jsonl", "a", encoding="utf-8") as file:
        print(json.dumps(describe_start(args, process)), file=file)

    # A line that a crash cut off is left out, too.
    path = out / "log.jsonl"
    kept = [line for line in read_complete_lines(path) if json.loads(line)["step"] <= last_step]
    write_atomically(path, lambda file: file.writelines(kept))
    return open(path, "a", encoding="utf-8")


def describe_start(args, process):
    """Command, settings, code, versions and machine of a run."""
    commit, folder = None, Path(__file__).parent.parent
    # Without a repository nothing is asked: a Mac without git would offer to install it.
    if (folder / ".git").exists() and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
        commit = done.stdout.strip() or None

    device = f"{platform.machine()} {process.device.type}"
    if process.device.type == "cuda":
        device = torch.cuda.get_device_name(process.device)
    packages = ("torch", "numpy", "sentencepiece", "pillow", "triton")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "settings": run_settings(args),
        "world_size": process.world_size,
        "commit": commit,
        "python": platform.python_version(),
        "packages": {d.name: d.version for d in metadata.distributions() if d.name in packages},
        "device": device,
    }


def peak_memory_gib(device):
    """The most memory used so far: of the GPU, or of this process. None where it is not known."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)
