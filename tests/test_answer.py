"""Answers that go on after a stop, and their tables: accuracy, chance, F1, chrF, POPE."""

import json
import shutil
from unittest import mock

import pytest
import torch
from evaluation_helpers import command, make_question, score_answers, write_random_model

import data
from evaluation import answer
from evaluation.__main__ import COMMANDS
from evaluation.answer import image_path, read_answers
from evaluation.metrics import chrf
from evaluation.questions import question_name, read_questions
from evaluation.scores import FAMILIES, accuracy_rows, metric_rows, most_frequent_answers
from evaluation.tables import accuracy_tables
from generate import answer_batch, load_for_inference


@pytest.fixture(scope="module")
def folder(config, tokenizer_file, tmp_path_factory):
    return write_random_model(config, tokenizer_file, tmp_path_factory.mktemp("model") / "m")


def run_answer(folder, data_file, out, *more):
    args = ["--model", folder, "--data", data_file, "-o", out, "--precision", "fp32"]
    return command("answer", *args, *more)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    with pytest.raises(SystemExit, match="0"):
        command(name, "--help")


# ------------------------------------------------------------------------------------ tables
def test_rows_count_each_question_under_its_language_kind_skill_and_all():
    questions = [
        make_question("red", id=0),
        make_question("blue", id=1),
        make_question("빨간색", "ko", id=2),
        make_question("two", skill="count", id=3),
        make_question("yes", kind="yes_no", skill="yes_no", id=4),
    ]
    scores = score_answers(questions, ["Red.", "green", "빨간색", "two", "no"])
    rows = accuracy_rows("full", questions, scores)
    cells = {(row["language"], row["kind"]): (row["n"], row["accuracy"]) for row in rows}
    assert cells["all", "all"] == (5, 3 / 5)
    assert cells["en", "all"] == (4, 1 / 2)
    assert cells["ko", "all"] == (1, 1)
    assert cells["all", "object"] == (4, 3 / 4)
    assert cells["all", "object.colour"] == (3, 2 / 3)
    assert cells["all", "yes_no"] == (1, 0)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    keys = ["model", "split", "language", "kind", "n", "accuracy", "low", "high"]
    assert list(rows[0]) == keys


def test_intervals_resample_images_with_all_their_questions():
    # Two of 20 images, but 10 of 28 questions, are answered wrongly.
    ids = [image for image in range(20) for _ in range(5 if image < 2 else 1)]
    questions = [make_question("a", id=i, image=f"{n}.png") for i, n in enumerate(ids)]
    scores = score_answers(questions, ["b" if image < 2 else "a" for image in ids])
    (by_image, *_) = accuracy_rows("full", questions, scores)
    for question in questions:
        question.image = None
    (by_question, *_) = accuracy_rows("full", questions, scores)
    assert by_image["accuracy"] == by_question["accuracy"] == 18 / 28
    assert by_image["high"] - by_image["low"] > 1.3 * (by_question["high"] - by_question["low"])


def test_chance_is_the_most_frequent_answer_to_a_skill_in_a_language():
    questions = [
        make_question("red", id=0),
        make_question("red", id=1),
        make_question("blue", id=2),
        make_question("빨간색", "ko", id=3),
        make_question(["two"] * 6 + ["2"] * 4, skill="count", id=4),
        make_question("blue", id=5, split="other"),
    ]
    chance = ["red", "red", "red", "빨간색", "two", "blue"]
    assert most_frequent_answers(questions) == chance


def test_a_caption_has_its_chrf_and_an_open_answer_its_f1():
    caption = make_question("abc", kind="caption", id=1, metric="caption")
    questions = [make_question("고양이가", "ko", id=0), caption]
    scores = score_answers(questions, ["고양이는", "ab"])
    rows = metric_rows("full", questions, scores, FAMILIES)
    rows = {(row["metric"], row["language"]): row for row in rows}
    assert rows["character F1", "ko"]["value"] == pytest.approx(3 / 4)
    assert rows["chrF", "en"]["value"] == pytest.approx(chrf("ab", "abc"))
    assert rows["character F1", "all"]["n"] == rows["chrF", "all"]["n"] == 1
    keys = ["metric", "model", "split", "language", "n", "value", "low", "high"]
    assert list(rows["chrF", "en"]) == keys


