"""Scores: against hand-worked numbers and a simulation."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
from model import Model

ROOT = Path(__file__).parent.parent


def question(truth, language="en", kind="object", skill="colour", split="s"):
    return {"split": split, "language": language, "kind": kind, "skill": skill, "truth": truth}


def test_answers_that_differ_in_form_only_are_equal():
    assert evaluate.normalise(" At the  TOP. ") == evaluate.normalise("at the top")
    assert evaluate.normalise("\u1112\u1161\u11ab") == evaluate.normalise("한"), "decomposed and composed Hangul"
    assert evaluate.normalise("红色。") == "红色" and evaluate.normalise("a cat") != evaluate.normalise("cat")


def test_wilsons_interval_is_the_published_one():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611; 1 of 29 gives 0.0061 to 0.1718.
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert evaluate.wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_holds_the_truth_95_times_in_a_hundred():
    rng, hits = random.Random(0), 0
    for _ in range(2000):
        low, high = evaluate.wilson(sum(rng.random() < 0.9 for _ in range(200)), 200)
        hits += low <= 0.9 <= high
    assert 0.93 <= hits / 2000 <= 0.97


def test_rows_count_each_question_under_its_language_kind_skill_and_all():
    questions = [question("red"), question("blue"), question("빨간색", "ko"), question("two", skill="count"), question("yes", kind="yes_no", skill="yes_no")]
    rows = evaluate.score("full", questions, ["Red.", "green", "빨간색", "two", "no"])
    cell = {(r["language"], r["kind"]): (r["n"], r["accuracy"]) for r in rows}
    assert cell["all", "all"] == (5, 3 / 5) and cell["en", "all"] == (4, 1 / 2) and cell["ko", "all"] == (1, 1)
    assert cell["all", "object"] == (4, 3 / 4) and cell["all", "object.colour"] == (3, 2 / 3) and cell["all", "yes_no"] == (1, 0)
    assert all(r["low"] <= r["accuracy"] <= r["high"] for r in rows)


def test_chance_is_the_most_frequent_answer_to_a_skill_in_a_language():
    questions = [question("red"), question("red"), question("blue"), question("빨간색", "ko")]
    rows = evaluate.score("chance", questions, evaluate.chance(questions))
    cell = {(r["language"], r["kind"]): r["accuracy"] for r in rows}
    assert cell["en", "all"] == pytest.approx(2 / 3) and cell["ko", "all"] == 1


def test_later_turns_are_asked_after_the_true_answers_and_the_blind_model_sees_no_picture(tokenizer_file, config, world, tmp_path):
    torch.manual_seed(0)
    checkpoint.save_model(Model(config).init_weights(), tokenizer_file, tmp_path / "m")
    out = tmp_path / "eval.json"
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--model", tmp_path / "m", "--data", world / "chats.json", "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {r["model"] for r in rows} == {"full", "blind", "chance"} and {r["split"] for r in rows} == {"chats"}
    assert {r["n"] for r in rows if r["language"] == r["kind"] == "all"} == {12 * 2 + 4}
    answers = [json.loads(line) for line in (tmp_path / "eval.answers.jsonl").read_text().splitlines()]
    assert len(answers) == 28 and all({"truth", "full", "blind", "question"} <= a.keys() for a in answers)
    by_question = {}
    for a in answers:
        if a["image"]:
            by_question.setdefault((a["turn"], a["question"], a["truth"]), set()).add(a["blind"])
    assert all(len(blind) == 1 for blind in by_question.values()), "without the picture, the same words get the same answer"
