"""Evaluation end to end: files as other people write them, answers that go on after a stop, likelihoods against a plain loop, hand-worked ranks and comparisons."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import checkpoint
import data
import evaluation.answer as evaluate
import evaluation.metrics as metrics
import evaluation.report as report
from model import XLlava

DATA = Path(os.environ.get("XLLAVA_DATA", "/nowhere"))


def question(truth, language="en", kind="object", skill="colour", split="s", id=0, image=None):
    return {
        "split": split,
        "id": id,
        "image": image,
        "turn": 0,
        "language": language,
        "kind": kind,
        "skill": skill,
        "metric": "exact",
        "truth": truth,
        "question": "?",
    }


@pytest.fixture(scope="module")
def folder(config, tokenizer_file, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "m"
    checkpoint.save_model(XLlava(config).init_weights(), tokenizer_file, folder)
    return folder


def command(*args, module=evaluate):
    """The command line in this process: what it printed."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", ["x.py", *map(str, args)]), contextlib.redirect_stdout(out):
        module.main()
    return out.getvalue()


# ---------------------------------------------------------------------------------------------- rows
def test_rows_count_each_question_under_its_language_kind_skill_and_all():
    questions = [
        question("red", id=0),
        question("blue", id=1),
        question("빨간색", "ko", id=2),
        question("two", skill="count", id=3),
        question("yes", kind="yes_no", skill="yes_no", id=4),
    ]
    rows = evaluate.score("full", questions, ["Red.", "green", "빨간색", "two", "no"])
    cell = {(r["language"], r["kind"]): (r["n"], r["accuracy"]) for r in rows}
    assert (
        cell["all", "all"] == (5, 3 / 5)
        and cell["en", "all"] == (4, 1 / 2)
        and cell["ko", "all"] == (1, 1)
    )
    assert (
        cell["all", "object"] == (4, 3 / 4)
        and cell["all", "object.colour"] == (3, 2 / 3)
        and cell["all", "yes_no"] == (1, 0)
    )
    assert all(r["low"] <= r["accuracy"] <= r["high"] for r in rows)
    assert {"model", "split", "language", "kind", "n", "accuracy", "low", "high"} == rows[0].keys()


def test_chance_is_the_most_frequent_answer_to_a_skill_in_a_language():
    questions = [
        question("red", id=0),
        question("red", id=1),
        question("blue", id=2),
        question("빨간색", "ko", id=3),
        question(["two"] * 6 + ["2"] * 4, skill="count", id=4),
    ]
    assert evaluate.chance(questions) == ["red", "red", "red", "빨간색", "two"]


def test_a_caption_has_its_chrf_and_an_open_answer_its_f1():
    questions = [
        question("고양이가", "ko", id=0),
        question("abc", kind="caption", id=1) | {"metric": "caption"},
    ]
    rows = {
        (r["metric"], r["language"]): r
        for r in evaluate.further_scores("full", questions, ["고양이는", "ab"])
    }
    assert rows["character F1", "ko"]["value"] == pytest.approx(3 / 4) and rows["chrF", "en"][
        "value"
    ] == pytest.approx(metrics.chrf("ab", "abc"))
    assert rows["character F1", "all"]["n"] == rows["chrF", "all"]["n"] == 1


