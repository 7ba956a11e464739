"""A run that is killed, stopped, or runs out of disk: what is left, and how it goes on."""

import dataclasses
import json
import pickle
import shutil
import signal
import subprocess
import time

import pytest
import torch
from training_helpers import (
    ENVIRONMENT,
    checkpoints,
    command,
    rows,
    run,
    same_weights,
)

import train
from training import resume
from training.distributed import Process
from training.pickles import require_plain_metadata


class Code:
    def __reduce__(self):
        return print, ("code in a checkpoint runs",)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, capsys):
    dotted = b"\x80\x04\x8c'torch.distributed.checkpoint.filesystem\x8c\tos.getcwd\x93)R."
    for content in (pickle.dumps(Code()), dotted):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match="in it: not what train.py writes"):
            require_plain_metadata(tmp_path)
    assert capsys.readouterr().out == ""


def test_resuming_runs_no_code_of_a_checkpoint(train_here, tmp_path):
    more = "instruct", "chats.json", "--steps", 4, "--save-every", 2, "--resume"
    assert train_here(*more)[1] == 0
    (tmp_path / "out" / "config.json").unlink()
    for folder in checkpoints(tmp_path / "out"):
        (folder / ".metadata").write_bytes(pickle.dumps(Code()))
    text, message = train_here(*more)
    assert "no checkpoint can be read" in message and "code in a checkpoint runs" not in text


def test_each_flag_of_a_recipe_belongs_to_the_identity_of_a_run():
    assert {field.name for field in dataclasses.fields(train.Recipe)} <= set(resume.SETTINGS)


def test_a_run_that_is_killed_goes_on_to_the_same_weights_bit_for_bit(start, world, tmp_path):
    args = ("instruct", start, world / "chats.json")
    more = ("--batch-size", 4, "--steps", 30, "--save-every", 5, "--muon-lr", 0.01, "--resume")
    assert run(*args, tmp_path / "whole", *more).returncode == 0
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        command(*args, cut, *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    while not checkpoints(cut) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()

    # Three newer ones than the last good one: cut off, a byte changed, and not yet renamed.
    newest = checkpoints(cut)[-1]
    torn, changed, half = (newest.parent / f"step-00000{name}" for name in (997, 998, "999.tmp"))
    for copy in (torn, changed, half):
        shutil.copytree(newest, copy)
    shard = (torn / "__0_0.distcp").read_bytes()
    (torn / "__0_0.distcp").write_bytes(shard[:1000])
    (changed / "__0_0.distcp").write_bytes(shard[:5000] + bytes([shard[5000] ^ 1]) + shard[5001:])

    # The log is ahead of the checkpoint, and its last line is cut off.
    with open(cut / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"step": int(newest.name.removeprefix("step-")) + 1}) + '\n{"step": 1')

    again = run(*args, cut, *more)
    assert again.returncode == 0, again.stderr
    assert "step-00000997: can't be read, passed over" in again.stderr
    assert "step-00000998: can't be read, passed over" in again.stderr
    assert not half.exists()
    assert [row["step"] for row in rows(cut)] == list(range(1, 31)), "every step once"
    assert same_weights(tmp_path / "whole", cut)

    finished = run(*args, cut, *more)
    assert finished.returncode == 0 and "finished before, nothing to do" in finished.stderr


def test_a_checkpoint_of_other_settings_is_not_continued(start, world, tmp_path):
    data_file, out = world / "captions.json", tmp_path / "out"
    more = ("--batch-size", 4, "--save-every", 2)
    assert run("align", start, data_file, out, *more, "--steps", 4).returncode == 0
    (out / "config.json").unlink()

    done = run("align", start, data_file, out, *more, "--steps", 6, "--resume")
    assert done.returncode == 1 and "steps: 4 → 6" in done.stderr
    done = run("align", start, data_file, out, *more, "--steps", 4)
    assert (
        done.returncode == 1 and "there is a run already; --resume goes on with it" in done.stderr
    )


@pytest.mark.parametrize(
    "more, changed",
    [
        (("--seed", 1), "seed: 0 → 1"),
        (("--lr", 2e-3), "lr: 0.001 → 0.002"),
        (("--trainable", "projector", "vision"), "trainable: ['projector'] → "),
        (("--pack", 2048), "packed: False → True"),
        (("--records-per-sample", 2), "records_per_sample: 1 → 2"),
    ],
)
def test_each_setting_that_changes_the_result_is_named(train_here, tmp_path, more, changed):
    common = ("--steps", 3, "--save-every", 2)
    assert train_here("align", "captions.json", *common)[1] == 0
    (tmp_path / "out" / "config.json").unlink()
    assert changed in train_here("align", "captions.json", *common, "--resume", *more)[1]


def test_a_disk_of_its_own_is_noticed_on_a_node_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(resume.dist, "barrier", lambda: None)
    monkeypatch.setattr(resume, "all_reduce", lambda values, *_: [min(*values, other)])
    process, file = Process(1, 2, torch.device("cpu"), torch.float32), tmp_path / "runs.jsonl"
    other = True
    with pytest.raises(ValueError, match="give an -o on a disk that they share"):
        resume.require_shared(file, process, patience=0)
    file.touch()
    resume.require_shared(file, process, patience=0)
    other = False
    with pytest.raises(ValueError, match="not all nodes see runs.jsonl"):
        resume.require_shared(file, process, patience=0)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_under_nohup_a_closed_terminal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resume.StopSignals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# SIGTERM comes twice where a supervisor and torchrun both send it.
@pytest.mark.parametrize("name, times", [("SIGTERM", 2), ("SIGINT", 1), ("SIGHUP", 1)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    train_here, tmp_path, monkeypatch, name, times
):
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    if name == "SIGHUP":
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    more = ("--steps", 6, "--lr", 1e-3, "--resume")
    assert train_here("instruct", "chats.json", *more, out="whole")[1] == 0
    real, calls = train.accumulate_gradients, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            for _ in range(times):  # os.kill would end the process on Windows
                signal.raise_signal(getattr(signal, name))
        return real(*args)

    monkeypatch.setattr(train, "accumulate_gradients", interrupted)
    text, code = train_here("instruct", "chats.json", *more, "--keep-checkpoints", 1)
    assert code == 0
    assert "asked to stop; saved after step 3 of 6" in text
    assert "The same command with --resume goes on from here" in text
    out = tmp_path / "out"
    assert not (out / "config.json").exists()

    more = (*more, "--save-every", 1, "--keep-checkpoints", 1)
    assert train_here("instruct", "chats.json", *more)[1] == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000005"]
    assert same_weights(tmp_path / "whole", out)


def test_a_full_disk_is_said_and_the_last_good_checkpoint_stands(train_here, tmp_path):
    """A limit on the size of a file stands in for the disk: the write fails in the same place."""
    resource = pytest.importorskip("resource")
    more = ("--steps", 6, "--save-every", 2, "--lr", 1e-3)
    assert train_here("instruct", "chats.json", *more, out="whole")[1] == 0
    whole = tmp_path / "whole"
    files = (whole / "checkpoints" / "step-00000004").iterdir()
    size = max(path.stat().st_size for path in files)
    assert size > (whole / "model.safetensors").stat().st_size

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, before[1]))
    try:
        text, code = train_here("instruct", "chats.json", *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 0
    assert "step 2: the checkpoint could not be saved" in text
    assert "GiB free" in text and "Last good checkpoint: none yet" in text
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
    assert same_weights(whole, tmp_path / "out"), "the run goes on"
