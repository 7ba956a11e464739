"""What the tests of training share: starting train.py as a user does, and reading its results."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

import checkpoint
import train
from model import XLlava
from training.resume import STOP_SIGNALS

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def write_random_model(config, tokenizer_file, folder):
    """A model folder with random weights."""
    torch.manual_seed(0)
    model = XLlava(config).init_weights()
    checkpoint.write_model(config, model.state_dict().items(), tokenizer_file, folder)
    return folder


def command(stage, start, data_file, out, *more, processes=1):
    """The command line of a stage in float32."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    args = [ROOT / "train.py", stage, "--model", start, "--data", data_file, "-o", out]
    exact = [] if "--estimate" in more else ["--precision", "fp32"]
    return [*launcher, *map(str, [*args, *exact, *more])]


def run(*args, processes=1):
    """Runs train.py in processes of its own."""
    return subprocess.run(
        command(*args, processes=processes),
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
    )


class TrainHere:
    """Runs train.py in this process: (what it printed, what it exited with)."""

    def __init__(self, start, world, tmp_path, monkeypatch, capsys):
        self.start, self.world, self.tmp_path = start, world, tmp_path
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, stage, file, *more, out="out"):
        handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
        words = command(
            stage, self.start, self.world / file, self.tmp_path / out, "--batch-size", 4, *more
        )[1:]
        self.monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            train.main()
        except ValueError as error:
            code = str(error)
        for number, handler in zip(STOP_SIGNALS, handlers):
            signal.signal(number, handler)
        captured = self.capsys.readouterr()
        return captured.err + captured.out, code


def rows(out):
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def checkpoints(out):
    return sorted((out / "checkpoints").glob("step-*[0-9]"))


def losses(out):
    return [row["loss"] for row in rows(out)]


def weights(out):
    return checkpoint.load_safetensors(out / "model.safetensors")


def same_weights(one, two):
    """Whether two model folders hold the same weights to the bit."""
    one, two = weights(one), weights(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def write_captions(world, folder, lost=(3,), empty=None):
    """The world's captions as folder/set.json. The images of the records `lost` do not exist,
    record `empty` has no conversations."""
    records = json.loads((world / "captions.json").read_text("utf-8"))
    for record in records:
        record["image"] = str(world / record["image"])
    for i in lost:
        records[i]["image"] = f"lost{i}.png"
    if empty is not None:
        records[empty]["conversations"] = []
    (folder / "set.json").write_text(json.dumps(records), encoding="utf-8")