# ---------------------------------------------------------------------------------------------- files
def test_pope_gqa_and_vqa_files_are_read_as_they_are(tmp_path):
    (tmp_path / "pope.json").write_text(
        '{"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "no"}\n{"question_id": 2, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}\n'
    )
    (tmp_path / "questions_ko.json").write_text(
        json.dumps(
            {
                "07": {
                    "question": "무슨 색입니까?",
                    "imageId": "n1",
                    "answer": "red",
                    "types": {"structural": "query"},
                }
            }
        )
    )
    (tmp_path / "vqa.json").write_text(
        json.dumps(
            {
                "data_subtype": "val2014",
                "questions": [{"question_id": 5, "image_id": 42, "question": "What is it?"}],
            }
        )
    )
    (tmp_path / "ten.json").write_text(
        json.dumps(
            {
                "annotations": [
                    {"question_id": 5, "answer_type": "other", "answers": [{"answer": "cat"}] * 10}
                ]
            }
        )
    )
    pope = evaluate.read_file(tmp_path / "pope.json")
    assert [(q["truth"], q["metric"], q["language"], q["pictures"]) for q in pope] == [
        ("no", "pope", "en", [str(tmp_path / "a.jpg")]),
        ("yes", "pope", "en", [str(tmp_path / "a.jpg")]),
    ]
    (gqa,) = evaluate.read_file(tmp_path / "questions_ko.json", images="pics")
    assert (gqa["id"], gqa["language"], gqa["image"], gqa["kind"], gqa["pictures"]) == (
        "07",
        "ko",
        "n1.jpg",
        "query",
        ["pics/n1.jpg"],
    )
    (vqa,) = evaluate.read_file(tmp_path / "vqa.json", annotations=tmp_path / "ten.json")
    assert (
        vqa["image"] == "COCO_val2014_000000000042.jpg"
        and vqa["truth"] == ["cat"] * 10
        and evaluate.worth(vqa, "cat") == {"accuracy": 1}
    )
    with pytest.raises(ValueError, match="want --annotations"):
        evaluate.read_file(tmp_path / "vqa.json")
    for file, text, complaint in (
        (
            "pope.json",
            '{"question_id": 1, "image": "a.jpg", "text": "고양이가 있나요?", "label": "아니요"}',
            "record 0: the label is '아니요', must be yes or no",
        ),
        (
            "pope.json",
            '{"image": "a.jpg", "text": "Is there a cat?", "label": "no"}',
            "a question has no 'question_id'",
        ),
        ("ten.json", '{"questions": []}', "ten.json: no annotations in it"),
        ("ten.json", '{"annot', "ten.json: not JSON: "),
    ):
        (tmp_path / file).write_text(text)
        with pytest.raises(ValueError, match=complaint):
            evaluate.read_file(
                tmp_path / ("vqa.json" if file == "ten.json" else file),
                annotations=tmp_path / "ten.json",
            )
    (tmp_path / "ten.json").write_text('{"annotations": []}')
    with pytest.raises(ValueError, match="no annotation for 1 questions"):
        evaluate.read_file(tmp_path / "vqa.json", annotations=tmp_path / "ten.json")


@pytest.mark.skipif(
    not (DATA / "eval/xgqa").is_dir(), reason="set XLLAVA_DATA to a folder with eval/xgqa"
)
def test_the_real_xgqa_questions_are_read_in_three_languages():
    found = {
        l: evaluate.read_file(DATA / f"eval/xgqa/{l}/train_10.json") for l in ("en", "ko", "zh")
    }
    assert {l: {q["language"] for q in qs} for l, qs in found.items()} == {l: {l} for l in found}
    assert {len(qs) for qs in found.values()} == {317} and len(
        {q["image"] for q in found["ko"]}
    ) == 10
    assert [q["truth"] for q in found["ko"]] == [q["truth"] for q in found["en"]], (
        "the answers of xGQA are English in every language"
    )
    first = found["ko"][0]
    assert (
        first["question"] == "차들이 어떻게 보입니까, 빽빽하거나 드뭅니까?"
        and first["truth"] == "dense"
        and evaluate.worth(first, "Dense.")["accuracy"] == 1
    )


