"""Seeing a run learn: validations and snapshots, which change nothing that trains."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from training_helpers import checkpoints, rows, run, same_weights

import train
from checkpoint import load_config, load_model, load_tokenizer, write_model
from generate import load_for_inference
from model import PRESETS, XLlava
from training import lora, validation


@pytest.fixture
def watched(world):
    """The flags that watch a run of 6 steps."""
    flags = ("--validate", world / "chats.json", "--validate-every", 4, "--validate-samples", 9)
    return (*flags, "--snapshots", 2, 5)


def validations(out):
    return [row for row in rows(out) if "validation" in row]


def test_watching_changes_no_weight_and_no_random_number(train_here, watched, tmp_path):
    more = ("--steps", 6, "--lr", 1e-2)
    assert train_here("instruct", "chats.json", *more, out="plain")[1] == 0
    state = torch.get_rng_state()
    text, code = train_here("instruct", "chats.json", *more, *watched)
    assert code == 0 and "step 4: validation: " in text
    assert torch.equal(torch.get_rng_state(), state), "both draw alike from the seed on"
    assert same_weights(tmp_path / "plain", tmp_path / "out")

    plain, out = rows(tmp_path / "plain"), rows(tmp_path / "out")
    assert [r["loss"] for r in plain] == [r["loss"] for r in out if "loss" in r]
    assert [r["step"] for r in validations(tmp_path / "out")] == [4, 6], "every 4, and the last"


def test_a_validation_counts_exact_answers_by_skill_with_the_image_and_blind(
    config, tokenizer, world, tmp_path, monkeypatch
):
    """The answers are given here: with the image always "red", without it always "blue"."""
    records = []
    for i, (colour, skill) in enumerate([("red", "colour"), ("RED.", "colour"), ("blue", "mood")]):
        chat = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": colour}]
        records.append({"image": str(world / f"{i}.png"), "skill": skill, "conversations": chat})
    (tmp_path / "set.json").write_text(json.dumps(records), encoding="utf-8")
    args = SimpleNamespace(
        validate=str(tmp_path / "set.json"),
        validate_samples=99,
        max_length=99,
        stage="align",
        images=None,
    )
    questions = validation.draw_questions(args, tokenizer, config)
    asked = []

    def answer_batch(model, tokenizer, prompts, pixels, max_new_tokens):
        asked.append((prompts, pixels))
        return ["blue" if pixels is None else "red"] * len(prompts)

    monkeypatch.setattr(validation, "answer_batch", answer_batch)
    got = validation.measure(XLlava(config), tokenizer, questions)
    assert got["n"] == {"all": 3, "colour": 2, "mood": 1} and list(got["n"])[0] == "all"
    assert got["full"] == {"all": 0.6667, "colour": 1, "mood": 0}
    assert got["blind"] == {"all": 0.3333, "colour": 0, "mood": 1}

    (full, pixels), (blind, none) = asked
    assert [prompt.count(tokenizer.image_id) for prompt in full] == [4, 4, 4] and len(pixels) == 3
    text_alone = [tokenizer.bos_id, *tokenizer.encode("USER: What? ASSISTANT:")]
    assert none is None and blind == [text_alone] * 3


def test_a_stopped_run_goes_on_with_each_validation_and_snapshot_once(
    train_here, watched, tmp_path
):
    more = ("instruct", "chats.json", "--steps", 6, "--lr", 1e-2, *watched)
    assert train_here(*more, out="whole")[1] == 0
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert train_here(*more, "--save-every", 4)[1] == 0
    first = out / "snapshots" / "2" / "model.safetensors"
    before = first.stat().st_mtime_ns

    # As if it had been killed at step 5: after that snapshot, before the end.
    (out / "config.json").unlink()
    time.sleep(0.01)
    assert train_here(*more, "--save-every", 4, "--resume")[1] == 0
    assert first.stat().st_mtime_ns == before, "what is done is not done again"
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3, 4, 5, 6]

    def without_time(folder):
        return [(row["step"], row["validation"]) for row in validations(folder)]

    assert without_time(out) == without_time(whole)
    for step in ("2", "5"):
        assert same_weights(out / "snapshots" / step, whole / "snapshots" / step)


def test_a_snapshot_is_the_model_of_its_step_and_generate_opens_it(train_here, tmp_path):
    more = ("instruct", "chats.json", "--warmup-ratio", 0, "--save-every", 0, "--lr", 1e-2)
    assert train_here(*more, "--steps", 2, "--snapshots", 1, 2)[1] == 0
    out = tmp_path / "out"
    assert same_weights(out / "snapshots" / "2", out), "that of the last step is the result"
    assert not same_weights(out / "snapshots" / "1", out)
    names = {path.name for path in out.iterdir() if path.is_file()} - {"log.jsonl", "runs.jsonl"}
    assert {path.name for path in (out / "snapshots" / "1").iterdir()} == names
    model, tokenizer = load_for_inference(out / "snapshots" / "1", "cpu")
    assert model.config == load_config(out) and not model.training
    assert tokenizer.vocab_size == load_tokenizer(out).vocab_size

    # One that was cut off is not taken for one.
    shutil.rmtree(out)
    (out / "snapshots" / "1").mkdir(parents=True)
    (out / "snapshots" / "1" / "model.safetensors").write_bytes(b"half")
    (out / "runs.jsonl").touch()
    assert "there is a run already" in train_here(*more, "--steps", 2, "--snapshots", 1)[1]
    assert train_here(*more, "--steps", 2, "--snapshots", 1, "--resume")[1] == 0
    assert [path.name for path in (out / "snapshots").iterdir()] == ["1"]
    assert load_for_inference(out / "snapshots" / "1", "cpu")[0].config == model.config


def test_a_full_disk_costs_the_snapshot_and_not_the_run(train_here, tmp_path, monkeypatch):
    def full_disk(config, tensors, tokenizer, folder):
        if folder.parent.name == "snapshots":
            raise OSError(28, "No space left on device")
        write_model(config, tensors, tokenizer, folder)

    monkeypatch.setattr(lora, "write_model", full_disk)
    text, code = train_here("align", "captions.json", "--steps", 3, "--snapshots", 2)
    assert code == 0 and "snapshots/2: the snapshot could not be saved" in text.replace("\\", "/")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_validation_that_fails_leaves_the_step_saved(train_here, watched, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise ValueError("CUDA out of memory")

    monkeypatch.setattr(validation, "measure", out_of_memory)
    more = ("--steps", 6, "--save-every", 4, *watched)
    assert "out of memory" in train_here("instruct", "chats.json", *more)[1]
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-00000004"]


def test_with_adapters_the_model_that_answers_is_the_one_that_is_saved(
    train_here, watched, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(validation, "measure", lambda model, *_: asked.append(model) or {"n": {}})
    monkeypatch.setattr(train.RunLog, "write_validation", lambda *_: None)
    more = ("--steps", 4, "--lr", 1e-1, "--lora-rank", 2, *watched[:-3])
    assert train_here("instruct", "chats.json", *more)[1] == 0
    saved, ids = load_model(tmp_path / "out").eval(), torch.arange(9)[None]
    with torch.no_grad():
        # Merged or not, in another order of additions: 1e-5 of numbers of about 1.
        assert torch.allclose(asked[-1](ids), saved(ids), atol=1e-4)
    assert any("down" in name for name in asked[-1].state_dict()), "adapters take no copy"


def test_keys_and_values_of_a_validation_have_a_limit():
    """Of Llama 2 7B a token has 2 × 32 layers × 4,096 numbers of 2 bytes: half a MiB. So a GiB
    holds three answers of 576 + 40 + 64 tokens."""
    shape = PRESETS["x-llava-7b"].text
    assert validation.num_at_once(shape, 576 + 40) == 2**30 // (680 * 2**19) == 3
    assert validation.num_at_once(PRESETS["tiny"].text, 100) == validation.BATCH_SIZE
    assert validation.num_at_once(shape, 4_000) == 1


@pytest.mark.parametrize("more", [(), ("--fsdp", "--lora-rank", 2)])
def test_two_processes_validate_as_one(more, start, world, watched, tmp_path):
    """Rank 0 answers while the other waits. With --fsdp the weights are gathered first."""
    common = ("--batch-size", 4, "--steps", 6, "--lr", 1e-2, "--seed", 1, *watched)
    trained = ("--lora-rank", 2) if more else ()
    for n, own in ((1, trained), (2, more)):
        args = (start, world / "chats.json", tmp_path / str(n), *common, *own)
        done = run("instruct", *args, processes=n)
        assert done.returncode == 0, done.stderr
    one, two = (validations(tmp_path / name) for name in "12")
    assert len(two) == 2 and [r["validation"] for r in one] == [r["validation"] for r in two]
    names = [{p.name for p in (tmp_path / n / "snapshots" / "5").iterdir()} for n in "12"]
    assert names[0] == names[1] and "config.json" in names[0]


@pytest.mark.parametrize(
    "stage, more, message",
    [
        ("align", ("--validate", "lost.json"), "record 0 (id None): "),
        ("align", ("--validate", "empty.json"), "empty.json: no questions to validate with"),
        ("vision", ("--validate", "lost.json"), "--validate: the vision stage has no decoder"),
        ("align", ("--snapshots", 2, 7), "--snapshots 7: the run has 3 steps"),
    ],
)
def test_what_can_not_be_watched_is_refused_before_the_first_step(
    train_here, tmp_path, monkeypatch, stage, more, message
):
    monkeypatch.chdir(tmp_path)
    chat = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]
    lost = [{"image": "lost.png", "conversations": chat}]
    (tmp_path / "lost.json").write_text(json.dumps(lost), encoding="utf-8")
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    monkeypatch.setattr(train, "train_loop", None)
    code = train_here(stage, "captions.json", "--steps", 3, *more)[1]
    assert message in str(code) and not list((tmp_path / "out").glob("*"))
