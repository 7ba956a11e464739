"""Runs compared: no difference, a difference, seeds that decide, and questions that differ."""

import dataclasses
import json
import math
import re

import pytest
from evaluation_helpers import command, make_question

from evaluation.answer import FIELDS
from evaluation.compare import conclusions, evidence_level
from evaluation.metrics import t_quantile


def answered(path, num_right, n=120, language="en"):
    """An answer file in which `num_right` of the n questions, two about each image, are answered
    rightly."""
    lines = [{"model": "m"}]
    for i in range(n):
        answer = "a" if i * 7 % n < num_right else "b"
        question = make_question("a", language, id=i, image=f"{i // 2}.png")
        question.full, question.blind = answer, "b"
        row = dataclasses.asdict(question)
        lines.append({key: row[key] for key in FIELDS})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_against_itself_is_no_difference_and_a_worse_one_is_worse(tmp_path):
    a, b = answered(tmp_path / "a.answers.jsonl", 90), answered(tmp_path / "b.answers.jsonl", 50)
    out = tmp_path / "c.json"
    text = command("compare", f"full={a}", f"same={a}", f"worse={b}", "-o", out)
    found = read(out)
    assert len(found["pairs"]) == 2, (
        "in one language, all languages together would be the same comparisons again"
    )
    rows = {row["model"]: row for row in found["pairs"]}
    same, worse = rows["same"], rows["worse"]
    assert (same["difference"], same["p_holm"], same["effect"]) == (0, 1, 0)
    assert worse["difference"] == pytest.approx(-40 / 120) and worse["high"] < 0
    assert worse["p_holm"] < 0.01 and worse["n"] == 120 and worse["images"] == 60
    assert "No difference at all, each question has the same score in both: same: s en." in text
    assert "worse: s en -33.3 (" in text
    assert "one seed does not show what another would give" in text
    runs = {"full", "same", "worse"}
    models = {row["model"] for row in found["models"]}
    assert models == runs | {f"{name}, blind" for name in runs} | {"chance"}

    command("compare", f"full={a}", f"worse={b}", "--languages", "en", "-o", out)
    assert {row["n"] for row in read(out)["pairs"]} == {120}


def test_p_values_are_corrected_for_all_comparisons_together(tmp_path):
    names = [f"{n}={answered(tmp_path / f'{n}.answers.jsonl', n)}" for n in (90, 78, 80)]
    command("compare", *names, "-o", tmp_path / "c.json")
    first, second = read(tmp_path / "c.json")["pairs"]
    low, high = sorted([first, second], key=lambda row: row["p"])
    assert low["p"] < high["p"] < 0.5
    assert low["p_holm"] == pytest.approx(2 * low["p"])
    assert high["p_holm"] == pytest.approx(max(high["p"], 2 * low["p"]))


def test_a_difference_that_chance_explains_is_not_claimed(tmp_path):
    a, b = answered(tmp_path / "a.answers.jsonl", 90), answered(tmp_path / "b.answers.jsonl", 88)
    text = command("compare", f"full={a}", f"other={b}")
    assert re.search(
        r"Not shown, and not ruled out up to \d+\.\d points: other: s en -1\.7 \(", text
    )
    assert "differ;" not in text


def test_of_one_image_no_bound_is_claimed(tmp_path):
    row = {"low": -math.inf, "high": math.inf, "p_holm": 1.0, "different": 1, "language": "en"}
    row |= {"difference": 1.0, "split": "s", "model": "b", "against": "a"}
    _, text, _ = conclusions([row])
    assert text.endswith("b: s en +100.0 (too few images).")


def test_models_that_are_right_about_different_questions_are_not_called_the_same():
    row = {"low": 0.0, "high": 0.0, "p_holm": 1.0, "different": 40}
    assert evidence_level(row) == "open"


@pytest.mark.parametrize(
    "low, high, p_holm, seeds, want",
    [
        (0.0, 0.0, 1.0, None, "same"),
        (0.01, 0.2, 0.2, None, "open"),  # significant before the correction, not after it
        (-0.1, 0.2, 0.01, None, "open"),
        (0.01, 0.2, 0.01, None, "models"),
        (0.01, 0.2, 0.01, (-0.1, 0.2), "seeds"),
        (0.01, 0.2, 0.01, (0.02, 0.2), "recipe"),
        (-0.2, -0.01, 0.01, (-0.2, -0.02), "recipe"),
    ],
)
def test_evidence_needs_the_corrected_p_the_interval_and_the_seeds(low, high, p_holm, seeds, want):
    row = {"low": low, "high": high, "p": 0.01, "p_holm": p_holm, "different": int(high != 0)}
    if seeds:
        row["seeds_low"], row["seeds_high"] = seeds
    assert evidence_level(row) == want


def test_seeds_decide_about_recipes(tmp_path):
    files = {n: answered(tmp_path / f"{n}.answers.jsonl", n) for n in (40, 60, 80, 84, 86, 88, 90)}

    files["again"] = answered(tmp_path / "again.answers.jsonl", 40)

    def group(name, *numbers):
        return f"{name}=" + ",".join(str(files[n]) for n in numbers)

    out = tmp_path / "c.json"
    text = command("compare", group("wide", 90, 40, 86), group("also", 80, 60, 40), "-o", out)
    text = " ".join(text.split())
    assert "seeds differ too much" in text
    text = command("compare", group("high", 86, 88, 90), group("low", 40, "again", 60), "-o", out)
    assert "the recipe makes the difference" in " ".join(text.split())

    # Welch by hand: means 46.67/120 and 88/120, variances 133.33/120² and 4/120² of 3 seeds each:
    # standard error √(137.33/3)/120, 2.12 degrees of freedom.
    (row,) = read(out)["pairs"]
    assert row["difference"] == pytest.approx(-41.333 / 120, abs=1e-4)
    df = (137.333 / 3) ** 2 / ((133.333 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    half = math.sqrt(137.333 / 3) / 120 * t_quantile(df)
    assert (row["seeds_high"] - row["seeds_low"]) / 2 == pytest.approx(half, rel=1e-3)


def test_runs_on_other_references_are_not_compared(tmp_path):
    a = answered(tmp_path / "a.answers.jsonl", 5)
    b = answered(tmp_path / "b.answers.jsonl", 5)
    text = (tmp_path / "b.answers.jsonl").read_text(encoding="utf-8")
    edited = re.sub('"truth": "[^"]*"', '"truth": "other"', text, count=1)
    assert edited != text
    (tmp_path / "b.answers.jsonl").write_text(edited, encoding="utf-8")
    with pytest.raises(ValueError, match="not the questions of"):
        command("compare", f"a={a}", f"b={b}")


def test_runs_on_other_questions_are_not_compared(tmp_path):
    a = answered(tmp_path / "a.answers.jsonl", 5)
    b = answered(tmp_path / "b.answers.jsonl", 5, n=100)
    with pytest.raises(ValueError, match="not the questions of"):
        command("compare", f"x={a}", f"y={b}")
    with pytest.raises(ValueError, match="a.answers.jsonl: no questions in ko"):
        command("compare", f"x={a}", f"y={a}", "--languages", "en", "ko")
    with pytest.raises(ValueError, match="y: a file is named twice; each seed has one of its own"):
        command("compare", f"x={a}", f"y={a},{a}")
    with pytest.raises(ValueError, match="no such file; python -m evaluation answer -o writes it"):
        command("compare", f"x={a}", "y=gone.json")
    with pytest.raises(ValueError, match="x: named twice"):
        command("compare", f"x={a}", f"x={a}")
