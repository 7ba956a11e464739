"""Training: the global loss and its gradients, resuming, and what a user sees. Runs train.py as a user does, in small."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import train
from model import IGNORE_INDEX, XLlava

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def start(tmp_path_factory, config, tokenizer_file):
    """A model folder with random weights."""
    folder = tmp_path_factory.mktemp("start") / "model"
    torch.manual_seed(0)
    checkpoint.save_model(XLlava(config).init_weights(), tokenizer_file, folder)
    return folder


def command(stage, start, data_file, out, *more, processes=1):
    run = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    )
    return [
        *run,
        ROOT / "train.py",
        stage,
        "--model",
        start,
        "--data",
        data_file,
        "-o",
        out,
        "--precision",
        "fp32",
        *map(str, more),
    ]


def run(*args, processes=1, **kwargs):
    return subprocess.run(
        command(*args, processes=processes, **kwargs),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [row["loss"] for row in rows(out)]


def weights(out):
    return checkpoint.load_safetensors(out / "model.safetensors")


def test_the_schedule_rises_then_falls_to_zero():
    rates = [train.schedule(step, 100, 0.1) for step in range(101)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[9] == rates[10] == 1
        and rates[55] == pytest.approx(0.5)
        and rates[100] == pytest.approx(0, abs=1e-12)
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_is_pytorchs_and_moves_a_matrix_by_all_its_directions_alike(shape):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = (
        train.Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1),
    )
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(ours, theirs)), (
        "steps of 0.01 in bfloat16"
    )
    low, high = torch.linalg.svdvals(
        train.Muon.orthogonal(torch.randn(2, *shape)).float()
    ).aminmax()
    assert 0.4 < low and high < 1.3


def test_gradients_do_not_depend_on_how_a_batch_is_cut(config, tokenizer, world):
    """The sum of token losses over the global number of targets: hand-written here as one mean over all targets of all samples."""
    torch.manual_seed(0)
    model = XLlava(config).init_weights().double()
    samples = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)
    whole = data.collate(
        [samples.sample(i) for i in range(8)], tokenizer.pad_id
    )  # texts among the pictures, all lengths
    hidden = model(whole["ids"], whole["pixels"])
    torch.nn.functional.cross_entropy(
        model.decoder.lm_head(hidden).flatten(0, 1),
        whole["targets"].flatten(),
        ignore_index=IGNORE_INDEX,
    ).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for accumulate, ranks in ((1, 1), (4, 1), (2, 2)):
        model.zero_grad()
        total = 0
        for rank in range(ranks):
            for micro in range(accumulate):
                part = data.collate(
                    [samples.sample(i) for i in range(8)[rank::ranks][micro::accumulate]],
                    tokenizer.pad_id,
                )
                train.NextTokenObjective(model)(part)[0].backward()
                total += (part["targets"] != IGNORE_INDEX).sum()
        for name, grad in want.items():
            got = dict(model.named_parameters())[name].grad / total
            assert (got - grad).norm() <= 1e-6 * grad.norm() + 1e-12, (accumulate, ranks, name)


@pytest.mark.parametrize(
    "stage, file",
    [
        ("vision", "captions.json"),
        ("text", "text.txt"),
        ("align", "captions.json"),
        ("instruct", "chats.json"),
    ],
)
def test_each_stage_changes_its_own_parts_and_no_other(stage, file, start, world, tmp_path):
    done = run(stage, start, world / file, tmp_path / "out", "--batch", 4, "--steps", 3)
    assert done.returncode == 0, done.stderr
    before, after = weights(start), weights(tmp_path / "out")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    if stage == "vision":  # of the language model the words' rows alone
        assert [
            n
            for n in before
            if n.startswith("language_model") and not torch.equal(before[n], after[n])
        ] == ["language_model.model.embed_tokens.weight"]
    assert (
        changed
        == {
            "vision": {"vision_tower", "multi_modal_projector", "language_model"},
            "text": {"language_model"},
            "align": {"multi_modal_projector"},
            "instruct": {"multi_modal_projector", "language_model"},
        }[stage]
    )


def test_two_processes_reach_the_losses_and_weights_of_one(start, world, tmp_path):
    for n in (1, 2):
        done = run(
            "instruct",
            start,
            world / "chats.json",
            tmp_path / str(n),
            "--batch",
            4,
            "--steps",
            4,
            "--lr",
            1e-3,
            processes=n,
        )
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-6)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)


def test_two_processes_see_the_whole_batch_in_the_vision_stage(start, world, tmp_path):
    """Contrast needs every picture of the global batch as a negative of every phrase, whichever process holds it; and of the dictionary each pair once."""
    (tmp_path / "dictionary.txt").write_text("red = 빨간색\nblue = 파란색\ncat = 고양이 = 猫\n")
    for n in (1, 2):
        done = run(
            "vision",
            start,
            world / "captions.json",
            tmp_path / str(n),
            "--batch",
            4,
            "--steps",
            3,
            "--dictionary",
            tmp_path / "dictionary.txt",
            processes=n,
        )
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_a_run_that_is_killed_goes_on_to_the_same_weights_bit_for_bit(start, world, tmp_path):
    args = ("instruct", start, world / "chats.json")
    more = ("--batch", 4, "--steps", 30, "--save-every", 5, "--muon-lr", 0.01, "--resume")
    assert run(*args, tmp_path / "whole", *more).returncode == 0
    process = subprocess.Popen(
        command(*args, tmp_path / "cut", *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not list((tmp_path / "cut").glob("checkpoints/step-*[0-9]")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = max((tmp_path / "cut" / "checkpoints").glob("step-*[0-9]"))
    torn, changed, half = (newest.parent / f"step-00000{name}" for name in (997, 998, "999.tmp"))
    for copy in (
        torn,
        changed,
        half,
    ):  # newer than the last good one: cut off, a byte changed, and not yet renamed
        shutil.copytree(newest, copy)
    shard = (torn / "__0_0.distcp").read_bytes()
    (torn / "__0_0.distcp").write_bytes(shard[:1000])
    (changed / "__0_0.distcp").write_bytes(shard[:5000] + bytes([shard[5000] ^ 1]) + shard[5001:])
    again = run(*args, tmp_path / "cut", *more)
    assert again.returncode == 0, again.stderr
    assert (
        "step-00000997: damaged, passed over" in again.stderr
        and "step-00000998: damaged, passed over" in again.stderr
    )
    assert not half.exists() and [row["step"] for row in rows(tmp_path / "cut")] == list(
        range(1, 31)
    ), "the log has every step once"
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[n], two[n]) for n in one)
    finished = run(*args, tmp_path / "cut", *more)
    assert finished.returncode == 0 and "finished before, nothing to do" in finished.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--batch", "5", "--micro-batch", "2"],
            "--batch 5 is not a multiple of 1 process(es) × --micro-batch 2",
        ),
        (["--pack", "100"], "--pack 100: must hold the longest sample (--max-length 2048)"),
        (["--data", "a.json:0.7", "b.json"], "--data: 1 of 2 files have a weight; all must"),
        (
            ["--pack", "2048", "--merge", "2"],
            "--pack 2048 puts samples end to end, --merge 2 records side by side",
        ),
        (["--shard"], "--shard wants torchrun"),
        (["--data", "nowhere.json"], "nowhere.json: no such file"),
        (["--model", "nowhere"], "nowhere: not a model folder: it has no"),
    ],
)
def test_a_users_mistake_gets_one_clear_line(start, world, tmp_path, args, message):
    done = subprocess.run(
        [*map(str, command("instruct", start, world / "chats.json", tmp_path / "out")), *args],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_checkpoint_of_other_settings_is_not_continued(start, world, tmp_path):
    args = (
        "align",
        start,
        world / "captions.json",
        tmp_path / "out",
        "--batch",
        4,
        "--save-every",
        2,
    )
    assert run(*args, "--steps", 4).returncode == 0
    (tmp_path / "out" / "config.json").unlink()
    done = run(*args, "--steps", 6, "--resume")
    assert done.returncode == 1 and "steps: 4 → 6" in done.stderr
    done = run(*args, "--steps", 4)
    assert (
        done.returncode == 1 and "there is a run already; --resume goes on with it" in done.stderr
    )
    shutil.copytree(start, tmp_path / "other")
    done = run(
        "align", tmp_path / "other", *args[2:], "--steps", 4, "--resume"
    )  # what didn't learn would come from another model
    assert done.returncode == 1 and f"model: {start} → {tmp_path / 'other'}" in done.stderr


def write_captions(world, folder, lost=3, empty=None):
    """The world's captions as folder/set.json, the picture of one of them gone, and what another says."""
    records = json.loads((world / "captions.json").read_text())
    for r in records:
        r["image"] = str(world / r["image"])
    records[lost]["image"] = "lost.png"
    if empty is not None:
        records[empty]["conversations"] = []
    (folder / "set.json").write_text(json.dumps(records))


