"""What is the same run? Changed contents and settings are named; other spellings go on."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from evaluation_helpers import command
from training_helpers import TrainHere, rows, same_weights, write_random_model

import checkpoint
import generate
from evaluation.answer import read_answers
from model import XLlava
from vocabulary import identity
from vocabulary.files import lock_file
from vocabulary.identity import claim_run, describe_images, describe_model, digest, file_difference


# ------------------------------------------------------------------------------------ contents
def test_a_small_file_is_known_by_all_its_bytes(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()[:16]
    assert digest(tmp_path / "a", may_sample=True) == digest(tmp_path / "a")


def test_a_large_file_of_weights_is_known_by_its_size_its_header_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "LARGE", 1 << 22)
    content = bytearray(os.urandom((9 << 20) + 5))
    path = tmp_path / "a"
    path.write_bytes(content)
    seen = {digest(path, may_sample=True)}
    for place in (0, (1 << 20) - 1, 1 << 22, (1 << 22) + 4095, 2 << 22, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        seen.add(digest(path, may_sample=True))
    path.write_bytes(content[: 9 << 20])
    seen.add(digest(path, may_sample=True))
    assert len(seen) == 8, "each change is seen"
    assert digest(path) == hashlib.sha256(content[: 9 << 20]).hexdigest()[:16]


@pytest.mark.parametrize(
    "old, new, words",
    [
        ([["a", "1"]], [["b/a", "1"]], None),
        ([["a", "1"]], [["a", "2"]], "a changed"),
        ([["a", "1"]], [["b", "2"]], "a → b"),
        ([["a", "1"], ["b", "2"]], [["b", "2"], ["a", "1"]], "a, b → b, a"),
        ([["a", "1"], ["b", "2"]], [["a", "1"], ["b", "3"]], "b changed"),
        ([["a", "1"]], [["a", "1"], ["b", "2"]], "nothing → b"),
        ([["a", "1"], ["b", "2"]], [["a", "1"]], "b → nothing"),
        ([["a", "1"]], [["a", "1"], ["a", "1"]], "a → a, a"),
        ([], [[n, n] for n in "abcde"], "nothing → a, b, c and 2 more"),
    ],
)
def test_how_files_differ_is_said_in_words(old, new, words):
    assert file_difference(old, new) == words


def test_a_model_is_known_by_its_files_and_an_image_by_name_size_and_time(tmp_path):
    model = tmp_path / "m"
    (model / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.model", "log.jsonl"):
        (model / name).write_text(name, encoding="utf-8")
    names = [os.path.basename(path) for path, _ in describe_model(model)]
    assert names == ["config.json", "model.safetensors", "tokenizer.model"]

    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    ((_, before),) = describe_images([image, image, tmp_path / "lost.png"])
    time = image.stat().st_mtime_ns
    assert before == f"a.png 3 {time}"
    image.write_bytes(b"two")
    os.utime(image, ns=(time, time + 1000))
    ((_, after),) = describe_images([image])
    assert after != before


# ------------------------------------------------------------------------------------ claims
def test_a_claim_goes_on_with_its_own_run_only(tmp_path):
    data, out, part = tmp_path / "d.json", tmp_path / "o.json", tmp_path / "o.part"
    data.write_text("[]", encoding="utf-8")
    mine = {"command": "c", "length": 5, "files": {"data": [[str(data), digest(data)]]}}
    claim_run(out, mine, [part])
    assert json.loads((tmp_path / "o.run.json").read_text(encoding="utf-8")) == mine
    part.write_text("paid for", encoding="utf-8")
    claim_run(out, mine, [part])

    with pytest.raises(ValueError, match=r"o.json: is of another run \(length: 5 → 6\); --fresh"):
        claim_run(out, mine | {"length": 6}, [part])
    other = mine | {"command": "other"}
    for fresh in (False, True):
        with pytest.raises(ValueError, match="o.part: was not written by this command"):
            claim_run(out, other, [part], fresh)
        with pytest.raises(ValueError, match="d.json: is an input"):
            claim_run(data, mine | {"command": "c"}, fresh=fresh)
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="notes: was not written by this command"):
        claim_run(tmp_path / "notes", mine)
    assert part.read_text(encoding="utf-8") == "paid for"


def test_a_result_is_its_commands_own_whenever_that_is_killed(tmp_path, monkeypatch):
    out, mine = tmp_path / "o.json", {"command": "c", "files": {}}
    claim_run(out, mine)
    identity.write_claimed(out, b"first")
    real = identity.write_atomically

    def killed(path, write):
        raise KeyboardInterrupt

    monkeypatch.setattr(identity, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        identity.write_claimed(out, b"second")
    monkeypatch.setattr(identity, "write_atomically", real)
    claim_run(out, mine)
    identity.write_claimed(out, b"second")
    claim_run(out, mine)
    out.write_bytes(b"edited")
    with pytest.raises(ValueError, match="was edited after this command wrote it"):
        claim_run(out, mine)


def test_what_another_process_writes_to_is_neither_continued_nor_set_aside(tmp_path):
    out, part, mine = tmp_path / "o.json", tmp_path / "o.part", {"command": "c", "files": {}}
    with open(part, "w", encoding="utf-8") as file:
        claim_run(out, mine, [part])
        lock_file(file, part)
        for fresh in (False, True):
            with pytest.raises(ValueError, match="o.part: another process writes to it; wait"):
                claim_run(out, mine | {"length": 6}, [part], fresh)
    assert not list(tmp_path.glob("*.old-*"))
    note = json.loads((tmp_path / "o.run.json").read_text(encoding="utf-8"))
    assert note == mine
    claim_run(out, mine, [part], fresh=True)


def test_fresh_sets_all_parts_aside_under_one_number(tmp_path):
    out, part = tmp_path / "o.json", tmp_path / "o.part"
    (tmp_path / "o.json.old-1").write_text("older", encoding="utf-8")
    (tmp_path / "o.part.old-2").write_text("older", encoding="utf-8")
    for number in (3, 4):
        claim_run(out, {"command": "c", "files": {}}, [part], fresh=True)
        assert not out.exists() and not part.exists()
        out.write_text(f"{number}", encoding="utf-8")
        part.write_text(f"{number}", encoding="utf-8")
    claim_run(out, {"command": "c", "files": {}}, [part], fresh=True)
    kept = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("o.*.old-*")}
    assert kept["o.json.old-1"] == "older"
    assert kept["o.part.old-2"] == "older"
    assert kept["o.json.old-3"] == kept["o.part.old-3"] == "3"
    assert kept["o.json.old-4"] == kept["o.part.old-4"] == "4"


# ------------------------------------------------------------------------------------ answers
@pytest.fixture
def folder(tmp_path, config, tokenizer_file, world, monkeypatch):
    """A working directory with a model m and a world w."""
    write_random_model(config, tokenizer_file, tmp_path / "m")
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_batch(monkeypatch, *more, model="m", data="w/captions.json"):
    words = ["generate.py", "--model", model, "--batch", data, "-o", "out.json"]
    words += ["--max-new-tokens", "2", *more]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    generate.main()


def run_answer(monkeypatch, *more, model="m", data="w/captions.json"):
    return command(
        *("answer", "--model", model, "--data", data, "-o", "out.json", "--precision", "fp32"),
        *("--max-new-tokens", "2", *more),
    )


def run_likelihood(monkeypatch, *more, model="m", data="w/captions.json"):
    return command(
        *("likelihood", "--model", model, "--data", data, "-o", "out.json", "--precision", "fp32"),
        *more,
    )


def edit_records(edit):
    path = Path("w/captions.json")
    records = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(edit(records)), encoding="utf-8")


def reverse_questions():
    edit_records(lambda records: records[::-1])


def edit_a_question():
    def edit(records):
        records[3]["conversations"][0]["value"] = "<image>\nIs it red?"
        return records

    edit_records(edit)


def replace_an_image():
    time = Path("w/5.png").stat().st_mtime_ns
    shutil.copy("w/4.png", "w/5.png")
    os.utime("w/5.png", ns=(time, time + 10**9))


def retrain(seed=1):
    """Other weights of the same shape, in the same file."""
    torch.manual_seed(seed)
    config = checkpoint.load_config("m")
    state = XLlava(config).init_weights().state_dict()
    checkpoint.write_model(config, state.items(), checkpoint.load_tokenizer("m"), "m")


def crop_images():
    path = Path("m/preprocessor_config.json")
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"do_pad": False}), encoding="utf-8")


@pytest.mark.parametrize(
    "run, change, words",
    [
        (run_batch, reverse_questions, "data: w/captions.json changed"),
        (run_batch, replace_an_image, "images: w/5.png changed"),
        (run_batch, retrain, "model: m/model.safetensors changed"),
        (run_answer, edit_a_question, "data: w/captions.json changed"),
        (run_answer, replace_an_image, "images: w/5.png changed"),
        (run_answer, crop_images, "model: m/preprocessor_config.json changed"),
        (run_likelihood, retrain, "model: m/model.safetensors changed"),
    ],
)
def test_answers_do_not_outlive_what_they_depend_on(folder, monkeypatch, run, change, words):
    run(monkeypatch)
    change()
    before = {path: path.read_bytes() for path in folder.glob("out*")}
    with pytest.raises(ValueError, match=r"^out.json: is of another run \(") as error:
        run(monkeypatch)
    assert f"({words}); --fresh" in str(error.value) and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in folder.glob("out*")} == before

    run(monkeypatch, "--fresh")
    assert (folder / "out.json.old-1").read_bytes() == before[folder / "out.json"]
    run(monkeypatch)


@pytest.mark.parametrize("run", [run_batch, run_answer])
def test_another_spelling_goes_on(folder, monkeypatch, run):
    run(monkeypatch)
    answers = folder / ("out.json" if run is run_batch else "out.answers.jsonl")
    whole = answers.read_text(encoding="utf-8").splitlines()
    answers.write_text("\n".join(whole[:5]) + "\n", encoding="utf-8")
    shutil.copytree("m", "copy")
    for path in ("w/captions.json", "m/model.safetensors", "m/config.json"):
        os.utime(path)

    run(monkeypatch, model="./m/", data=folder / "w" / "captions.json")
    field = "answer" if run is run_batch else "full"
    again = answers.read_text(encoding="utf-8").splitlines()
    assert again[:5] == whole[:5]
    assert sorted(again) == sorted(whole) or [json.loads(line).get(field) for line in again] == [
        json.loads(line).get(field) for line in whole
    ]
    run(monkeypatch, model="copy")  # the weights are the same
    (folder / "elsewhere").mkdir()
    shutil.copy("out.run.json", "before.json")
    monkeypatch.chdir(folder / "elsewhere")
    for path in folder.glob("out.*"):
        shutil.copy2(path, folder / "elsewhere")
    run(monkeypatch, model="../m", data="../w/captions.json")


def test_a_batch_about_the_images_of_another_folder_is_another_run(folder, monkeypatch):
    run_batch(monkeypatch)
    shutil.copytree("w", "w2")  # with the times of the files
    run_batch(monkeypatch, "--images", "w2")
    os.utime("w2/0.png", (1, 1))
    with pytest.raises(ValueError, match=r"\(images: w2/0.png changed\)"):
        run_batch(monkeypatch, "--images", "w2")


def test_draws_do_not_depend_on_where_a_batch_was_cut_off(folder, monkeypatch):
    more = ("--temperature", 1.5, "--seed", 3)
    run_batch(monkeypatch, *more)
    whole = (folder / "out.json").read_bytes()
    (folder / "out.json").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    run_batch(monkeypatch, *more)
    assert (folder / "out.json").read_bytes() == whole
    with pytest.raises(ValueError, match=r"\(seed: 3 → 4\)"):
        run_batch(monkeypatch, "--temperature", 1.5, "--seed", 4)
    with pytest.raises(ValueError, match=r"\(top_p: 1.0 → 0.5\)"):
        run_batch(monkeypatch, *more, "--top-p", 0.5)
    with pytest.raises(ValueError, match=r"\(temperature: 1.5 → 0.0\)"):
        run_batch(monkeypatch)


def test_the_same_question_twice_is_two_draws(folder, monkeypatch):
    file = folder / "w" / "captions.json"
    record = json.loads(file.read_text(encoding="utf-8"))[0]
    file.write_text(json.dumps([record, record]), encoding="utf-8")
    run_batch(monkeypatch, "--temperature", 1.5)
    one, two = map(json.loads, (folder / "out.json").read_text(encoding="utf-8").splitlines())
    assert one["answer"] != two["answer"]


def test_results_of_another_command_are_not_replaced(folder, monkeypatch):
    run_answer(monkeypatch)
    before = (folder / "out.json").read_bytes()
    for more in ((), ("--fresh",)):
        with pytest.raises(ValueError, match="out.json: was not written by this command"):
            run_likelihood(monkeypatch, *more)
    (folder / "rows.json").write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="rows.json: was not written by this command"):
        command("likelihood", "--model", "m", "--data", "w/captions.json", "-o", "rows.json")
    assert (folder / "out.json").read_bytes() == before


def test_names_with_dots_have_answers_of_their_own(folder, monkeypatch):
    shutil.copytree("m", "good")
    retrain()
    for name, model in (("llava-1.5", "good"), ("llava-1.6", "m")):
        command("answer", "--model", model, "--data", "w/chats.json", "-o", name)
        header, answered = read_answers(name)
        assert header["model"] == model and len(answered) == 28
    assert "1.6" in command("compare", "1.5=llava-1.5", "1.6=llava-1.6")
    with pytest.raises(ValueError, match="llava-1.5.json: is of another run"):
        command("answer", "--model", "m", "--data", "w/chats.json", "-o", "llava-1.5.json")


def test_answers_are_not_kept_under_the_name_of_another_split(folder, monkeypatch):
    run_answer(monkeypatch)
    shutil.copy("w/captions.json", "w/other.json")
    with pytest.raises(ValueError, match=r"\(data: w/captions.json → w/other.json\)"):
        run_answer(monkeypatch, data="w/other.json")


# ------------------------------------------------------------------------------------ training
@pytest.fixture
def train_here(folder, monkeypatch, capsys):
    return TrainHere(folder / "m", folder / "w", folder, monkeypatch, capsys)


def replace_text():
    Path("w/text.txt").write_text("only this\n" * 40, encoding="utf-8")


def replace_tokenizer():
    """One with other scores, but the same pieces."""
    tokenizer = checkpoint.load_tokenizer("m")
    pieces = [piece._replace(score=piece.score - 1, raw=b"") for piece in tokenizer.pieces]
    type(tokenizer)(pieces, tokenizer.fields).save("m/tokenizer.model")


COMMON = ("--steps", 4, "--save-every", 2, "--resume")


@pytest.mark.parametrize(
    "stage, file, finished, change, words",
    [
        ("align", "captions.json", False, edit_a_question, "w/captions.json changed"),
        ("align", "captions.json", True, reverse_questions, "w/captions.json changed"),
        ("align", "captions.json", False, retrain, "m/model.safetensors changed"),
        ("align", "captions.json", True, retrain, "m/model.safetensors changed"),
        ("align", "captions.json", False, replace_tokenizer, "m/tokenizer.model changed"),
        ("text", "text.txt", False, replace_text, "w/text.txt changed"),
    ],
)
def test_training_does_not_go_on_with_other_files(
    train_here, folder, stage, file, finished, change, words
):
    assert train_here(stage, file, *COMMON)[1] == 0
    if not finished:
        (folder / "out" / "config.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    change()
    text, error = train_here(stage, file, *COMMON)
    assert "finished before" not in text
    assert words in error and "of another run (" in error and "\n" not in error
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")} == before

    assert train_here(stage, file, *COMMON, "--fresh")[1] == 0
    assert len(rows(folder / "out")) == 4 and (folder / "out.old-1" / "log.jsonl").exists()


def test_training_goes_on_whatever_the_spelling(train_here, folder):
    more = (*COMMON, "--lr", 1e-3)
    assert train_here("align", "captions.json", *more)[1] == 0
    shutil.copytree(folder / "out", folder / "whole")
    shutil.rmtree(folder / "w2", ignore_errors=True)
    shutil.copytree("w", "w2")
    os.utime("w2/captions.json")
    os.utime("m/model.safetensors")
    shutil.copytree("m", "m2")
    train_here.world = Path("w2/../w2")
    train_here.start = "./m2/"
    assert "finished before, nothing to do" in train_here("align", "captions.json", *more)[0]
    assert "finished before" in train_here("align", "captions.json", *more, "--workers", 1)[0]
    (folder / "out" / "config.json").unlink()
    assert "from step 2" in train_here("align", "captions.json", *more)[0]
    assert same_weights(folder / "whole", folder / "out")


def test_a_finished_run_of_a_number_of_steps_is_not_one_of_epochs(train_here):
    assert train_here("align", "captions.json", "--steps", 1, "--resume")[1] == 0
    _, error = train_here("align", "captions.json", "--resume")
    assert "steps_given: 1 → None" in error
    _, error = train_here("align", "captions.json", "--steps", 1, "--resume", "--precision", "bf16")
    assert "precision: float32 → bfloat16" in error


def test_steps_that_are_an_epoch_go_on_as_an_epoch(train_here, folder):
    more = ("--save-every", 1, "--resume")
    assert train_here("align", "captions.json", "--steps", 3, *more)[1] == 0  # 12 records by 4
    (folder / "out" / "config.json").unlink()
    text, code = train_here("align", "captions.json", *more)
    assert code == 0 and "from step 2" in text


def test_training_on_the_images_of_another_folder_is_another_run(train_here, folder):
    shutil.copytree("w", "w2")
    assert train_here("align", "captions.json", *COMMON, "--images", "w2")[1] == 0
    assert train_here("align", "captions.json", *COMMON, "--images", "./w2/")[1] == 0
    code = train_here("align", "captions.json", *COMMON, "--images", "w")[1]
    assert "images: w2 → w" in code


def test_a_dictionary_that_changed_is_named(train_here, folder):
    words = folder / "w" / "words.txt"
    words.write_text("cat = 고양이\n", encoding="utf-8")
    more = ("--dictionary", words, *COMMON)
    assert train_here("vision", "captions.json", *more)[1] == 0
    words.write_text("cat = 猫\n", encoding="utf-8")
    _, error = train_here("vision", "captions.json", *more)
    assert "(dictionary: " in error and "words.txt changed)" in error


def test_train_writes_into_no_folder_of_others(train_here, folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "tokenizer.model").write_text("my only copy", encoding="utf-8")
    for more in ((), ("--resume",), ("--fresh",)):
        _, error = train_here("align", "captions.json", "--steps", 1, *more, out="mine")
        assert error.endswith("mine: was not written by train.py; give another -o")
        _, error = train_here("align", "captions.json", "--steps", 1, *more, out="m")
        assert error.endswith("m: was not written by train.py; give another -o")
    content = (folder / "mine" / "tokenizer.model").read_text(encoding="utf-8")
    assert content == "my only copy" and (folder / "m" / "config.json").exists()


def test_what_a_file_manager_leaves_in_an_empty_folder_is_nothing(train_here, folder):
    (folder / "seen").mkdir()
    (folder / "seen" / ".DS_Store").write_bytes(b"Bud1")
    assert train_here("align", "captions.json", "--steps", 1, out="seen")[1] == 0
