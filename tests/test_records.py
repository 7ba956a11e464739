"""What a record may hold, whoever reads it; text files and names of other programs."""

import gzip
import io
import json
import sys
import unicodedata
from typing import NamedTuple
from unittest import mock

import pytest
from evaluation_helpers import command, write_random_model
from PIL import Image
from record_helpers import read_records

import data
import evaluation.__main__
import generate
import tokenizer as tokenizer_module
import vision
from annotation.images import find_images, read_objects
from evaluation.answer import image_path
from evaluation.questions import Question, read_file, read_questions
from evaluation.tables import show_results
from training.phrases import PhraseDataset, read_dictionary
from training.texts import TextDataset
from vocabulary.command import run_main
from vocabulary.conversations import read_conversation
from vocabulary.files import read_json, read_lines, write_json
from vocabulary.formats import find_file, shorten
from vocabulary.records import scan_records

MARK = b"\xef\xbb\xbf"
IMAGE = "<image>\n"


def talk(question="<image>\nWhat?", answer="red"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def record(**fields):
    """A good record about 0.png, with other fields; None takes one out."""
    fields = {"id": "x", "image": "0.png", "conversations": talk()} | fields
    return {key: value for key, value in fields.items() if value is not ...}


def messages(*pairs, **fields):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]} | fields