def test_printed_tables_are_aligned_and_skills_are_indented():
    questions = [make_question("red", id=0), make_question("two", skill="count", id=1)]
    rows = []
    for model in ("full", "blind", "chance"):
        rows += accuracy_rows(model, questions, score_answers(questions, ["red", "one"]))
    (table,) = accuracy_tables(rows)
    title, *lines = table.as_text().splitlines()
    assert title == "s" and [line.split()[:3] for line in lines] == [
        ["n", "full", "%"],
        ["en", "2", "50.0"],
        ["all", "2", "50.0"],
        ["object", "2", "50.0"],
        ["colour", "1", "100.0"],
        ["count", "1", "0.0"],
    ]
    assert lines[4].startswith("  colour") and len(set(map(len, lines))) == 1
    assert not {"<", ">", "&"} & set(table.as_text())


def test_popes_figures_are_the_hand_counted_ones():
    truths = ["yes"] * 4 + ["no"] * 6
    answers = ["Yes"] * 3 + ["No"] + ["Yes"] * 2 + ["No"] * 4  # 3 of 5 "yes" are right, of 4 true
    questions = [
        make_question(truth, id=i, image=f"{i}.png", metric="pope")
        for i, truth in enumerate(truths)
    ]
    rows = metric_rows("full", questions, score_answers(questions, answers), FAMILIES)
    values = {row["metric"]: row["value"] for row in rows if row["language"] == "all"}
    assert values == pytest.approx(
        {
            "POPE precision": 3 / 5,
            "POPE recall": 3 / 4,
            "POPE f1": 2 * 3 / (5 + 4),
            "POPE yes_ratio": 5 / 10,
        }
    )


# ------------------------------------------------------------------------------------ answers
def test_answers_are_those_of_one_question_at_a_time(folder, world, tmp_path, config, tokenizer):
    """Batches, shared images and rows that end early change nothing."""
    out = tmp_path / "eval.json"
    run_answer(folder, world / "chats.json", out, "--max-new-tokens", 5, "--batch-size", 9)
    results = json.loads(out.read_text(encoding="utf-8"))
    assert {row["model"] for row in results["rows"]} == {"full", "blind", "chance"}
    whole = [row for row in results["rows"] if row["language"] == row["kind"] == "all"]
    assert {row["n"] for row in whole} == {12 * 2 + 4}

    header, answered = read_answers(tmp_path / "eval.answers.jsonl")
    assert header["model"] == str(folder) and len(answered) == 28
    by_name = {question_name(question): question for question in answered}
    model, _ = load_for_inference(folder)
    images = data.ImageCache(config.vision.image_size, config.image_aspect_ratio)
    for question in read_questions([world / "chats.json"], tokenizer, config)[::2]:
        pixels = None
        if question.image_paths:
            pixels = torch.stack([images(path) for path in question.image_paths])
        got = by_name[question_name(question)]
        prompts = [question.prompt], [question.blind_prompt]
        full = answer_batch(model, tokenizer, prompts[0], pixels, max_new_tokens=5)
        blind = answer_batch(model, tokenizer, prompts[1], max_new_tokens=5)
        assert ([got.full], [got.blind], got.truth) == (full, blind, question.truth)


def test_blind_with_another_image_asks_the_same_about_the_image_half_a_split_away():
    questions = [make_question("a", id=i, image_paths=[name]) for i, name in enumerate("wxyzwx")]
    questions += [make_question("a", id=9), make_question("a", id=10, blind_prompt=[7])]
    for question in questions[:6]:
        question.prompt = [question.id]
    answer.swap_images(questions)
    swapped = ["".join(question.blind_paths) for question in questions]
    assert swapped == ["y", "z", "w", "x", "y", "z", "", ""]
    assert [question.blind_prompt for question in questions] == [*([i] for i in range(6)), [], [7]]
    with pytest.raises(ValueError, match="no other image"):
        answer.swap_images(questions[:1])


def test_the_blind_answers_are_those_about_the_other_image(
    folder, world, tmp_path, config, tokenizer
):
    out, data_file = tmp_path / "eval.json", world / "chats.json"
    run_answer(folder, data_file, out, "--max-new-tokens", 5, "--blind", "other-image")
    _, answered = read_answers(tmp_path / "eval.answers.jsonl")
    by_name = {question_name(question): question for question in answered}
    model, _ = load_for_inference(folder)
    images = data.ImageCache(config.vision.image_size, config.image_aspect_ratio)
    questions = read_questions([data_file], tokenizer, config)
    answer.swap_images(questions)
    for question in questions[::3]:
        pixels = None
        if question.image_paths:
            assert question.blind_paths != question.image_paths
            pixels = torch.stack([images(path) for path in question.blind_paths])
        (blind,) = answer_batch(model, tokenizer, [question.blind_prompt], pixels, max_new_tokens=5)
        assert by_name[question_name(question)].blind == blind