def test_a_sample_left_out_is_counted_and_named(start, world, tmp_path):
    write_captions(world, tmp_path)
    done = run(
        "align",
        start,
        tmp_path / "set.json",
        tmp_path / "out",
        "--batch",
        4,
        "--steps",
        3,
        "--bad-samples",
        "skip",
    )
    assert done.returncode == 0, done.stderr
    assert (
        re.search(
            r"left out: .*set.json: record 3 \(id 'c3'\): .*lost.png: no such image", done.stderr
        )
        and "1 bad samples left out" in done.stderr
    )
    assert (
        run(
            "align", start, tmp_path / "set.json", tmp_path / "out2", "--batch", 4, "--steps", 3
        ).returncode
        == 1
    )


def test_frozen_rows_stay_to_the_bit_under_weight_decay_while_the_new_ones_learn(
    start, world, tmp_path
):
    n = 100
    done = run(
        "text",
        start,
        world / "text.txt",
        tmp_path / "out",
        "--batch",
        4,
        "--steps",
        4,
        "--lr",
        1e-2,
        "--weight-decay",
        0.5,
        "--freeze-rows",
        n,
    )
    assert done.returncode == 0, done.stderr
    before, after = weights(start), weights(tmp_path / "out")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert torch.equal(before[name][:n], after[name][:n])
        assert (before[name][n:] != after[name][n:]).any(dim=1).all(), (
            "the others feel decay, and learn"
        )


