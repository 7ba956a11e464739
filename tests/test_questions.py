"""Files of questions as other people write them; what is wrong with one is named."""

import json
import os
import shutil
from pathlib import Path

import pytest

from evaluation.metrics import score_answer
from evaluation.questions import read_file, read_questions, reference_answer

DATA = Path(os.environ.get("XLLAVA_DATA", "/nowhere"))


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def llava_record(**fields):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "cat"}]
    return {"id": "x", "image": "a.png", "conversations": turns} | fields


def vqa_files(folder):
    """A file with one VQAv2 question, and its annotations."""
    question = {"question_id": 5, "image_id": 42, "question": "What is it?"}
    content = {"data_subtype": "val2014", "questions": [question]}
    answer = {"question_id": 5, "answer_type": "other", "answers": [{"answer": "cat"}] * 10}
    return (
        write(folder / "vqa.json", content),
        write(folder / "ten.json", {"annotations": [answer]}),
    )


def test_a_pope_file_is_read_as_it_is(tmp_path):
    lines = [
        {"question_id": 1, "image": "v/a.jpg", "text": "Is there a cat?", "label": "no"},
        {"question_id": 2, "image": "v/a.jpg", "text": "개가 있나요?", "label": "yes"},
    ]
    path = tmp_path / "pope.json"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")

    no, yes = read_file(path)
    assert (no.truth, no.metric, no.kind, no.skill) == ("no", "pope", "yes_no", "yes_no")
    assert (no.language, no.split, no.id, no.turn) == ("en", "pope", 1, 0)
    assert (no.image, no.image_paths) == ("v/a.jpg", [str(tmp_path / "v/a.jpg")])
    assert (yes.truth, yes.language) == ("yes", "ko")


def test_a_gqa_file_is_read_as_it_is_and_its_name_says_the_language(tmp_path):
    question = {"question": "무슨 색입니까?", "imageId": "n1", "answer": "red"}
    query = question | {"types": {"structural": "query"}}
    path = write(tmp_path / "questions_ko.json", {"07": query})

    (gqa,) = read_file(path, images="pics")
    assert (gqa.id, gqa.language, gqa.image, gqa.kind) == ("07", "ko", "n1.jpg", "query")
    assert gqa.image_paths == [str(Path("pics/n1.jpg"))]

    (named,) = read_file(write(tmp_path / "questions_de.json", {"1": question}))
    assert (named.language, named.kind, named.metric) == ("de", "?", "exact")
    (unnamed,) = read_file(write(tmp_path / "questions.json", {"1": question}))
    assert unnamed.language == "ko", "without a language in the name, the script says it"
    (chinese,) = read_file(write(tmp_path / "q.json", {"1": question | {"question": "什么颜色?"}}))
    assert chinese.language == "zh"


def test_a_vqa_file_is_read_with_its_annotations(tmp_path):
    path, annotations = vqa_files(tmp_path)
    (vqa,) = read_file(path, annotations=annotations)
    assert vqa.image == "COCO_val2014_000000000042.jpg" and vqa.kind == "other"
    assert vqa.truth == ["cat"] * 10 and score_answer(vqa, "cat") == {"accuracy": 1}
    vqa.truth = ["dog"] * 4 + ["cat"] * 6
    assert reference_answer(vqa) == "cat"


def test_vqa_without_its_annotations_is_refused(tmp_path):
    path, annotations = vqa_files(tmp_path)
    with pytest.raises(ValueError, match="need --annotations"):
        read_file(path)
    for text, message in (
        ('{"questions": []}', "ten.json: no annotations in it"),
        ('{"annot', "ten.json: not JSON: "),
        ('{"annotations": []}', "no annotation for 1 of the questions"),
    ):
        annotations.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_file(path, annotations=annotations)


def test_a_broken_pope_record_is_named(tmp_path):
    question = {"question_id": 1, "image": "a.jpg", "text": "고양이가 있나요?", "label": "아니요"}
    path = write(tmp_path / "pope.json", question)
    with pytest.raises(
        ValueError, match=r"record 0 \(id 1\): the label is '아니요', must be yes or no"
    ):
        read_file(path)
    write(path, {"image": "a.jpg", "text": "Is there a cat?", "label": "no"})
    with pytest.raises(ValueError, match="a question has no 'question_id'"):
        read_file(path)