def test_a_second_run_answers_only_what_is_missing(folder, world, tmp_path):
    out, answers = tmp_path / "eval.json", tmp_path / "eval.answers.jsonl"
    run_answer(folder, world / "chats.json", out, "--max-new-tokens", 5, "--batch-size", 9)
    first = json.loads(out.read_text(encoding="utf-8"))
    lines = answers.read_text(encoding="utf-8").splitlines(keepends=True)

    # Stopped in the middle of the eleventh answer.
    answers.write_text("".join(lines[:11]) + lines[11][:20], encoding="utf-8")
    asked, answer_questions = [], answer.answer_questions

    def spy(model, tokenizer, questions, *rest):
        asked.extend(questions)
        answer_questions(model, tokenizer, questions, *rest)

    with mock.patch.object(answer, "answer_questions", spy):
        run_answer(folder, world / "chats.json", out, "--max-new-tokens", 5, "--batch-size", 5)
    assert len(asked) == 28 - 10 and json.loads(out.read_text(encoding="utf-8")) == first
    again = answers.read_text(encoding="utf-8").splitlines(keepends=True)
    assert sorted(again) == sorted(lines)

    # With another setting the old answers are not mixed in.
    more = ("--max-new-tokens", 1)
    with pytest.raises(ValueError, match=r"\(max_new_tokens: 5 → 1\)"):
        run_answer(folder, world / "chats.json", out, *more)
    run_answer(folder, world / "chats.json", out, *more, "--fresh")
    assert (tmp_path / "eval.answers.jsonl.old-1").exists()
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 29


def test_restored_answers_belong_to_their_own_questions(folder, world, tmp_path):
    """Of whatever order the answer file is."""
    out, answers = tmp_path / "eval.json", tmp_path / "eval.answers.jsonl"
    run_answer(folder, world / "chats.json", out, "--max-new-tokens", 5)
    header, *rows = answers.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(row) | {"full": f"answer {i}"} for i, row in enumerate(rows)]
    rows[3]["full"] = rows[3]["truth"]
    lines = [header, *map(json.dumps, rows[::-1])]
    answers.write_text("\n".join(lines) + "\n", encoding="utf-8")

    assert "28 of 28 questions were answered before" in run_answer(
        folder, world / "chats.json", out, "--max-new-tokens", 5
    )
    results = json.loads(out.read_text(encoding="utf-8"))
    right = {
        (row["language"], row["kind"]): row["accuracy"] * row["n"]
        for row in results["rows"]
        if row["model"] == "full"
    }
    for key, count in right.items():
        is_own = key[0] in (rows[3]["language"], "all") and key[1] in (rows[3]["kind"], "all")
        assert count == pytest.approx(int(is_own))


def test_a_file_that_is_no_answer_file_is_refused(tmp_path):
    path = tmp_path / "eval.answers.jsonl"
    for text in ("[1, 2\n", "", '{"model": "m"}\n{"split": "s"}\n'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="eval.answers.jsonl: not an answer file, or cut off"):
            read_answers(path)


def test_answers_to_a_file_that_has_changed_are_not_kept(folder, world, tmp_path):
    shutil.copytree(world, tmp_path / "data")
    file, out = tmp_path / "data" / "chats.json", tmp_path / "eval.json"
    run_answer(folder, file, out, "--max-new-tokens", 1)
    records = json.loads(file.read_text(encoding="utf-8"))
    records[0]["conversations"][1]["value"] = "something else"
    file.write_text(json.dumps(records), encoding="utf-8")
    run_answer(folder, file, out, "--max-new-tokens", 1, "--fresh")
    _, answered = read_answers(tmp_path / "eval.answers.jsonl")
    assert "something else" in {question.truth for question in answered}, (
        "compare, judge and report read the references from there"
    )


def test_the_image_of_an_answer_is_found_again(tmp_path):
    (tmp_path / "a.png").touch()
    header = {"data": [str(tmp_path / "s.json")], "images": None}
    assert image_path(header, make_question("x", image="a.png")) == tmp_path / "a.png"
    assert image_path(header, make_question("x", image=["a.png", "b.png"])) == tmp_path / "a.png"
    for image in (None, [], "b.png"):
        assert image_path(header, make_question("x", image=image)) is None
    assert image_path(header, make_question("x", image="a.png", split="other")) is None
    header = {"data": ["elsewhere/s.json"], "images": str(tmp_path)}
    assert image_path(header, make_question("x", image="a.png")) == tmp_path / "a.png"
