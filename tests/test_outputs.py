"""Whose file is it? No command replaces a file that it did not write, and none its own input."""

import json
from pathlib import Path

import pytest
from conftest import save_model
from PIL import Image

from demo import __main__ as demo
from model import XLlava
from vocabulary.files import claim_output, set_aside, sibling

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config, tokenizer_file):
    folder = tmp_path_factory.mktemp("outputs")
    save_model(XLlava(config).init_weights(), tokenizer_file, folder / "model")
    (folder / "text.txt").write_text("some words and more words\n" * 50, encoding="utf-8")
    Image.new("RGB", (20, 20), "red").save(folder / "image.png")
    question = {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "red"}
    record = {"id": 1, "language": "en", "conversations": list(question)}
    (folder / "questions.json").write_text(json.dumps([record]), encoding="utf-8")
    (folder / "notes.txt").write_text("my only copy")  # no line feed at the end
    (folder / "list.json").write_text("[1, 2]\n")
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text('{"step": 1, "loss": 1.0, "targets": 1}\n')
    (folder / "images").mkdir()
    Image.new("RGB", (20, 20), "red").save(folder / "images" / "a.png")
    return folder


GENERATE = ("generate.py", "--model", "model", "--max-new-tokens", "2", "--batch", "questions.json")
ANSWER = ("-m", "evaluation", "answer", "--model", "model", "--data", "questions.json")
ANNOTATE = ("-m", "annotation", "images", "--base-url", "http://localhost:9/v1", "--model", "m")
STATS = ("-m", "annotation", "stats", "questions.json", "--sheet")
REPORT = ("-m", "evaluation", "report", "run", "-o")
COMPARE = ("-m", "evaluation", "compare", "a=a.json", "b=b.json", "-o")
STAGE = ("train.py", "align", "--model", "model", "--data", "questions.json", "-o")
TRAIN = ("tokenizer.py", "train", "text.txt", "--vocab-size", "290")


@pytest.mark.parametrize(
    "command, out",
    [
        (GENERATE, "questions.json"),
        (GENERATE, "notes.txt"),
        (GENERATE, "list.json"),
        (ANSWER, "questions.json"),
        (ANSWER, "notes.txt"),
        (ANSWER, "list.json"),
        (ANNOTATE, "list.json"),
        (ANNOTATE, "questions.json"),
        (TRAIN, "text.txt"),
        (TRAIN, "notes.txt"),
        (("vision.py", "image.png", "--size", "16"), "image.png"),
        (("vision.py", "image.png", "--size", "16"), "notes.txt"),
        (("-m", "checkpoint", "build", "--llm", "model"), "model"),
        (STATS, "questions.json"),
        (STATS, "notes.txt"),
        (REPORT, "run/log.jsonl"),
        (REPORT, "notes.txt"),
        (COMPARE, "list.json"),
        (STAGE, "images"),
        (STAGE, "model"),
    ],
)
def test_a_file_that_a_command_did_not_write_is_refused_untouched(
    folder, run_here, monkeypatch, command, out
):
    def contents():
        files = sorted(path for path in (folder / out).rglob("*") or [folder / out])
        return {path: path.read_bytes() for path in [folder / out, *files] if path.is_file()}

    before = contents()
    words = [str(ROOT / word) if word.endswith(".py") else word for word in command]
    if words[-1] not in ("-o", "--sheet"):
        words.append("-o")
    monkeypatch.chdir(folder)
    status, error = run_here(*words, out)
    assert status != 0
    assert error.strip().count("\n") == 0, error
    assert out in error and "another -o" in error
    assert contents() == before


def test_an_earlier_output_may_be_replaced_and_an_input_never(tmp_path):
    ours = tmp_path / "a.json"
    ours.write_text('{"rows": []}')
    claim_output(ours, lambda path: "rows" in json.loads(path.read_text()))
    claim_output(tmp_path / "new.json", lambda path: False)
    with pytest.raises(ValueError, match="is an input"):
        claim_output(ours, lambda path: True, [tmp_path / "." / "a.json"])
    with pytest.raises(ValueError, match="is a folder"):
        claim_output(tmp_path, lambda path: True)


def test_names_keep_their_dots_and_what_is_set_aside_is_never_replaced(tmp_path):
    assert sibling("out/llava-1.5", ".answers.jsonl") == Path("out/llava-1.5.answers.jsonl")
    assert sibling("out/llava-1.6.json", ".answers.jsonl") == Path("out/llava-1.6.answers.jsonl")
    for n in range(3):
        (tmp_path / "x.jsonl").write_text(str(n))
        (tmp_path / "folder").mkdir()
        set_aside(tmp_path / "x.jsonl", tmp_path / "folder", tmp_path / "missing")
    assert [(tmp_path / f"x.jsonl.old-{n}").read_text() for n in (1, 2, 3)] == ["0", "1", "2"]
    assert (tmp_path / "folder.old-3").is_dir() and not (tmp_path / "folder").exists()


def test_the_demo_replaces_nothing_that_is_not_in_its_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("out/demo")
    out.mkdir(parents=True)

    def refused(*words):
        before = {path: path.read_bytes() for path in Path("out").rglob("*.*") if path.is_file()}
        with pytest.raises(SystemExit) as error:
            demo.main(words, runner=None)
        after = {path: path.read_bytes() for path in Path("out").rglob("*.*") if path.is_file()}
        assert before == after and "\n" not in str(error.value)
        return str(error.value)

    for name in ("commands.txt", "steps.json", "ko.model"):
        (out / name).write_text("[]", encoding="utf-8")
        assert name in refused()
        assert "not a run of the demo; choose another --out" in refused("--fresh")
        (out / name).unlink()
