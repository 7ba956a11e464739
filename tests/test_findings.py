"""The findings of the ablation, from answers made by hand: who helps whom, and fertility."""

import json
import sys
from pathlib import Path

import pytest
from evaluation_helpers import make_question

sys.path.insert(0, str(Path(__file__).parent.parent))
from demo import findings  # noqa: E402
from evaluation.answer import FIELDS  # noqa: E402
from evaluation.tables import result_tables  # noqa: E402


def make_run(folder, languages, right, seed=0):
    """A run of a world of these languages. right: {language: right answers of 20} on base-only
    kinds; of the first language, on other images. In 20 further ones the base language names
    them, every one wrong."""
    world = folder / f"data.{languages[0]}"
    run = folder / f"{languages[0]}-every-x2.{seed}"
    for path in (world, run):
        path.mkdir(parents=True, exist_ok=True)
    arguments = {"languages": list(languages)}
    (world / "world.json").write_text(json.dumps({"arguments": arguments}), encoding="utf-8")
    inputs = {(world / "world.json").as_posix(): "digest"}
    steps = {"steps": {"instruct": {"inputs": inputs}}}
    (run / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    (run / "eval.json").write_text("{}", encoding="utf-8")

    lines = [{"model": "m"}]
    for language in languages:
        is_first = language == languages[0]
        split = "unseen_images" if is_first else "cross_lingual"
        for i in range(20):
            # of six images of a test split, the first shows a base-only kind
            numbers = (6 * i, 6 * i + 1) if is_first else (i,)
            for number in numbers:
                answer = "a" if i < right[language] and number in (6 * i, i) else "b"
                name, image = f"{split}-{number}-{language}", f"images/{split}/{number:05}.png"
                q = make_question("a", language, id=name, image=image, split=split, skill="what")
                q.full, q.blind = answer, "b"
                lines.append({key: getattr(q, key) for key in FIELDS})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "eval.answers.jsonl").write_text(text, encoding="utf-8")
    return run


@pytest.fixture
def runs(tmp_path):
    """Three languages, each of which names the kinds in one run; of the first, two seeds."""
    made = {
        "xa": [
            make_run(tmp_path, ("xa", "xb", "xc"), {"xa": 20, "xb": 16, "xc": 8}),
            make_run(tmp_path, ("xa", "xb", "xc"), {"xa": 20, "xb": 18, "xc": 8}, seed=1),
        ],
        "xb": [make_run(tmp_path, ("xb", "xa", "xc"), {"xb": 19, "xa": 10, "xc": 16})],
        "xc": [make_run(tmp_path, ("xc", "xa", "xb"), {"xc": 18, "xa": 5, "xb": 4})],
    }
    return made


def test_transfer_is_a_table_of_the_language_that_names_and_the_one_asked(runs):
    rows = findings.transfer_rows(runs)
    table = {(row["source"], row["language"]): row for row in rows}
    shares = {key: round(row["accuracy"], 6) for key, row in table.items()}
    assert shares == {
        **{("xa", "xa"): 1, ("xa", "xb"): 0.85, ("xa", "xc"): 0.4, ("xa", "all others"): 0.625},
        **{("xb", "xa"): 0.5, ("xb", "xb"): 0.95, ("xb", "xc"): 0.8, ("xb", "all others"): 0.65},
        **{("xc", "xa"): 0.25, ("xc", "xb"): 0.2, ("xc", "xc"): 0.9, ("xc", "all others"): 0.225},
    }
    assert table["xa", "xb"]["seeds"] == pytest.approx([0.8, 0.9])
    row = table["xb", "xa"]
    assert (row["low"], row["high"]) == pytest.approx((0.28, 0.72), abs=0.06), "20 images"

    # every line has its cells in the same order, that of the languages
    (shown,) = result_tables({"models": rows})["models"]
    assert [title.split()[0] for title in shown.head[1:4]] == ["xa", "xb", "xc"]
    cells = {line[0]: [float(cell.split()[0]) for cell in line[1:5]] for _, line in shown.lines}
    assert cells["xb names them"] == [50.0, 95.0, 80.0, 65.0]