def test_each_turn_of_a_conversation_is_a_question_after_the_references_before_it(tmp_path):
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "Colour?"},
        {"from": "gpt", "value": "red"},
    ]
    record = llava_record(conversations=turns, language="en", kind="object", skill="what")
    first, second = read_file(write(tmp_path / "a.json", [record]))
    assert [(q.turn, q.question, q.truth) for q in (first, second)] == [
        (0, "What?", "a cat"),
        (1, "Colour?", "red"),
    ]
    assert second.turns == [[["", "\nWhat?"], "a cat"], (["Colour?"], None)]
    assert (first.language, first.kind, first.skill, first.metric) == (
        "en",
        "object",
        "what",
        "exact",
    )
    turns[0]["value"] = "First: <image> Second: <image> Which?"
    record = llava_record(conversations=turns[:2], image=["a.png", "b.png"])
    (several,) = read_file(write(tmp_path / "c.json", [record]))
    assert several.question == turns[0]["value"]
    (caption,) = read_file(write(tmp_path / "b.json", [llava_record(kind="caption")]))
    assert (caption.language, caption.skill, caption.metric) == ("en", "caption", "caption")


def test_prompts_end_where_the_answer_begins_and_blind_ones_have_no_image(
    tmp_path, world, tokenizer, config
):
    shutil.copy(world / "0.png", tmp_path / "a.png")
    path = write(tmp_path / "a.json", [llava_record()])
    (question,) = read_questions([path], tokenizer, config, suffix="One word.")
    num_patches = config.vision.num_patches
    assert question.prompt.count(config.image_token_id) == num_patches
    assert tokenizer.decode(question.prompt).endswith("What?\nOne word. ASSISTANT:")
    assert tokenizer.decode(question.blind_prompt) == "USER: What?\nOne word. ASSISTANT:"
    assert question.image_paths == [str(tmp_path / "a.png")]


def test_a_missing_image_and_a_broken_record_are_named(tmp_path, tokenizer, config):
    path = write(tmp_path / "a.json", [llava_record(image="gone.png")])
    with pytest.raises(
        ValueError, match=r"a.json: record 0 \(id 'x'\), turn 0: .*gone.png: no such image"
    ):
        read_questions([path], tokenizer, config)
    write(path, [llava_record(image=["a.png", "b.png"])])
    message = r"record 0 \(id 'x'\): 1 <image> marker\(s\) for 2 image\(s\)"
    with pytest.raises(ValueError, match=message):
        read_questions([path], tokenizer, config)


def test_a_language_without_a_yes_and_three_answers_are_refused(tmp_path):
    question = {"question_id": 1, "image": "a.jpg", "text": "Kedi var mı?", "label": "no"}
    with pytest.raises(ValueError, match="are read in en ko zh, not in tr"):
        read_file(write(tmp_path / "pope_tr.json", question))
    path, annotations = vqa_files(tmp_path)
    few = json.loads(annotations.read_text(encoding="utf-8"))
    del few["annotations"][0]["answers"][3:]
    with pytest.raises(ValueError, match="3 answers, VQAv2 has ten"):
        read_file(path, annotations=write(annotations, few))


def test_a_question_that_is_there_twice_is_asked_once(tmp_path, world, tokenizer, config, capsys):
    record = llava_record(id="x", image=None)
    record["conversations"][0]["value"] = "What?"
    paths = [write(tmp_path / "s.json", [record, record])]
    (question,) = read_questions(paths, tokenizer, config)
    assert question.question == "What?" and "1 questions are there more" in capsys.readouterr().out
    record["conversations"][1]["value"] += "!"
    (tmp_path / "other").mkdir()
    paths += [write(tmp_path / "other" / "s.json", [record])]
    with pytest.raises(ValueError, match="another question has the same name"):
        read_questions(paths, tokenizer, config)


def test_different_questions_of_one_name_are_refused(tmp_path, world, tokenizer, config):
    for name in ("one", "other"):  # which answer would be whose?
        (tmp_path / name).mkdir()
        shutil.copy(world / "0.png", tmp_path / name / "a.png")
        write(tmp_path / name / "s.json", [llava_record()])
    one, other = tmp_path / "one/s.json", tmp_path / "other/s.json"
    message = r"other/s.json: record 0 \(id 'x'\), turn 0: another question has the same name"
    with pytest.raises(ValueError, match=message):
        read_questions([one, other], tokenizer, config)
    assert len(read_questions([one, one], tokenizer, config)) == 1


@pytest.mark.skipif(
    not (DATA / "eval/xgqa").is_dir(), reason="set XLLAVA_DATA to a folder with eval/xgqa"
)
def test_the_real_xgqa_questions_are_read_in_three_languages():
    found = {
        language: read_file(DATA / f"eval/xgqa/{language}/train_10.json")
        for language in ("en", "ko", "zh")
    }
    for language, questions in found.items():
        assert {question.language for question in questions} == {language}
        assert len(questions) == 317
    assert len({question.image for question in found["ko"]}) == 10
    assert [q.truth for q in found["ko"]] == [q.truth for q in found["en"]], (
        "the answers of xGQA are English in every language"
    )
    first = found["ko"][0]
    assert first.question == "차들이 어떻게 보입니까, 빽빽하거나 드뭅니까?"
    assert first.truth == "dense" and score_answer(first, "Dense.")["accuracy"] == 1
