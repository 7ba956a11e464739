"""Runs the steps of a recipe, each a command, and skips those whose result is there.

A result counts only if the same command made it from the same files: steps.json in the run's
folder notes both. Otherwise it is refused by name. Changed code is named, but nothing is trained
again unasked.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from vocabulary.command import use_colour
from vocabulary.files import claim_output, read_json, write_atomically, write_json
from vocabulary.identity import digest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vocabulary", "kernels", "checkpoint", "training", "evaluation", "demo")
CODE = ("*.py", *(f"{name}/**/*.py" for name in PACKAGES), "demo/**/*.json")
FLOAT32_TAKES = 2.5  # times as long to train, on two cores of one age


class Step(NamedTuple):
    name: str  # its first word is its row in timing.json
    command: list  # what comes after `python`
    reads: list  # files whose contents decide the result
    writes: Path  # the file that is there when the step is complete
    seconds: int = 0  # about how long it takes on two cores, training with bfloat16
    trains: bool = False  # into the folder of `writes`, where it can resume
    again: bool = False  # quick: made again, not refused, where it was made otherwise


def short_path(path):
    """A path relative to the working directory, if it is inside."""
    path = Path(os.path.abspath(path))
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def shown(command):
    """A command as it can be pasted into a shell."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([str(short_path(sys.executable)), *command])


def run_command(command):
    """Runs `python COMMAND` and returns its exit status."""
    process = subprocess.Popen([sys.executable, *command])
    # SIGTERM reaches this process alone, so it is passed on.
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # the command received it as well: wait until it has saved
            continue
    signal.signal(signal.SIGTERM, before)
    return process.returncode


def digests(paths):
    """{path: digest of the contents} of the files that are there."""
    files = [path for path in paths if path.is_file()]
    return {path.as_posix(): digest(path) for path in files}


def code_digests():
    """{path: digest} of the code that steps may run."""
    return digests(short_path(path) for pattern in CODE for path in sorted(ROOT.glob(pattern)))


def multiplies_bf16():
    from kernels.device import has_bf16, pick_device  # importing torch takes seconds

    return has_bf16(pick_device())


def difference(old, new):
    """How two commands differ, in words."""
    # Flag by flag, each with its values.
    old, new = (" ".join(command).replace(" -", "\n-").split("\n") for command in (old, new))
    gone = " ".join(flag for flag in old if flag not in new)
    added = " ".join(flag for flag in new if flag not in old)
    return f"was made with {gone or 'less'}, not with {added or 'less'}"


def is_run(folder):
    """Whether a folder is the demo's: steps.json says what made its contents."""
    path = folder / "steps.json"
    record = read_json(path) if path.exists() else None
    return isinstance(record, dict) and {"steps", "code"} <= record.keys()


class Run:
    """A folder, and the record of what made its contents."""

    def __init__(self, out):
        self.out, self.record = out, {"steps": {}, "code": code_digests()}
        if is_run(out):
            self.record = read_json(out / "steps.json")
        else:
            for name in ("steps.json", "commands.txt", "timing.json"):
                claim_output(out / name, lambda path: False)
        self.steps = self.record["steps"]

    def is_done(self, step, check_inputs=True):
        """Whether the step's result is there. Raises ValueError if it was made otherwise."""
        made = self.steps.get(step.name)
        # A stage has its folder long before its model.
        result = step.writes.parent if step.trains else step.writes
        # The other commands refuse to replace what they did not write. A tokenizer tells nothing.
        is_checked = step.trains or result.suffix == ".model"
        if not result.exists() or (made is None and not is_checked):
            return False

        problem = None
        if made is None:
            problem = "is not in steps.json, so it is not known what made it"
        elif made["command"] != step.command:
            problem = difference(made["command"], step.command)
        elif check_inputs and (other := digests(step.reads).items() ^ made["inputs"].items()):
            problem = f"was made from another {min(other)[0]}"
        if problem and not step.again:
            advice = f"choose another folder with --out, or move {self.out} aside with --fresh"
            raise ValueError(f"{result} {problem}: {advice}")
        return not problem and made["complete"] and step.writes.exists()

    def run(self, steps, runner=run_command):
        """Runs the steps that are not done. Raises ValueError if one fails or is refused."""
        # Refuse before anything runs. After an open step the inputs are not there yet.
        left = []
        for step in steps:
            if not self.is_done(step, check_inputs=not left):
                left.append(step)
        done = ", ".join(step.name for step in steps if step not in left)
        if done:
            print(f"{self.out}: done before: {done}")
            # Code is named and not refused: a comment changes it, too, and training takes hours.
            changed = {path for path, _ in code_digests().items() ^ self.record["code"].items()}
            if changed:
                print(f"It is kept, though code has changed since: {', '.join(sorted(changed))}")
        if left:
            is_slow = not multiplies_bf16()
            factors = (FLOAT32_TAKES if step.trains and is_slow else 1 for step in left)
            minutes = sum(step.seconds * factor for step, factor in zip(left, factors)) / 60
            print(f"{self.out}: to do: {', '.join(step.name for step in left)}")
            why = ": this processor does not multiply bfloat16 numbers" if is_slow else ""
            print(f"About {minutes:.0f} to {1.75 * minutes:.0f} minutes on two cores{why}")

        for step in steps:
            if not self.is_done(step):
                self.run_step(step, runner)

    def run_step(self, step, runner):
        """Prints and runs one step. Notes what made its result, and in how many seconds."""
        inputs = digests(step.reads)
        for path in step.reads:
            if path.as_posix() not in inputs:
                raise ValueError(f"{step.name}: {path} is missing")

        # A stage resumes: the seconds before an interruption count.
        before = self.steps.get(step.name, {"complete": True})
        resumes = step.trains and not before["complete"] and step.writes.parent.exists()
        seconds = before["seconds"] if resumes else 0
        made = {"command": step.command, "inputs": inputs, "complete": False, "seconds": seconds}

        # Note it first: half a result is never taken for another one's.
        self.steps[step.name] = made
        self.write()
        bold, plain = ("\033[1m", "\033[0m") if use_colour() else ("", "")
        print(f"\n{bold}{shown(step.command)}{plain}", flush=True)
        start = time.time()
        status = runner(step.command)
        made["seconds"] = round(seconds + time.time() - start, 1)
        made["complete"] = status == 0 and step.writes.exists()
        self.write()
        if not made["complete"]:
            raise ValueError(f"{step.name} ended early, with exit status {status}: run it again")
        print(f"{step.name}: {made['seconds']:.0f} s")

    def timing(self):
        """{step: seconds}; steps with the same first word are one."""
        seconds = Counter()
        for name, made in self.steps.items():
            seconds[name.split()[0]] += made["seconds"]
        return {name: round(value, 1) for name, value in seconds.items()}

    def write(self):
        """Writes commands.txt and timing.json, which the report shows, and the record."""
        self.out.mkdir(parents=True, exist_ok=True)
        commands = "".join(shown(made["command"]) + "\n" for made in self.steps.values())
        write_atomically(self.out / "commands.txt", lambda file: file.write(commands.encode()))
        write_json(self.out / "timing.json", self.timing(), 1)
        write_json(self.out / "steps.json", self.record, 1)
