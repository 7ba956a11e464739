"""Results as text fit a terminal of 80 columns, and nothing is lost by it."""

import math
import re
import time
import unicodedata
from types import SimpleNamespace

import pytest

from demo.recipe import TEST_SPLITS
from demo.words import LANGUAGES
from evaluation.metrics import format_interval
from evaluation.retrieval import retrieval_rows
from evaluation.tables import result_tables, show_results
from train import StepStats
from training import run_log
from training.run_log import RunLog
from vocabulary.command import text_width
from vocabulary.files import read_json

KINDS = ("all", "object", "object.colour", "conversation", "yes_no", "atmosphere.background")
LONG = "한국어로_묻는_아주_긴_이름의_질문_묶음_하나_둘_셋_넷"  # 52 letters, 91 columns


def row(value=1.0, low=0.981, high=1.0, **labels):
    return {"n": 12345, "accuracy": value, "value": value, "low": low, "high": high, **labels}


def every_result(splits, languages):
    """Rows of all commands, each number as wide as it can be."""
    models = ("full", "blind", "chance")
    groups = [(split, code) for split in splits for code in (*languages, "all")]
    rows = [
        row(model=model, split=split, language=code, kind=kind)
        for model in models
        for split, code in groups
        for kind in KINDS
    ]
    metrics = ("character F1", "POPE yes_ratio", "perplexity")
    scores = [
        row(1234.5678, 1000, 2000, model=model, split=split, language=code, metric=metric)
        for metric in metrics
        for split, code in groups
        for model in models
    ]
    runs = [
        row(model=name, split=split, language=code, seeds=[1.0, 0.987, 0.5])
        for split, code in groups
        for name in ("full", "no-V-P", "no-V-P, blind", "chance")
    ]
    difference = {"difference": -0.123, "effect": -0.5, "p_holm": 0.0312, "low": -0.2, "high": -0.1}
    difference |= {"seeds_low": -0.2, "seeds_high": -0.1, "against": "full"}
    pairs = [
        row(model=name, split=split, language=code) | difference
        for split, code in groups
        for name in ("no-V", "no-V-P")
    ]
    pairs[0]["effect"], pairs[1]["effect"] = None, -math.inf  # from a file, from a comparison
    scored = [{"R@1": 1.0, "R@5": 1.0, "MRR": 1.0}] * 200
    found = {(f"image → {code}, raw", model): scored for code in languages for model in models}
    measures = ("points of the answer shown first (½: no bias)", "grade of the model, 1 – 10")
    judged = [row(measure=measure, language=code) for code in languages for measure in measures]
    return {
        "rows": rows,
        "scores": scores,
        "likelihood": scores,
        "retrieval": retrieval_rows(found, 20),
        "models": runs,
        "pairs": pairs,
        "judge": judged,
    }


@pytest.mark.parametrize(
    "splits, languages", [(TEST_SPLITS, LANGUAGES), ([LONG, "a" * 99], ["zh-Hant-TW", "한국어"])]
)
def test_no_line_is_longer_than_80_columns_and_every_number_is_there(splits, languages):
    for key, tables in result_tables(every_result(splits, languages)).items():
        for table in tables:
            text = table.as_text()
            for line in text.splitlines():
                assert text_width(line) <= 80, f"{key}: {line}"
            assert "-inf" not in text
            cells = [cell for _, cells in table.lines for cell in cells]
            numbers = [re.sub("<.*?>", "", cell) for cell in cells if 'class="interval' in cell]
            given = [number.replace(" – ", "–") for number in numbers]
            shown = text.replace(" – ", "–")
            for number in set(given):
                assert shown.count(number) >= given.count(number), f"{key}: {number}"


def test_headings_name_what_left_the_lines():
    (table,) = result_tables(every_result(TEST_SPLITS, LANGUAGES))["pairs"]
    text = table.as_text()
    for split in TEST_SPLITS:
        for name in ("no-V", "no-V-P"):
            assert f"differences, {name} against full, {split.replace('_', ' ')}\n" in text


def test_east_asian_characters_take_two_columns():
    assert [text_width(text) for text in ("cat", "고양이", "猫", "ｶ", "é")] == [3, 6, 2, 1, 1]
    assert text_width(unicodedata.normalize("NFD", "고양이 é")) == 8, "as macOS names files"
    results = every_result(["가나다", "abc"], ["en"])["models"]
    first, second = result_tables({"models": results})["models"]
    column = {line.index("100.0 (") for line in second.as_text().splitlines()[2:]}
    assert len(column) == 1


def test_results_are_written_before_they_are_printed(tmp_path, monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        show_results(every_result(TEST_SPLITS, LANGUAGES), tmp_path / "results.json")
    monkeypatch.undo()
    assert len(read_json(tmp_path / "results.json")["retrieval"]) == 9


def test_an_interval_of_too_few_images_is_said_in_words():
    nothing = float("inf")
    assert format_interval(0.5, -nothing, nothing) == " 50.0 (too few images)"
    rows = [row(0.5, -nothing, nothing, measure="m", language="en")]
    (table,) = result_tables({"judge": rows})["judge"]
    assert "(too few images)" in table.as_text() and "inf" not in table.as_text()


def test_progress_of_training_fits_too(monkeypatch, capsys):
    """The most that any run shows: long numbers, a GPU, skipped steps."""
    monkeypatch.setattr(run_log, "step_flops", lambda *_: 1e14)
    monkeypatch.setattr(run_log, "peak_memory_gib", lambda _: 139.8)
    monkeypatch.setattr(run_log, "is_rank0", lambda: False)
    log = RunLog.__new__(RunLog)
    log.args, log.process = SimpleNamespace(stage="instruct"), SimpleNamespace(world_size=8)
    log.process.device, log.batches = None, SimpleNamespace(start=0, steps=200_000)
    log.num_skips = log.skips_in_a_row = log.num_targets = 999
    log.flops, log.peak_flops, log.data_wait = None, 1e15, 0.5
    now = time.perf_counter()
    log.start_time, log.print_time = now - 36_000, now - 99

    stats = StepStats(10**6, 10**6, 10**6, 100, 10**9, 0)
    for is_terminal in (True, False):
        log.bar = run_log.make_bar("instruct", 100_000, 200_000, is_terminal)
        log.step_time = time.perf_counter() - 1
        log.write_step(100_001, stats, 12.345, 3.8e-4, 123456.7)
        if is_terminal:
            bar = str(log.bar)
            assert bar.startswith("instruct 100001/200000, ") and "loss 12.345, " in bar
            assert len(bar) <= 80, bar
    *_, first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("instruct 100,001/200,000, ")
    assert first.endswith("loss 12.345, lr 3.8e-04, norm 1.23e+05")
    parts = ("tokens/s", "MFU", "139.8 GiB", "999 skipped", "100% non-padding", "waited")
    assert all(part in second for part in parts)
    assert max(len(first), len(second)) <= 80, (first, second)