def test_transfer_says_who_helps_whom_most_and_least(runs):
    rows = findings.transfer_rows(runs)
    (sentence,) = findings.transfer_sentences(rows)
    _, xa, xb, xc = sentence.replace(": ", "; ", 1).split("; ")
    assert xa.startswith("xa xb against xc +25.0 (")
    assert xb.startswith("xb xa against xc +65.0 (") and xc.startswith("xc xb against xa +40.0 (")
    # 2 asin √0.5 - 2 asin √0.25 = π/2 - π/3
    assert xa.endswith("h 0.52)") and "over seeds" not in sentence, "one of the two has one seed"


def test_differences_of_other_questions_have_the_variances_of_both():
    a = {"accuracy": 0.8, "low": 0.77, "high": 0.83}
    b = {"accuracy": 0.5, "low": 0.46, "high": 0.54}
    assert findings.difference(a, b) == pytest.approx((0.3, 0.25, 0.35))  # 3, 4 and 5


def test_ranks_with_ties_and_a_constant():
    assert findings.rank_correlation([1, 2, 3], [10, 400, 401]) == pytest.approx(1)
    assert findings.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # ranks 0.5 0.5 2 and 0 1 2: √3 / 2
    assert findings.rank_correlation([5, 5, 9], [1, 2, 3]) == pytest.approx(3**0.5 / 2)
    assert findings.rank_correlation([5, 5, 5], [1, 2, 3]) is None


def test_fertility_counts_the_tokens_of_captions_of_the_same_images(runs, monkeypatch):
    class Letters:
        """A tokenizer with a token for each letter."""

        def encode(self, text):
            return list(text)

    monkeypatch.setattr(findings, "load_tokenizer", lambda folder: Letters())
    said = {"1.png": {"xa": "ab", "xb": "abcd", "xc": "a"}, "2.png": {"xa": "abcdefgh"}}
    said["3.png"] = {"xa": "abcd", "xb": "ab", "xc": "a"}
    # of a base-only kind, which a world of one language describes in all of its languages
    said["6.png"] = dict.fromkeys(("xa", "xb", "xc"), "abcdefghijkl")
    captions = [
        {"image": image, "language": language, "conversations": [{}, {"value": text}]}
        for image, own in said.items()
        for language, text in own.items()
    ]
    for folders in runs.values():
        world, _ = findings.world_of(folders[0])
        (world / "unseen_captions.json").write_text(json.dumps(captions), encoding="utf-8")
    expected = {"xa": 3, "xb": 3, "xc": 1}
    assert findings.tokens_per_caption(runs["xb"][0]) == expected

    rows = findings.fertility_rows(runs)
    found = [(row["model"].partition(":")[0], row["language"], row["tokens"]) for row in rows]
    assert found == [("xa", "xa", 3), ("xb", "xb", 3), ("xc", "xc", 1)]
    assert rows[1]["accuracy"] == pytest.approx(19 / 40), "all images, not the base-only kinds"
    (sentence,) = findings.fertility_sentences(rows)
    assert "all +0.87 (n 3)" in sentence  # ranks 1.5 1.5 0 and 2 1 0 (20, 19, 18 of 40 right)

    figure = findings.draw(rows)
    assert figure.count("<circle") == 2 * 3 and 'cy="' in figure


def test_runs_are_found_by_variant(runs, tmp_path):
    found = findings.find_runs(tmp_path)
    assert {name: len(folders) for name, folders in found.items()} == {
        "xa-every-x2": 2,
        "xb-every-x2": 1,
        "xc-every-x2": 1,
    }
    with pytest.raises(ValueError, match="no run has an eval.json; run python -m demo.ablation"):
        findings.main([str(tmp_path / "data.xa")])
