"""The report of a run: curves, tables, images, attention and commands, in one file offline."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_helpers import command, make_question, write_random_model

import data
from evaluation.report.attention import attention_over_patches
from evaluation.report.curves import log_ticks, read_log, round_ticks, running_mean
from evaluation.report.gallery import card
from evaluation.report.limits import caption_table, few_answers, weakest_groups
from evaluation.report.page import stage_folders
from evaluation.tables import number
from generate import load_for_inference
from model import XLlava


@pytest.fixture(scope="module")
def folder(config, tokenizer_file, tmp_path_factory):
    return write_random_model(config, tokenizer_file, tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def finished_run(folder, world, tmp_path):
    """A run of one stage, evaluated, in which one answer is right and one question is HTML."""
    run = tmp_path / "run"
    (run / "instruct").mkdir(parents=True)
    log = [{"step": s, "loss": None if s == 9 else 5 / s, "seconds": 0.1} for s in range(1, 30)]
    lines = [*map(json.dumps, log), '{"step": 3']  # cut off by a crash
    (run / "instruct" / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    args = ["--data", world / "chats.json", "-o", run / "eval.json", "--max-new-tokens", "4"]
    command("answer", "--model", folder, *args)

    answers = run / "eval.answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    row = next(row for row in rows if row.get("image") and row["turn"] == 0)
    row["full"], row["question"] = row["truth"], "<script>alert(1)</script>"
    answers.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return run


def report(*args):
    """The page that the command writes."""
    command("report", *args)
    return (args[0] / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_curves_tables_images_attention_and_commands(finished_run):
    (finished_run / "commands.txt").write_text("python train.py <x>\n" * 2, encoding="utf-8")
    (finished_run / "timing.json").write_text('{"train": 61.4}', encoding="utf-8")
    page = report(finished_run, "--each", "2", "--attention", "1")
    assert page.count("<polyline") == 4 and "29 steps" in page, "two on each kind of axes"
    assert page.count(">loss per target</text>") == page.count(">step</text>") == 2
    assert page.count("python train.py &lt;x&gt;") == 1
    assert "61 seconds in all: train 61" in page and "parameters (vision " in page
    assert "data:image/jpeg;base64," in page and "Where it attends" in page and "chance" in page
    assert "✓" in page and "✗" in page and "reference: " in page
    assert "&lt;script&gt;" in page and "<script" not in page, "what a model says is text"
    assert "content=\"default-src 'none'; img-src data:;" in page
    assert "http://" not in page and "https://" not in page and 'src="/' not in page, "offline"


def test_the_page_fits_a_phone_and_paper(finished_run):
    page = report(finished_run, "--attention", "0")
    curves = page[page.index('class="curves"') : page.index("Right answers</h2>")]
    assert curves.count("<svg") == curves.count("viewBox=") == 2 and "<svg width" not in curves
    assert page.count("<table>") == page.count('<div class="scroll"><table>') > 2
    for media in ("screen and (max-width", "print", "screen and (prefers-color-scheme: dark)"):
        assert f"@media {media}" in page


def test_the_tables_have_the_numbers_of_the_evaluation(finished_run):
    page = report(finished_run, "--attention", "0")
    rows = json.loads((finished_run / "eval.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        low, high = f"{100 * row['low']:.1f}", f"{100 * row['high']:.1f}"
        text = f'{100 * row["accuracy"]:.1f} <span class="interval">({low} – {high})</span>'
        assert f"<td>{text}</td>" in page


def test_without_commands_txt_the_stages_own_notes_are_shown(finished_run):
    page = report(finished_run, "--attention", "0")
    assert "# instruct: it has no runs.jsonl" in page
    runs = finished_run / "instruct" / "runs.jsonl"
    runs.write_text('{"command": "train.py instruct --seed 7"}\n', encoding="utf-8")
    page = report(finished_run, "--each", "1", "--attention", "0")
    assert "python train.py instruct --seed 7" in page
    assert "python -m evaluation answer --model " in page


def test_a_folder_of_comparisons_has_its_page_too(finished_run, tmp_path):
    with pytest.raises(ValueError, match="is this a run's folder"):
        command("report", tmp_path)
    results = finished_run / "eval.json"
    command("compare", f"a={results}", f"<b>={results}", "-o", tmp_path / "c.json")
    page = report(tmp_path)
    assert "Compared: c" in page and "&lt;b&gt;" in page and "<b>No difference at all" in page


def test_results_of_the_other_commands_are_shown(tmp_path):
    row = {"language": "ko", "split": "s", "model": "full", "n": 7, "low": 9.5, "high": 11}
    likelihood = [row | {"metric": "perplexity", "value": 10.25}]
    measures = {name: [0.25, 0.125, 0.5] for name in ("R@1", "R@5", "MRR")}
    retrieval = [{"direction": "ko → image", "model": "full", "n": 9, "pool": 4, **measures}]
    judge = [row | {"measure": "grade <1>", "value": 4.5, "low": None, "high": None}]
    results = {"likelihood": likelihood, "retrieval": retrieval, "judge": judge}
    for key, rows in results.items():
        (tmp_path / f"{key}.json").write_text(json.dumps({key: rows}), encoding="utf-8")
    (tmp_path / "judge.svg").write_text("<svg><text>그림</text></svg>", encoding="utf-8")
    page = report(tmp_path)
    assert page.count("<svg><text>그림</text></svg>") == 1
    assert '<td>10.2 <span class="interval">(9.5 – 11.0)</span></td>' in page
    assert '<td>25.0 <span class="interval">(12.5 – 50.0)</span></td>' in page
    assert "grade &lt;1&gt;" in page and "(too few images)" in page and "한국어" in page
    assert page.count('class="matrix"') == 1 and ">25.0</text>" in page and ">50</text>" not in page


def test_a_text_runs_from_the_right_where_its_letters_do():
    fields = {"question": "ما الشيء الأحمر؟", "full": "بيت", "blind": "قط"}
    page = card(make_question("قطة", language="ar", **fields), "")
    assert '<div class="question" dir="auto">ما الشيء الأحمر؟</div>' in page
    assert "✗ <bdi>بيت</bdi>" in page and "reference: <bdi>قطة</bdi>" in page
    assert "blind: <bdi>قط</bdi>" in page


def test_stages_are_in_the_order_of_training(tmp_path):
    for name in (
        "text",
        "instruct",
        "instruct-2",
        "instruct-3",
        "vision",
        "align",
        "instruct-1",
        "zzz",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").touch()
    order = ["vision", "text", "align", "instruct-1", "instruct-2", "instruct-3", "instruct", "zzz"]
    assert [folder.name for folder in stage_folders([tmp_path])] == order
    assert stage_folders([tmp_path / "text"]) == [tmp_path / "text"]


def test_of_a_repeated_step_the_later_row_counts(tmp_path):
    lines = ['{"step": 1, "loss": 4}', '{"step": 2, "loss": 3}', '{"step": 2, "loss": 2}', '{"st']
    (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [row["loss"] for row in read_log(tmp_path / "log.jsonl")[0]] == [4, 2]


def test_validations_are_drawn_beside_the_loss_and_do_not_replace_its_steps(tmp_path):
    counts = {"all": 10, "colour": 4, "<b>": 6}
    lines = [{"step": step, "loss": 1 / step, "lr": min(step, 3)} for step in range(1, 9)]
    for step, right in ((4, 0.2), (8, 0.9)):
        full = {"all": right, "colour": right, "<b>": 0.5}
        validation = {"n": counts, "full": full, "blind": dict.fromkeys(counts, 0.1)}
        lines.append({"step": step, "validation": validation})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows, validations = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [*range(1, 9)] and list(validations) == [4, 8]

    page = report(tmp_path)
    assert page.count("<polyline") == 2 * (2 + 4) and 'class="blind"' in page
    assert "step 8: 90.0% of 10 right, blind 10.0%" in page
    assert "By skill: &lt;b&gt; 50%, colour 90%" in page, "the weakest first"
    assert page.count('class="warmup"') == 2


def test_the_running_mean_is_of_the_last_fifth_and_of_a_twentieth_of_all_at_most():
    values = np.arange(60.0)
    mean = running_mean(values)
    assert mean[:5].tolist() == [0, 1, 2, 3, 4] and mean[5] == 4.5, "2 of 6 steps"
    assert mean[59] == pytest.approx(58), "the last 3 of 60"
    weighted = running_mean(values, [1] * 59 + [2])
    assert weighted[59] == pytest.approx((57 + 58 + 2 * 59) / 4)


def test_ticks_are_round_numbers_within_the_range():
    assert round_ticks(0.97, 22.3).tolist() == [5, 10, 15, 20]
    assert round_ticks(1, 60).tolist() == [20, 40, 60]
    assert round_ticks(0.02, 0.31) == pytest.approx([0.1, 0.2, 0.3])


def test_logarithmic_ticks_are_few_and_at_least_four_where_they_can_be():
    assert log_ticks(1, 4000) == [1, 10, 100, 1000]
    assert log_ticks(0.5, 30) == [0.5, 1, 2, 5, 10, 20]
    assert log_ticks(1.2, 4.1) == [1.5, 2, 3, 4]


def answered(truth, full, blind, skill="what", **fields):
    return make_question(truth, skill=skill, full=full, blind=blind, image="i.png", **fields)


def test_the_weakest_skills_come_first_with_their_wrong_answers():
    """18 of 20 right, 10 of 20, 20 of 20; too few questions; captions, of which none is right."""
    questions = []
    for skill, right, n in (("a", 18, 20), ("b", 10, 20), ("c", 20, 20), ("d", 0, 19)):
        questions += [answered("x", "X." if i < right else "y", "", skill) for i in range(n)]
    questions += [answered("x", "y", "", "e", metric="caption") for _ in range(20)]
    found = [
        (group, len(right), len(wrong)) for group, right, wrong in weakest_groups(questions, 9)
    ]
    assert found == [(("s", "b"), 10, 10), (("s", "a"), 18, 2)]
    assert len(weakest_groups(questions, 1)) == 1


def test_few_possible_answers_are_told_apart_into_right_other_and_else():
    """The full model never says the wrong one of two names, the blind one always says one."""
    questions = [answered(("cat", "dog")[i % 2], "<b>", "dog") for i in range(10)]
    questions += [answered("cat", "cat", "dog") for _ in range(10)]
    text = few_answers(questions)
    assert "Only these are ever right: <bdi>cat</bdi>, <bdi>dog</bdi>." in text
    shares = "<td>full</td><td>50.0%</td><td>0.0%</td><td>50.0%</td>"
    assert f"{shares}<td><bdi>&lt;b&gt;</bdi> 10</td>" in text
    assert "<td>blind</td><td>25.0%</td><td>75.0%</td><td>0.0%</td><td></td>" in text
    assert "<td>chance</td><td>75.0%</td><td>25.0%</td><td>0.0%</td><td></td>" in text

    assert few_answers(questions[10:]) == "", "always one of the few: nothing to explain"
    many = [answered(f"name {i % 4}", "else", "else") for i in range(20)]
    assert few_answers(many) == ""


def test_captions_are_counted_by_language_and_number_of_clauses():
    questions = [answered("a cat, a dog", "a cat, a dog", "", metric="caption") for _ in range(3)]
    questions += [answered("一只猫，在雨天", "猫", "", language="zh", metric="caption")]
    questions += [answered("a cat", "a dog", "", metric="caption")]
    text = caption_table(questions)
    assert "<td>s</td><td>English</td><td>2</td><td>3</td><td>100.0" in text
    assert "<td>s</td><td>中文</td><td>2</td><td>1</td><td>0.0" in text
    assert "<td>s</td><td>all languages</td><td>2</td><td>4</td><td>75.0" in text
    assert "<td>s</td><td>English</td><td>1</td><td>1</td><td>0.0" in text
    assert caption_table(questions[-1:]) == "", "free captions are never the same text"


def test_all_splits_stand_beside_each_other_and_a_probe_has_its_section(finished_run):
    rows = json.loads((finished_run / "eval.json").read_text(encoding="utf-8"))["rows"]
    probed = {"encoder": "probe", "split": "unseen", "property": "kind", "n": 9, "chance": 0.25}
    probed |= {"accuracy": 0.5, "low": 0.25, "high": 0.75}
    further = [probed | {"property": name} for name in ("colour", "size", "place")]
    text = json.dumps({"model": "m", "probe": [probed, *further]})
    (finished_run / "p.json").write_text(text, encoding="utf-8")
    page = report(finished_run, "--attention", "0")

    table = page[page.index("All splits") :].partition("</table>")[0]
    own = [row for row in rows if (row["model"], row["kind"]) == ("full", "all")]
    value = {row["language"]: f"{100 * row['accuracy']:.1f}" for row in own}
    assert f"<td>{value['all']} <span" in table
    assert f"<td>{value['en']}</td><td>{value['ko']}</td>" in table
    assert "What the patches know: p" in page and "<td>25.0</td><td>50.0 <span" in page
    assert "What it can't do" in page and "right</b>" in page


def test_numbers_without_an_interval_say_so():
    assert number(None, None, None) == "undefined"
    assert "(too few images)" in number(0.5, None, None)
    assert number(0.5, 0.25, 0.75).startswith("50.0 <")
    assert [number(value, 1, 2, scale=1).split()[0] for value in (1, 10, 100)] == [
        "1.000",
        "10.0",
        "100",
    ]


def test_attention_over_patches_is_the_decoders_own(folder, world, config, tokenizer):
    """If all keys are equal, attention is even: every patch gets 1 / (tokens so far)."""
    model, _ = load_for_inference(folder)
    for block in model.decoder.layers:
        torch.nn.init.zeros_(block.attn.k_proj.weight)
    num_patches, answer = config.vision.num_patches, "red cat"
    prompt, _ = data.encode_chat([(["", "\nWhat?"], None)], tokenizer, num_patches)
    got = attention_over_patches(model, tokenizer, prompt, answer, world / "0.png")
    lengths = [len(prompt) + n for n in range(len(tokenizer.encode(answer)) + 1)]
    want = np.full(num_patches, np.mean([1 / length for length in lengths]))
    assert got == pytest.approx(want, rel=1e-5)


def test_attention_maps_are_those_of_normed_queries(world, config, tokenizer):
    """Qwen3 norms the queries of each head: their scale changes nothing."""
    text = replace(config.text, model_type="qwen3")
    model = XLlava(replace(config, text=text)).init_weights().eval()
    prompt, _ = data.encode_chat([(["", "\nWhat?"], None)], tokenizer, config.vision.num_patches)
    given = model, tokenizer, prompt, "red cat", world / "0.png"
    before = attention_over_patches(*given)
    for block in model.decoder.layers:
        block.attn.q_proj.weight.data *= 64
    assert attention_over_patches(*given) == pytest.approx(before, rel=1e-3)