def test_a_missing_picture_and_a_broken_record_are_named(
    folder, world, tmp_path, tokenizer, config
):
    record = {
        "id": "x",
        "image": "gone.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "cat"},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match="question 'x', turn 0: .*gone.png: no such image"):
        evaluate.read_questions([tmp_path / "a.json"], tokenizer, config)
    (tmp_path / "a.json").write_text(json.dumps([record | {"image": ["a.png", "b.png"]}]))
    with pytest.raises(
        ValueError, match=r"record 0 \(id 'x'\): 1 <image> marker\(s\) for 2 picture"
    ):
        evaluate.read_questions([tmp_path / "a.json"], tokenizer, config)
    for name in ("one", "other"):  # which answer would be whose?
        (tmp_path / name).mkdir()
        shutil.copy(world / "0.png", tmp_path / name / "a.png")
        (tmp_path / name / "s.json").write_text(json.dumps([record | {"image": "a.png"}]))
    with pytest.raises(
        ValueError, match="s: question 'x', turn 0: another question has the same name"
    ):
        evaluate.read_questions(
            [tmp_path / "one/s.json", tmp_path / "other/s.json"], tokenizer, config
        )
    assert len(evaluate.read_questions([tmp_path / "one/s.json"] * 2, tokenizer, config)) == 2


# ---------------------------------------------------------------------------------------------- answers
def test_answers_are_those_of_one_question_at_a_time_and_a_second_run_goes_on(
    folder, world, tmp_path, config, tokenizer
):
    out = tmp_path / "eval.json"
    command(
        "--model",
        folder,
        "--data",
        world / "chats.json",
        "-o",
        out,
        "--precision",
        "fp32",
        "--max-new-tokens",
        "5",
        "--batch-size",
        "9",
    )
    first = json.loads(out.read_text())
    assert {r["model"] for r in first["rows"]} == {"full", "blind", "chance"} and {
        r["n"] for r in first["rows"] if r["language"] == r["kind"] == "all"
    } == {12 * 2 + 4}
    header, rows = evaluate.read_answers(tmp_path / "eval.answers.jsonl")
    assert (
        len(rows) == 28
        and header["model"] == str(folder)
        and all({"truth", "full", "blind", "question"} <= row.keys() for row in rows)
    )
    # each answer again, alone: the definition of batches, shared pictures and dropped rows
    from generate import answer_batch, load

    model, _ = load(folder)
    named = {evaluate.name_of(row): row for row in rows}
    pictures = data.ImageCache(world, config.vision.image_size, config.image_aspect_ratio)
    for q in evaluate.read_questions([world / "chats.json"], tokenizer, config)[::2]:
        pixels = (
            torch.stack([pictures(Path(p).name) for p in q["pictures"]]) if q["pictures"] else None
        )
        row = named[evaluate.name_of(q)]
        assert [row["full"]] == answer_batch(
            model, tokenizer, [q["prompt"]], pixels, max_new_tokens=5
        )
        assert [row["blind"]] == answer_batch(model, tokenizer, [q["blind"]], max_new_tokens=5)
    # stopped in the middle of a line: what was answered isn't asked again
    lines = (tmp_path / "eval.answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "eval.answers.jsonl").write_text("".join(lines[:11]) + lines[11][:20])
    asked = []
    real = evaluate.answer_all
    with mock.patch.object(
        evaluate,
        "answer_all",
        lambda model, tokenizer, questions, *rest: (
            asked.extend(questions) or real(model, tokenizer, questions, *rest)
        ),
    ):
        command(
            "--model",
            folder,
            "--data",
            world / "chats.json",
            "-o",
            out,
            "--precision",
            "fp32",
            "--max-new-tokens",
            "5",
            "--batch-size",
            "5",
        )
    assert len(asked) == 28 - 10 and json.loads(out.read_text()) == first
    assert sorted((tmp_path / "eval.answers.jsonl").read_text().splitlines()) == sorted(
        "".join(lines).splitlines()
    )
    # another setting: the old answers are moved aside, not mixed in
    command(
        "--model",
        folder,
        "--data",
        world / "chats.json",
        "-o",
        out,
        "--precision",
        "fp32",
        "--max-new-tokens",
        "1",
    )
    assert (tmp_path / "eval.answers.old.jsonl").exists() and len(
        (tmp_path / "eval.answers.jsonl").read_text().splitlines()
    ) == 29
    (tmp_path / "eval.answers.jsonl").write_text("[1, 2\n")
    with pytest.raises(
        ValueError, match="eval.answers.jsonl: not an answer file of evaluate.py, or cut off"
    ):
        evaluate.read_answers(tmp_path / "eval.answers.jsonl")


def test_answers_to_a_file_that_has_changed_are_not_kept(folder, world, tmp_path):
    shutil.copytree(world, tmp_path / "data")
    file, out = tmp_path / "data" / "chats.json", tmp_path / "eval.json"
    command("--model", folder, "--data", file, "-o", out, "--max-new-tokens", "1")
    records = json.loads(file.read_text())
    records[0]["conversations"][1]["value"] = "something else"
    file.write_text(json.dumps(records))
    command("--model", folder, "--data", file, "-o", out, "--max-new-tokens", "1")
    assert "something else" in {
        row["truth"] for row in evaluate.read_answers(tmp_path / "eval.answers.jsonl")[1]
    }, "what compare, judge.py and the page read"


# ---------------------------------------------------------------------------------------------- likelihood and retrieval
def test_likelihoods_are_those_of_a_plain_loop(folder, world, config, tokenizer):
    from generate import load_for_inference as load

    model, _ = load(folder)
    items = []
    for q in evaluate.read_questions([world / "chats.json"], tokenizer, config)[:8]:
        items += [
            (q["prompt"], q["pictures"], tokenizer.encode(q["truth"]) + [tokenizer.eos_id]),
            (q["blind"], [], tokenizer.encode("blue")),
        ]
    got = evaluate.log_likelihoods(model, items, evaluate.Batcher(model, "fp32", 5, 100))
    pictures = data.ImageCache(world, config.vision.image_size, config.image_aspect_ratio)
    for (prompt, paths, answer), value in zip(items, got):
        pixels = torch.stack([pictures(Path(p).name) for p in paths]) if paths else None
        want, ids = 0.0, list(prompt)
        for token in answer:
            with torch.no_grad():
                want += (
                    model.logits(model(torch.tensor([ids]), pixels))[0, -1]
                    .log_softmax(-1)[token]
                    .item()
                )
            ids.append(token)
        assert value == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_perplexity_and_bits_per_byte_of_known_likelihoods():
    questions = [question("가", "ko", id=0), question("나다", "ko", id=1)]  # 3 and 6 bytes
    rows = {
        (r["metric"], r["model"]): r
        for r in evaluate.likelihood_rows(questions, {"full": [-2.0, -4.0]}, [1, 3], 16)
        if r["language"] == "ko"
    }
    assert rows["perplexity", "full"]["value"] == pytest.approx(math.exp(6 / 4)) and rows[
        "bits per byte", "full"
    ]["value"] == pytest.approx(6 / math.log(2) / 9)
    assert rows["perplexity", "chance"]["value"] == pytest.approx(16) and rows[
        "bits per byte", "chance"
    ]["value"] == pytest.approx(4 * 4 / 9), "4 bits a token"


def test_the_likelihood_command_covers_questions_and_plain_text(folder, world, tmp_path):
    (tmp_path / "ko.txt").write_text("고양이는 빨간색\n파란 개는\n", encoding="utf-8")
    command(
        "likelihood",
        "--model",
        folder,
        "--data",
        world / "chats.json",
        "--text",
        tmp_path / "ko.txt",
        "-o",
        tmp_path / "l.json",
    )
    rows = json.loads((tmp_path / "l.json").read_text())["likelihood"]
    assert {(r["split"], r["model"]) for r in rows} == {
        ("chats", m) for m in ("full", "blind", "chance")
    } | {("ko", "full"), ("ko", "chance")}
    assert all(r["value"] > 0 for r in rows) and {
        r["language"] for r in rows if r["split"] == "ko"
    } == {"ko"}


def test_ranks_share_ties_evenly():
    assert evaluate.rank_scores(np.array([3.0, 2, 1]), 0) == {"R@1": 1, "R@5": 1, "MRR": 1}
    assert evaluate.rank_scores(np.array([3.0, 2, 1]), 2) == {
        "R@1": 0,
        "R@5": 1,
        "MRR": pytest.approx(1 / 3),
    }
    even = evaluate.rank_scores(np.zeros(20), 7)
    assert even == {
        "R@1": pytest.approx(1 / 20),
        "R@5": pytest.approx(5 / 20),
        "MRR": pytest.approx(sum(1 / r for r in range(1, 21)) / 20),
    }


def test_captions_find_pictures_and_each_other_and_a_caption_likely_of_everything_misleads_raw_likelihood_only():
    K = 6
    sharp = np.full((K, K), -9.0)
    np.fill_diagonal(sharp, -3.0)
    prior = np.array(
        [0.0] * 5 + [-20.0]
    )  # the last caption is unlikely of anything, its own picture included
    found = evaluate.retrieve(
        {"en": sharp + prior, "ko": sharp}, {"en": prior, "ko": np.zeros(K)}, ["en", "ko"]
    )
    mean = lambda *key: np.mean([s["R@1"] for s in found[key]])
    assert (
        mean("picture → en", "full")
        == mean("en → picture", "full")
        == mean("en → ko", "full")
        == mean("ko → en", "full")
        == 1
    )
    assert mean("picture → en, raw", "full") == 5 / 6
    assert (
        mean("picture → en", "blind")
        == mean("picture → en", "chance")
        == pytest.approx(1 / K)
        == mean("en → ko", "blind")
    )
    shuffled = sharp[:, [1, 2, 3, 4, 5, 0]]  # Korean captions that belong to other pictures
    assert (
        np.mean(
            [
                s["R@1"]
                for s in evaluate.retrieve(
                    {"en": sharp, "ko": shuffled},
                    {"en": np.zeros(K), "ko": np.zeros(K)},
                    ["en", "ko"],
                )["en → ko", "full"]
            ]
        )
        == 0
    )


def test_the_retrieve_command_takes_pictures_with_a_caption_of_their_own(folder, world, tmp_path):
    said = command(
        "retrieve",
        "--model",
        folder,
        "--data",
        world / "captions.json",
        "--pool",
        "4",
        "-o",
        tmp_path / "r.json",
    )
    rows = {
        (r["direction"], r["model"]): r
        for r in json.loads((tmp_path / "r.json").read_text())["retrieval"]
    }
    assert (
        "12 queries in 3 pools of 4" in said
        and rows["picture → ?", "full"]["n"] == 12
        and rows["? → picture", "chance"]["R@1"][0] == 0.25
    )
    with pytest.raises(ValueError, match="a pool takes 20"):
        command("retrieve", "--model", folder, "--data", world / "captions.json")


# ---------------------------------------------------------------------------------------------- comparing
def answered(path, right, n=120):
    """An answer file in which the first `right` of 60 pictures' two questions are answered rightly, spread over them."""
    rows = [{"model": "m"}] + [
        question("a", id=i, image=f"{i // 2}.png")
        | {"full": "a" if i * 7 % n < right else "b", "blind": "b"}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_against_itself_is_no_difference_and_a_worse_one_is_worse(tmp_path):
    a, b, out = (
        answered(tmp_path / "a.answers.jsonl", 90),
        answered(tmp_path / "b.answers.jsonl", 50),
        tmp_path / "c.json",
    )
    said = command("compare", f"full={a}", f"same={a}", f"worse={b}", "-o", out)
    found = json.loads(out.read_text())
    assert len(found["pairs"]) == 2, (
        "of a file in one language, all languages together would be the same comparisons again, and be corrected for"
    )
    row = {r["model"]: r for r in found["pairs"]}
    assert (row["same"]["difference"], row["same"]["p_holm"], row["same"]["effect"]) == (0, 1, 0)
    assert (
        row["worse"]["difference"] == pytest.approx(-40 / 120)
        and row["worse"]["high"] < 0
        and row["worse"]["p_holm"] < 0.01
        and row["worse"]["n"] == 120
        and row["worse"]["pictures"] == 60
    )
    assert (
        "No difference at all, each question is worth the same to both: same: s en." in said
        and "worse: s en -33.3 (" in said
        and "one seed says nothing of what another would give" in said
    )
    said = command("compare", f"full={a}", f"worse={b}", "--languages", "en", "-o", out)
    assert {r["n"] for r in json.loads(out.read_text())["pairs"]} == {120}
    assert {r["model"] for r in found["models"]} == {
        "full",
        "full, blind",
        "same",
        "same, blind",
        "worse",
        "worse, blind",
        "chance",
    }


def test_a_difference_that_chance_explains_is_not_claimed(tmp_path):
    said = command(
        "compare",
        f"full={answered(tmp_path / 'a.answers.jsonl', 90)}",
        f"other={answered(tmp_path / 'b.answers.jsonl', 88)}",
    )
    assert (
        re.search(r"Not shown, and not ruled out up to \d+\.\d points: other: s en -1\.7 \(", said)
        and "differ;" not in said
    )


def test_seeds_decide_about_recipes(tmp_path):
    files = {
        right: answered(tmp_path / f"{right}.answers.jsonl", right)
        for right in (40, 60, 80, 84, 86, 88, 90)
    }
    group = lambda name, *rights: f"{name}=" + ",".join(str(files[r]) for r in rights)
    said = command(
        "compare", group("wide", 90, 40, 86), group("also", 80, 60, 40), "-o", tmp_path / "c.json"
    )
    assert "seeds differ too much" in said
    said = command(
        "compare", group("high", 86, 88, 90), group("low", 40, 40, 60), "-o", tmp_path / "c.json"
    )
    assert "the recipe makes the difference" in said
    (row,) = json.loads((tmp_path / "c.json").read_text())["pairs"]
    # Welch by hand: means 46.67/120 and 88/120, variances 133.33/120² and 4/120², 3 each: s.e. √(137.33/3)/120, 2.12 degrees of freedom
    assert row["difference"] == pytest.approx(-41.333 / 120, abs=1e-4)
    half, df = (
        math.sqrt(137.333 / 3) / 120,
        (137.333 / 3) ** 2 / ((133.333 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2),
    )
    assert (row["seeds_high"] - row["seeds_low"]) / 2 == pytest.approx(
        half * metrics.t_quantile(df), rel=1e-3
    )


def test_runs_on_other_questions_are_not_compared(tmp_path):
    a, b = (
        answered(tmp_path / "a.answers.jsonl", 5),
        answered(tmp_path / "b.answers.jsonl", 5, n=100),
    )
    with pytest.raises(ValueError, match="not the questions of"):
        command("compare", f"x={a}", f"y={b}")
    with pytest.raises(ValueError, match="a.answers.jsonl: no questions in ko"):
        command("compare", f"x={a}", f"y={a}", "--languages", "ko")
    with pytest.raises(ValueError, match="no such file; evaluate.py -o writes it"):
        command("compare", f"x={a}", "y=gone.json")


def test_make_ablation_is_the_demo_with_one_thing_changed(tmp_path):
    """What `make -n` says it would do: every variant the demo's own commands on the same pictures, but for what its name says."""
    shutil.copy(Path(evaluate.__file__).parent / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    made = subprocess.run(
        ["make", "-n", "ablation", "SEEDS=3 4"],
        cwd=tmp_path,
        env=outside,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert not re.search("^rm ", made.stdout, re.MULTILINE), (
        "make takes no file for one that may go when all is done"
    )
    lines = re.findall(r"start=\$\(.*?\); \.venv/bin/python (.*?) && ", made.stdout)
    of = lambda variant, step: next(
        line for line in lines if line.startswith(step) and f"out/ablation/{variant}.4/" in line
    ).replace(f"{variant}.4", "RUN")
    stages = ("train.py vision", "train.py align", "train.py instruct", "evaluate.py")
    dictionary = " --dictionary out/ablation/data/text/dictionary.txt"
    assert dictionary in of("full", "train.py vision")
    for variant, without in (("no-V", ""), ("no-P", dictionary), ("no-V-P", dictionary)):
        assert [of(variant, stage) for stage in stages] == [
            of("full", stage).replace(without, "") for stage in stages
        ]
    assert (
        of("no-V", "tokenizer.py merge")
        == of("no-V-P", "tokenizer.py merge")
        == "tokenizer.py merge out/ablation/RUN/en.model -o out/ablation/RUN/tokenizer.model"
    )
    assert of("no-P", "tokenizer.py merge") == of("full", "tokenizer.py merge") and of(
        "no-V", "train.py text"
    ) == of("full", "train.py text")
    assert "--data out/ablation/data/text/en.txt --lr" in of("no-P", "train.py text") and of(
        "no-P", "train.py text"
    ) == of("no-V-P", "train.py text")
    assert of("low-ko", "train.py text").replace("data.low-ko", "data") == of(
        "full", "train.py text"
    ) and "zh" not in of("en-ko", "train.py text") + of("en-ko", "tokenizer.py merge")
    worlds = re.findall(
        r"make -j1 \S+ DATA=(\S+) OUT=out/ablation SEED=(\d+) ?(SHARE=\S+)?.*\n", made.stdout
    )
    assert worlds == [
        ("out/ablation/data.en-ko", "0", "SHARE=zh=0"),
        ("out/ablation/data.en-zh", "0", "SHARE=ko=0"),
        ("out/ablation/data.low-ko", "0", "SHARE=ko=0.1"),
        ("out/ablation/data", "0", ""),
    ]
    assert (
        "compare full=out/ablation/full.3/eval.json,out/ablation/full.4/eval.json en-ko=out/ablation/en-ko.3/eval.json,out/ablation/en-ko.4/eval.json --languages en ko"
        in made.stdout
    )


# ---------------------------------------------------------------------------------------------- the page
def test_the_page_shows_curves_tables_pictures_attention_and_commands(folder, world, tmp_path):
    run = tmp_path / "run"
    (run / "instruct").mkdir(parents=True)
    log = [
        {"step": s, "loss": None if s == 9 else 5 / s, "seconds": 0.1} for s in range(1, 30)
    ]  # one step was left out
    (run / "instruct" / "log.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in log) + '{"step": 3'
    )
    (run / "commands.txt").write_text("python train.py instruct <x>\n")
    command(
        "--model",
        folder,
        "--data",
        world / "chats.json",
        "-o",
        run / "eval.json",
        "--max-new-tokens",
        "4",
    )
    lines = (run / "eval.answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[1]["full"], rows[1]["question"] = rows[1]["truth"], "<script>alert(1)</script>"
    (run / "eval.answers.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    command(run, "--each", "2", "--attention", "1", module=report)
    page = (run / "report.html").read_text()
    assert (
        page.count("<polyline") == 2
        and "29 steps" in page
        and "python train.py instruct &lt;x&gt;" in page
    )
    assert "data:image/jpeg;base64," in page and "Where it looks" in page and "chance" in page
    assert (
        "<script" not in page
        and "http://" not in page
        and "https://" not in page
        and 'src="/' not in page
    ), "offline, and what a model says is text"
    (run / "commands.txt").unlink()
    (run / "instruct" / "runs.jsonl").write_text(
        json.dumps({"command": "train.py instruct --seed 7"}) + "\n"
    )
    command(run, "--each", "1", "--attention", "0", module=report)
    assert "python train.py instruct --seed 7" in (run / "report.html").read_text()
    with pytest.raises(ValueError, match="is this a run's folder"):
        command(tmp_path, module=report)
    command(
        "compare", f"a={run / 'eval.json'}", f"<b>={run / 'eval.json'}", "-o", tmp_path / "c.json"
    )
    command(tmp_path, module=report)
    assert (
        "Compared: c" in (tmp_path / "report.html").read_text()
        and "&lt;b&gt;" in (tmp_path / "report.html").read_text()
    ), "a folder of comparisons has its page, too"


def test_ticks_are_round_numbers_within_the_range():
    assert report.round_ticks(0.97, 22.3).tolist() == [5, 10, 15, 20] and report.round_ticks(
        1, 60
    ).tolist() == [20, 40, 60]
    assert report.round_ticks(0.02, 0.31) == pytest.approx([0.1, 0.2, 0.3])


def test_attention_over_patches_is_the_decoders_own(folder, world, config, tokenizer):
    """With all keys alike, attention is even: every patch gets 1 / (tokens so far)."""
    from generate import load_for_inference as load

    model, _ = load(folder)
    for block in model.decoder.layers:
        torch.nn.init.zeros_(block.attn.k_proj.weight)
    prompt, _ = data.encode_chat([(["", "\nWhat?"], None)], tokenizer, config.vision.num_patches)
    answer = "red cat"
    got = report.attention_over_patches(model, tokenizer, prompt, answer, world / "0.png")
    lengths = [len(prompt) + n for n in range(len(tokenizer.encode(answer)) + 1)]
    assert got == pytest.approx(
        np.full(config.vision.num_patches, np.mean([1 / t for t in lengths])), rel=1e-5
    )