# ---------------------------------------------------------------------------------------------- in this process
@pytest.fixture
def inside(start, world, tmp_path, monkeypatch, capsys):
    """Runs `train.py STAGE …` here: (what it wrote to stderr, what it exited with)."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(stage, file, *more, out="out"):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "train.py",
                stage,
                "--model",
                str(start),
                "--data",
                str(world / file),
                "-o",
                str(tmp_path / out),
                "--precision",
                "fp32",
                "--batch",
                "4",
                *map(str, more),
            ],
        )
        code = 0
        try:
            train.main()
        except ValueError as error:
            code = str(error)
        for number, handler in handlers:
            signal.signal(number, handler)
        captured = capsys.readouterr()
        return captured.err + captured.out, code

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    inside, tmp_path, monkeypatch, number
):
    more = ("--steps", 6, "--lr", 1e-3, "--resume")
    assert inside("instruct", "chats.json", *more, out="whole")[1] == 0
    real, calls = train.backward, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(train, "backward", interrupted)
    text, code = inside("instruct", "chats.json", *more, "--keep", 1)
    assert (
        code == 0
        and "asked to stop; saved after step 3 of 6. The same command with --resume goes on from here"
        in text
    )
    assert not (tmp_path / "out" / "config.json").exists()
    assert inside("instruct", "chats.json", *more, "--save-every", 1, "--keep", 1)[1] == 0
    assert [f.name for f in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000005"], (
        "--keep 1"
    )
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_step_that_is_not_finite_is_left_out_and_many_of_them_end_the_run_with_their_samples(
    inside, tmp_path, monkeypatch
):
    real, calls = train.backward, []

    def spoilt(engine, params, *args):
        result = real(engine, params, *args)
        calls.append(1)
        if len(calls) == 2:
            params[0].grad[0] = float("nan")
        return result

    monkeypatch.setattr(train, "backward", spoilt)
    text, code = inside("instruct", "chats.json", "--steps", 4)
    assert (
        code == 0
        and "step 2: gradient not finite, the step is left out (1 in a row). Samples: " in text
        and text.count("chats.json: record") == 4
    )
    assert [row["skipped"] for row in rows(tmp_path / "out")] == [0, 1, 1, 1] and rows(
        tmp_path / "out"
    )[1]["loss"] is None
    assert all(w.isfinite().all() for w in weights(tmp_path / "out").values())
    text, code = inside(
        "instruct",
        "chats.json",
        "--steps",
        9,
        "--lr",
        1e30,
        "--warmup",
        0,
        "--max-skips",
        3,
        out="wild",
    )
    assert (
        "3 steps in a row without a finite loss and gradient" in code
        and "loss not finite" in text
        and len(rows(tmp_path / "wild")) < 9
    )


def test_a_full_disk_is_said_and_the_last_good_checkpoint_stands(inside, tmp_path):
    """A limit on the size of a file stands in for the disk: the write fails in the same place."""
    import resource

    more = ("--steps", 6, "--save-every", 2, "--lr", 1e-3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert inside("instruct", "chats.json", *more, out="whole")[1] == 0
    size = max(
        f.stat().st_size for f in (tmp_path / "whole" / "checkpoints" / "step-00000004").iterdir()
    )
    assert size > (tmp_path / "whole" / "model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, before[1]))
    try:
        text, code = inside("instruct", "chats.json", *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (
        code == 0
        and "step 2: the checkpoint could not be saved" in text
        and "GiB free" in text
        and "there is none yet" in text
        and not list((tmp_path / "out" / "checkpoints").iterdir())
    )
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[n], two[n]) for n in one), "the run goes on"


def test_lora_learns_additions_that_are_merged_and_saved_by_themselves(
    inside, start, tmp_path, config
):
    text, code = inside("instruct", "chats.json", "--steps", 3, "--lr", 1e-2, "--lora-rank", 2)
    assert code == 0
    C, I, K = (
        config.text.hidden_size,
        config.text.intermediate_size,
        config.text.num_key_value_heads * config.text.head_dim,
    )
    count = config.text.num_hidden_layers * 2 * (2 * 2 * C + 2 * (C + K) + 3 * (C + I)) + sum(
        p.numel() for p in XLlava(config).projector.parameters()
    )
    assert f"{count:,} parameters learn" in text
    before, after = weights(start), weights(tmp_path / "out")
    saved = torch.load(tmp_path / "out" / "adapters.pt", weights_only=True)
    names = {
        f"language_model.model.layers.{n}.{part}_proj.weight"
        for n in range(config.text.num_hidden_layers)
        for part in (
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "mlp.gate",
            "mlp.up",
            "mlp.down",
        )
    }
    assert {n for n in before if not torch.equal(before[n], after[n])} == names | {
        n for n in before if n.startswith("multi_modal_projector")
    }
    up, down = (
        saved["adapters"][f"decoder.layers.1.attn.q_proj.{part}"] for part in ("up", "down")
    )
    change = (
        after["language_model.model.layers.1.self_attn.q_proj.weight"]
        - before["language_model.model.layers.1.self_attn.q_proj.weight"]
    )
    assert (
        torch.allclose(change, 2 * up @ down, atol=1e-6)
        and torch.linalg.matrix_rank(change, atol=1e-5) <= 2
        and up.any()
    )


def test_packing_recomputing_and_micro_batches_change_no_loss(inside, tmp_path):
    ways = {
        "plain": (),
        "packed": ("--pack", 80, "--max-length", 80),
        "micro": ("--micro-batch", 1, "--recompute"),
    }
    for name, more in ways.items():
        assert inside("align", "captions.json", "--steps", 1, *more, out=name)[1] == 0
    first = {name: rows(tmp_path / name)[0] for name in ways}
    assert first["packed"]["fill"] == 1 >= first["plain"]["fill"]
    assert first["micro"]["loss"] == pytest.approx(first["plain"]["loss"], rel=1e-6)


def test_a_finished_run_is_not_begun_again_over_itself(inside, tmp_path):
    assert inside("align", "captions.json", "--steps", 1, "--save-every", 0)[1] == 0
    log = (tmp_path / "out" / "log.jsonl").read_text()
    code = inside("align", "captions.json", "--steps", 1, "--save-every", 0, "--lr", 1)[1]
    assert (
        "out: there is a run already" in code
        and (tmp_path / "out" / "log.jsonl").read_text() == log
    )


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(inside, tokenizer, tmp_path):
    from tokenizer import NORMAL, Piece, Tokenizer

    Tokenizer([*tokenizer.pieces, Piece("▁more", -1e3, NORMAL)], tokenizer.fields).save(
        tmp_path / "larger.model"
    )
    code = inside("text", "text.txt", "--steps", 1, "--tokenizer", tmp_path / "larger.model")[1]
    assert (
        f"larger.model: {tokenizer.vocab_size + 1:,} pieces" in code
        and f"the model has {tokenizer.vocab_size:,} rows" in code
    )


def test_a_machine_without_git_trains(inside, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert inside("align", "captions.json", "--steps", 1)[1] == 0
    assert json.loads((tmp_path / "out" / "runs.jsonl").read_text())["commit"] is None


def test_bad_samples_can_be_skipped_in_the_vision_stage(inside, world, tmp_path):
    write_captions(world, tmp_path, empty=5)
    assert "no conversations" in inside("vision", tmp_path / "set.json", "--steps", 3)[1]
    text, code = inside(
        "vision", tmp_path / "set.json", "--steps", 3, "--bad-samples", "skip", out="skip"
    )
    assert code == 0 and "lost.png: no such image" in text and "2 bad samples left out" in text


def test_a_plan_counts_what_the_run_would_hold(inside, config, tmp_path):
    text, code = inside("align", "captions.json", "--plan", 2, "--gpu", "H200")
    counts = [sum(p.numel() for p in part.parameters()) for part in XLlava(config).children()]
    assert (
        code == 0
        and f"{counts[1]:,} parameters learn, {counts[0] + counts[2]:,} are frozen; 12 samples"
        in text
    )
    assert (
        "3 steps an epoch" in text
        and "hours on 2 × H200 at an MFU of 40%" in text
        and not (tmp_path / "out").exists()
    )


def test_of_lora_only_what_is_added_costs_a_gradient_of_its_own(config):
    model = XLlava(config)
    train.choose_parts(model, train.RECIPES["instruct"], 2)
    last = f"{config.text.num_hidden_layers - 1}."
    # FLOPs a token for each weight of a matrix: 2 forward, 2 for what comes before it, 2 for itself. Of the last block, queries, keys and values alone see all tokens
    want = sum(
        p.numel() * (6 if name.endswith((".down", ".up")) else 4)
        for name, p in model.decoder.layers.named_parameters()
        if p.dim() == 2 and not (name.startswith(last) and ("o_proj" in name or "mlp" in name))
    )
    assert train.work(model)[0] == want


def test_a_plan_says_what_it_could_not_look_at(inside, world, tmp_path):
    write_captions(world, tmp_path)
    assert "lost.png: no such image" in inside("align", tmp_path / "set.json", "--plan", 2)[1]
    text, code = inside("align", tmp_path / "set.json", "--plan", 2, "--bad-samples", "skip")
    assert code == 0 and "of 12 looked at 1 can't be used" in text


def test_each_start_notes_its_command_and_versions(inside, tmp_path):
    assert inside("align", "captions.json", "--steps", 1)[1] == 0
    (row,) = map(json.loads, (tmp_path / "out" / "runs.jsonl").read_text().splitlines())
    assert (
        row["packages"]["torch"] == torch.__version__
        and "--steps 1" in row["command"]
        and row["settings"]["lr"] == 1e-3
    )