def write(folder, world, *records, name="set.json"):
    for image in ("0.png", "1.png"):
        (folder / image).write_bytes((world / image).read_bytes())
    (folder / name).write_text(json.dumps(records), encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def folder(config, tokenizer_file, tmp_path_factory):
    return write_random_model(config, tokenizer_file, tmp_path_factory.mktemp("model") / "m")


class Done(NamedTuple):
    status: int
    out: str
    err: str


def run(module, *args, encoding="utf-8"):
    """Runs a command in this process, on a terminal of this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with mock.patch.multiple(
        sys, argv=["x", *map(str, args)], stdout=streams[0], stderr=streams[1]
    ):
        with pytest.raises(SystemExit) as end:
            run_main(module.main, module.__name__)
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    is_message = isinstance(end.value.code, str)
    return (
        Done(1, texts[0], f"{end.value.code}\n")
        if is_message
        else Done(end.value.code or 0, *texts)
    )


# ------------------------------------------------------------------------------------ what is bad
LONG = "A" * 6000
TYPES = ([], [1], {"a": 1}, 3, 0.5, True)
BAD = [
    ({"image": "https://example.org/a.png"}, "https://example.org/a.png: a URL?"),
    ({"image": "data:image/png;base64," + LONG}, "(6,022 characters): base64?"),
    ({"image": LONG}, "(6,000 characters): base64?"),
    ({"image": "가" * 120 + ".png"}, "가.png: "),
    ({"image": "0\0.png"}, "0\\x00.png: no such image"),
    ({"image": "."}, "is a folder"),
    ({"image": "../nowhere/0.png"}, "no such image"),
    ({"image": "/nowhere/0.png"}, "no such image"),
    ({"image": [None]}, "image is NoneType, must be a file name"),
    ({"image": [["0.png"]]}, "image is list, must be a file name"),
    ({"image": {"path": "0.png"}}, "image is dict, must be a file name"),
    ({"image": None}, "1 <image> marker(s) for 0 image(s)"),
    ({"image": ..., "images": ["0.png"], "conversations": talk("What?")}, "0 <image> marker(s)"),
    ({"images": ["1.png"]}, "image and images name different images"),
    ({"image": ..., "img": "0.png", "conversations": talk("What?")}, "'img' is not read"),
    ({"image": ..., "image_url": "0.png", "conversations": talk("What?")}, "'image_url' is not"),
    ({"video": "a.mp4"}, "'video' is not read"),
    ({"videos": ["a.mp4"], "image": ..., "conversations": talk("What?")}, "'videos' is not read"),
    ({"audio_path": "a.wav"}, "'audio_path' is not read"),
    ({"conversations": talk("<image>\nsee <video>")}, "message 0: <video> in it"),
    ({"conversations": talk("<image>\nsee", "<|audio_1|>")}, "message 1: <|audio_1|> in it"),
    ({"image": ..., "conversations": talk("<img>0.png</img> What?")}, "<img> in it"),
    ({"image": ..., "conversations": talk("<IMAGE>\nWhat?")}, "<IMAGE> in it"),
    ({"conversations": talk("<image>\n" + "cat " * 400)}, "longer than the model reads"),
    ({"conversations": talk(answer="half \ud83d")}, "'\\ud83d' is half a character"),
    ({"conversations": [{"from": "gpt", "value": "Hello!"}]}, "no question in it"),
    ({"system": "See <image>."}, "<image> in the system text"),
    ({"system": "See <video>."}, "<video> in it"),
    ({"conversations": [{"from": "system", "value": "<image>"}, *talk()]}, "<image> in the system"),
    ({"conversations": "What?"}, "no conversations in it (it has: id, image, conversations)"),
    ({"conversations": [None]}, "message 0: from None, must be 'human' or 'gpt'"),
    ({"conversations": [{"from": [1], "value": "x"}]}, "message 0: from [1]"),
    ({"image": ..., "conversations": talk("  ")}, "the question is empty"),
    ({"id": "x" * 5000, "image": "gone.png"}, "gone.png: no such image"),
    ({"conversations": ..., "data": [record()]}, "the list in 'data' may be records"),
    *[({"language": value}, f"language is {type(value).__name__}") for value in TYPES],
    *[({"kind": value}, f"kind is {type(value).__name__}") for value in TYPES],
    *[({"skill": value}, f"skill is {type(value).__name__}") for value in TYPES],
    *[({"system": value}, f"system is {type(value).__name__}") for value in TYPES],
    *[({"id": value}, f"id is {type(value).__name__}") for value in ([], {"a": 1}, True)],
]


@pytest.fixture(scope="module")
def bad_file(world, tmp_path_factory):
    """All BAD records, what is no record, and a good record at the end."""
    others = [None, 3, "x", [record()]]
    records = [*(record(**fields) for fields, _ in BAD), *others, record(id="good")]
    return write(tmp_path_factory.mktemp("bad"), world, *records)


def test_whatever_is_wrong_with_a_record_is_one_short_line(bad_file, tokenizer, config):
    dataset = data.ConversationDataset([bad_file], tokenizer, config, 2048, records_per_sample=1)
    reasons = [reason for _, reason in BAD] + ["must be an object"] * 4
    assert len(dataset) == len(reasons) + 1
    for i, reason in enumerate(reasons):
        with pytest.raises(data.BadSample) as error:
            dataset.sample(i)
        line = str(error.value)
        assert line.startswith(f"{bad_file}: record {i} (id ")
        assert reason in line
        assert "\n" not in line and "\0" not in line and len(line) < 700
    assert len(dataset.sample(len(reasons)).pixels) == 1


def test_every_reader_leaves_out_the_same_records(bad_file, tokenizer, config, folder, tmp_path):
    """The vision stage, evaluation, its likelihoods, and generate.py --batch."""
    data.ConversationDataset([bad_file], tokenizer, config, 2048, records_per_sample=4)
    num_bad = len(BAD) + 4
    (question,) = read_questions([bad_file], tokenizer, config, bad_samples="skip")
    assert question.id == "good"

    # The vision stage reads images later, and phrases of any length.
    phrases = PhraseDataset([bad_file], tokenizer, config)
    in_files = ("no such image", "가.png", "is a folder", "longer than the model reads")
    late = [reason for _, reason in BAD if any(part in reason for part in in_files)]
    assert len(phrases.bad) == num_bad - len(late)

    out = tmp_path / "a.jsonl"
    command_line = [generate, "--model", folder, "--batch", bad_file, "-o", out]
    stopped = run(*command_line)
    assert stopped.status == 1 and stopped.err.count("\n") == 1
    assert f"{bad_file}: record 0 (id 'x'): https" in stopped.err
    assert f"(and {num_bad - 1} more); --bad-samples skip leaves such" in stopped.err
    done = run(*command_line, "--bad-samples", "skip", "--max-new-tokens", "2")
    assert done.status == 0, done.err
    assert f"{num_bad} bad records left out" in done.err
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [(row["index"], row["id"]) for row in rows] == [(num_bad, "good")]


def test_nothing_is_answered_if_a_record_is_bad(world, folder, tmp_path):
    file = write(tmp_path, world, record(id=1), record(id=2, kind=3))
    args = ["--model", folder, "--data", file, "--max-new-tokens", "1", "-o", tmp_path / "e.json"]
    with pytest.raises(ValueError, match=r"set.json: record 1 \(id 2\): kind is int"):
        command("answer", *args)
    assert not (tmp_path / "e.json").exists()
    assert not (tmp_path / "e.answers.jsonl").exists()

    text = command("answer", *args, "--bad-samples", "skip")
    assert "1 questions; tables in" in text
    with pytest.raises(ValueError, match="record 1"):
        command("likelihood", "--model", folder, "--data", file)


def test_a_broken_image_is_found_before_the_first_answer(world, folder, tmp_path):
    file = write(tmp_path, world, record(id=1), record(id=2, image="1.png"))
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[: len(content) // 2])
    args = ["--model", folder, "--data", file, "-o", tmp_path / "e.json"]
    with pytest.raises(ValueError, match=r"record 1 \(id 2\), turn 0: .*1.png: "):
        command("answer", *args)
    assert not (tmp_path / "e.answers.jsonl").exists()


@pytest.mark.parametrize(
    "question, reason",
    [
        ({"text": 3}, "the question is int"),
        ({"image": None}, "the image is NoneType"),
        ({"image": "https://example.org/0.png"}, "a URL?"),
        ({"question_id": []}, "id is list"),
        ({"label": ["no"]}, "the label is"),
    ],
)
def test_a_bad_line_of_pope_is_named(tmp_path, question, reason):
    good = {"question_id": 1, "image": "0.png", "text": "Is it?", "label": "no"}
    path = tmp_path / "pope.jsonl"
    path.write_text("\n".join(map(json.dumps, (good, good | question))), encoding="utf-8")
    bad = []
    assert len(read_file(path, bad=bad)) == 1
    assert f"{path}: record 1 (id " in bad[0] and reason in bad[0]


# ------------------------------------------------------------------------------------ what is read
SQUARE = [[["", "\nWhat?"], "a square"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "0.png", "conversations": talk(answer="a square")},
        {"images": "0.png", "conversations": talk(answer="a square")},
        {"images": ["0.png"], "conversations": talk(answer="a square")},
        {"image_path": "0.png", "conversations": talk("What? <image>", "a square")},
        {"image": "0.png", "images": ["0.png"], "conversations": talk(answer="a square")},
        {"image": "0.png", "video": None, "videos": [], "audio": "", **record()}
        | {"conversations": talk(answer="a square")},
        messages(("user", "<image>What?"), ("assistant", "a square"), images=["0.png"]),
        messages(("User", "<image>What?"), ("model", "a square"), image="0.png"),
        messages(
            ("user", [{"type": "image"}, {"type": "text", "text": "What?"}]),
            ("assistant", [{"type": "text", "text": "a square"}]),
            images=["0.png"],
        ),
        messages(
            ("user", [{"type": "text", "text": "What?"}, {"type": "image", "image": "0.png"}]),
            ("assistant", "a square"),
        ),
        messages(
            (
                "user",
                [{"type": "image_url", "image_url": {"url": "file://0.png"}}, {"text": "What?"}],
            ),
            ("assistant", "a square"),
        ),
        {
            "image": "0.png",
            "conversations": messages(("user", "<image>What?"), ("gpt", "a square"))["messages"],
        },
        {
            "image": "0.png",
            "conversations": [{"from": "gpt", "value": "Hi!"}, *talk(answer="a square")],
        },
    ],
)
def test_records_are_read_as_public_sets_write_them(fields):
    conversation = read_conversation(fields)
    assert conversation.turns == SQUARE
    assert conversation.images == ["0.png"]
    assert conversation.dropped == (fields.get("conversations", [{}])[0].get("value") == "Hi!")


def test_a_system_text_stands_before_the_first_question():
    pairs = ("system", "Be brief."), ("user", "<image>What?"), ("assistant", "red")
    expected = [[["", "\nBe brief.\n\nWhat?"], "red"]]
    assert read_conversation(messages(*pairs, images=["a"])).turns == expected
    assert (
        read_conversation(messages(*pairs[1:], images=["a"], system="Be brief.")).turns == expected
    )
    plain = messages(("system", "Be brief."), ("user", "What?"), ("assistant", "red"))
    assert read_conversation(plain).turns == [[["Be brief.\n\nWhat?"], "red"]]
    with pytest.raises(ValueError, match="message 1: from 'system', must be 'gpt'"):
        read_conversation(messages(("user", "What?"), ("system", "x"), ("assistant", "red")))


def test_markers_inside_code_are_text():
    question = 'Explain `<video>` and <img src="a.png">'
    conversation = read_conversation({"conversations": talk(question, "```\n<audio>\n```")})
    assert conversation.turns == [[[question], "```\n<audio>\n```"]]


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_a_record_without_a_language_has_that_of_its_script(
    world, tokenizer, config, tmp_path, ensure_ascii
):
    texts = [("What?", "red"), ("무슨 색?", "빨강"), ("什么颜色?", "红"), ("Say it.", "빨강")]
    records = [record(conversations=talk(IMAGE + q, a), language=None) for q, a in texts]
    records += [record(language="fr"), record(language="")]
    file = write(tmp_path, world)
    file.write_text(json.dumps(records, ensure_ascii=ensure_ascii), encoding="utf-8")
    dataset = data.ConversationDataset([file], tokenizer, config, 256)
    assert dataset.languages == [{"en": 2, "ko": 2, "zh": 1, "fr": 1}]
    assert [read_conversation(r).language for r in records] == ["en", "ko", "zh", "ko", "fr", "en"]
    assert [q.language for q in read_file(file)] == ["en", "ko", "zh", "ko", "fr", "en"]


def test_messages_train_to_the_same_ids_as_conversations(world, tokenizer, config, tmp_path):
    same = messages(("user", "<image>\nWhat?"), ("assistant", "red"), images=["0.png"])
    first = {"from": "gpt", "value": "Welcome!"}
    file = write(tmp_path, world, record(), same, record(conversations=[first, *talk()]))
    dataset = data.ConversationDataset([file], tokenizer, config, 256)
    samples = [dataset.sample(i) for i in range(3)]
    assert samples[0].ids == samples[1].ids == samples[2].ids
    assert samples[0].loss_mask == samples[1].loss_mask == samples[2].loss_mask
    assert (samples[0].pixels[0] == samples[1].pixels[0]).all()
    assert dataset.num_dropped == 1

    # Side by side in one sample, they are the same as well.
    together = data.ConversationDataset([file], tokenizer, config, 256, records_per_sample=2)
    assert sorted(len(together.sample(i).starts) for i in range(len(together))) == [1, 2]


def test_questions_without_answers_are_answered_and_nothing_to_train_on(folder, world, tmp_path):
    rows = [
        {"question_id": 7, "image": "0.png", "text": "What is it?", "category": "default"},
        {"question_id": 8, "text": "무슨 색?"},
        {"id": "c", "image": "0.png", "conversations": talk()[:1]},
        {"id": "d", "image": "0.png", "conversations": talk(answer="")},
        {"id": "e", "image": "0.png", "conversations": talk(answer=None)},
    ]
    file = write(tmp_path, world, *rows)
    out = tmp_path / "a.jsonl"
    done = run(
        *(generate, "--model", folder, "--batch", file, "-o", out),
        *("--max-new-tokens", "2"),
    )
    assert done.status == 0, done.err
    answered = [json.loads(line)["id"] for line in out.read_bytes().splitlines()]
    assert answered == [7, 8, "c", "d", "e"]

    write(tmp_path, world, *rows[:3])
    checked = run(data, "check", file, "--model", folder)
    assert checked.status == 1
    assert checked.out.endswith("set.json: questions without answers: nothing to train on\n")
    with pytest.raises(ValueError, match=r"record 0 \(id 7\): the last question has no answer"):
        read_file(file)

    # VQAv2's questions lie apart from their answers.
    write(tmp_path, world, {"questions": [{"question": "What?"}]})
    assert "questions without answers" in run(data, "check", file, "--model", folder).out


def test_questions_ask_for_the_image_first(world):
    question = {"image": "0.png", "text": "What is it?"}
    assert read_conversation(question, needs_answers=False).turns == [[["", "\nWhat is it?"], None]]


# ------------------------------------------------------------------------------------ files
def png():
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return file.getvalue()


GOOD = json.dumps([record()])
FILES = {
    "UTF-16": GOOD.encode("utf-16"),
    "text in UTF-16": GOOD.encode("utf-16-le"),
    "UTF-32": GOOD.encode("utf-32"),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
    "a web page": b"\n<!DOCTYPE html>\n<html>",
    "gzip": gzip.compress(GOOD.encode()),
    "zip": b"PK\x03\x04" + bytes(50),
    "Parquet": b"PAR1" + bytes(50),
    "Arrow": b"\xff\xff\xff\xff\x10\0\0\0",
    "an image": png(),
}
RECORD_FILES = {
    "one JSON object over several lines": json.dumps(record(), indent=1).encode(),
    "those in 'annotations'": json.dumps({"annotations": [record()]}, indent=1).encode(),
    r"a table \(CSV or TSV\)": b"id,image,text\n1,0.png,hi\n",
    "a web page, not the file": b"<!DOCTYPE html>\n<html>",
    "begins with '- id: 1'": b"- id: 1\n",
    "not JSON: .*: line 2": GOOD[1:-1].encode() + b"\n" + GOOD[1:40].encode(),
}


@pytest.mark.parametrize("what", [*FILES, *RECORD_FILES])
def test_a_file_of_another_format_is_named_for_what_it_is(what, tokenizer, tmp_path):
    path = tmp_path / "file"
    path.write_bytes((FILES | RECORD_FILES)[what])
    readers = [lambda: list(scan_records(path)), lambda: read_file(path)]
    if what in FILES:
        readers.append(lambda: TextDataset([path], tokenizer, 16, tmp_path / "cache"))
        readers += [lambda: list(read_lines([path])), lambda: read_json(path)]
    for read in readers:
        with pytest.raises(ValueError, match=f"file: .*{what}") as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b" \n", MARK])
def test_a_file_without_records_is_nothing_to_train_on(folder, tmp_path, content):
    (tmp_path / "set.json").write_bytes(content)
    done = run(data, "check", tmp_path / "set.json", "--model", folder)
    assert done.status == 1
    assert done.out.endswith("set.json: nothing to train on\n")


def test_a_byte_order_mark_is_no_letter_in_any_text_file(tokenizer, world, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(MARK + "고양이\n강아지\n".encode())
    assert list(read_lines([path])) == ["고양이\n", "강아지\n"]
    texts = TextDataset([path], tokenizer, 64, tmp_path / "cache")
    assert texts.sample(0).ids[1:-1] == tokenizer.encode("고양이")

    # Two files, put end to end
    path.write_bytes(path.read_bytes() * 2)
    assert list(read_lines([path])) == ["고양이\n", "강아지\n"] * 2
    line = json.dumps(record()).encode() + b"\n"
    path.write_bytes((MARK + line) * 2)
    assert read_records(path) == [record()] * 2

    path.write_bytes(MARK + b'{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes(MARK + b"cat = red\n")
    assert read_dictionary(path, tokenizer) == [[tokenizer.encode("cat"), tokenizer.encode("red")]]
    path.write_bytes(MARK + b'{"07": {"question": "What?", "imageId": "n1", "answer": "x"}}')
    assert [q.id for q in read_file(path)] == ["07"]


def test_a_word_list_with_a_byte_order_mark_is_merged_without_it(tokenizer_file, tmp_path):
    (tmp_path / "words.txt").write_bytes(MARK + "토끼풀\n강아지\n".encode())
    out = tmp_path / "out.model"
    words = ["merge", tokenizer_file, tmp_path / "words.txt", "-o", out, "--unreachable", "keep"]
    done = run(tokenizer_module, *words)
    assert done.status == 0, done.err
    pieces = [piece.text for piece in tokenizer_module.Tokenizer.load(out).pieces]
    assert "토끼풀" in pieces and "강아지" in pieces
    assert not any("\ufeff" in piece for piece in pieces)


# ------------------------------------------------------------------------------------ names
@pytest.mark.parametrize("disk, wanted", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_a_name_is_found_however_its_letters_are_composed(
    world, tokenizer, config, tmp_path, disk, wanted
):
    on_disk, named = (unicodedata.normalize(form, "그림") for form in (disk, wanted))
    (tmp_path / on_disk).mkdir()
    (tmp_path / on_disk / f"{on_disk}.png").write_bytes((world / "0.png").read_bytes())
    name = f"{named}/{named}.png"
    assert find_file(tmp_path / name).is_file()
    assert vision.load_image(tmp_path / name).size == (24, 20)

    file = tmp_path / "set.json"
    file.write_text(json.dumps([record(image=name)]), encoding="utf-8")
    assert len(data.ConversationDataset([file], tokenizer, config, 256).sample(0).pixels) == 1
    (question,) = read_questions([file], tokenizer, config)
    # One image has one name, whichever the file writes.
    assert question.image == "그림/그림.png" == unicodedata.normalize("NFC", question.image)
    answered = Question("set", 0, "en", "?", "?", "?", image=name)
    assert image_path({"data": [str(file)]}, answered).is_file()


def test_images_to_annotate_have_names_in_nfc(world, tmp_path):
    decomposed = unicodedata.normalize("NFD", "그림.png")
    images, objects = tmp_path / "images", tmp_path / "objects.json"
    images.mkdir()
    (images / decomposed).write_bytes((world / "0.png").read_bytes())
    for form in ("NFC", "NFD"):
        table = {unicodedata.normalize(form, "그림.png"): ["cat"]}
        objects.write_text(json.dumps(table), encoding="utf-8")
        (item,), refused, _ = find_images(images, read_objects(objects))
        assert (item.name, item.objects) == (unicodedata.normalize("NFC", "그림.png"), ("cat",))
        assert not refused


def test_two_files_of_one_name_are_not_taken_for_one(world, tmp_path):
    for form, image in (("NFC", "0.png"), ("NFD", "1.png")):
        name = unicodedata.normalize(form, "그림.png")
        (tmp_path / name).write_bytes((world / image).read_bytes())
    if len(list(tmp_path.iterdir())) == 1:
        pytest.skip("this disk takes the two for one name")
    items, refused, _ = find_images(tmp_path, {})
    assert len(items) == 1
    assert refused[0][0] == items[0].name and refused[0][1].startswith("two files have this name")


def test_a_name_that_is_not_utf8_can_be_written(tmp_path):
    write_json(tmp_path / "r.json", {"data": "\udced\udc95.json", "half": "\ud83d", "whole": "한"})
    content = (tmp_path / "r.json").read_bytes().decode("utf-8")
    assert json.loads(content) == {"data": "\udced\udc95.json", "half": "\ud83d", "whole": "한"}
    assert "한" in content


def test_long_and_unprintable_values_are_short_and_printable_in_messages():
    assert shorten("그림.png") == "그림.png"
    assert shorten("a\nb\0\ud83d") == "a\\nb\\x00\\ud83d"
    cut = shorten("x" * 9000, 60)
    assert len(cut) < 90 and cut.endswith("(9,000 characters)")


# ------------------------------------------------------------------------------------ printing
def test_results_are_written_before_they_are_printed(tmp_path, monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise UnicodeEncodeError("cp949", text, 0, 1, "no such character")

    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(UnicodeEncodeError):
        show_results({"conclusions": ["…"]}, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text("utf-8")) == {"conclusions": ["…"]}


@pytest.mark.parametrize("encoding", ["cp949", "ascii"])
def test_printing_never_fails(folder, world, tmp_path, encoding):
    talks = talk(IMAGE + "什么?")
    file = write(tmp_path, world, record(id="한", language="zh", conversations=talks))
    args = ["--data", file, "--model", folder, "--max-new-tokens", "2", "-o", tmp_path / "e.json"]
    done = run(evaluation.__main__, "answer", *args, encoding=encoding)
    assert done.status == 0, done.err
    assert "1 questions; tables in" in done.out
    assert (tmp_path / "e.json").is_file()
