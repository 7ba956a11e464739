"""Questions about images, read from the files in which they are published.

LLaVA       JSON or JSON Lines: each turn is one question, after the references before it
POPE        JSON Lines of {"question_id", "image", "text", "label": "yes" or "no"}
GQA, xGQA   {id: {"question", "imageId", "answer", "types"}}; xGQA's answers are English
VQAv2       {"questions": […]}, and a file of annotations with ten answers each
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import data
from generate import question_parts
from vocabulary.command import first_few
from vocabulary.files import read_json
from vocabulary.records import read_records
from vocabulary.scripts import guess_language

XGQA_LANGUAGES = "en|ko|zh|de|pt|ru|id|bn"


@dataclass
class Question:
    """A question with its reference, its prompt and, later, the model's answers."""

    split: str  # the file's name
    id: str | int  # of the record
    language: str
    kind: str  # of one skill or more
    question: str
    truth: str | list  # the reference answer; VQAv2: ten
    skill: str = ""  # default: the kind
    metric: str = "exact"  # exact, caption, pope or vqa, see metrics.score_answer
    image: str | list | None = None  # as the record has it
    turn: int = 0  # of the record

    full: str | None = None  # the model's answer
    blind: str | None = None  # without the image

    turns: list = field(default_factory=list)  # for data.encode_chat; the last answer is None
    image_paths: list = field(default_factory=list)
    prompt: list = field(default_factory=list)  # token ids
    blind_prompt: list = field(default_factory=list)

    def __post_init__(self):
        self.skill = self.skill or self.kind


def question_name(question):
    """What identifies a question in answer files."""
    parts = [getattr(question, key) for key in "split id image turn question".split()]
    return json.dumps(parts, ensure_ascii=False)


def reference_answer(question):
    """The reference; of ten answers the most frequent."""
    truth = question.truth
    return truth if isinstance(truth, str) else Counter(truth).most_common(1)[0][0]


def read_file(path, images=None, annotations=None):
    """The questions of one file, not yet encoded. ValueError with file, record and reason."""
    path = Path(path)
    folder = Path(images) if images else path.parent
    content = read_object(path)
    try:
        # VQAv2 and GQA are one object, POPE and LLaVA are records.
        if isinstance(content.get("questions"), list):
            found = read_vqa(path, content, annotations)
            return [public_question(path, folder, *fields) for fields in found]
        if content and all(isinstance(q, dict) and "imageId" in q for q in content.values()):
            return [public_question(path, folder, *fields) for fields in read_gqa(content)]

        questions = []
        for number, record in enumerate(read_records(path)):
            if {"text", "label", "image"} <= record.keys():
                questions.append(public_question(path, folder, *read_pope(path, number, record)))
            else:
                questions += read_conversation(path, number, record, folder)
        return questions
    except KeyError as error:
        raise ValueError(f"{path}: a question has no {error}") from None


def read_object(path):
    """A file's JSON object; {} if it is anything else."""
    # Large lists of records are not parsed here.
    content = path.read_bytes() if path.is_file() else b""
    try:
        return json.loads(content) if content.lstrip()[:1] == b"{" else {}
    except ValueError:
        return {}


def public_question(path, folder, image, text, *fields):
    """A question of one turn and image. fields: id, kind, truth, metric."""
    number, kind, truth, metric = fields

    # The file's or its folder's name has the language (xgqa/ko/…, …_ko.json), or the script.
    named = re.findall(rf"(?<![a-z])({XGQA_LANGUAGES})(?=[/._-])", "/".join(path.parts[-2:]))
    language = named[-1] if named else guess_language(text)
    question = Question(path.stem, number, language, kind, text, truth, kind, metric, image)
    question.turns = [(question_parts(text, 1), None)]
    question.image_paths = [str(folder / image)]
    return question


def read_vqa(path, content, annotations):
    """VQAv2: yields the arguments of public_question from image on."""
    if not annotations:
        raise ValueError(f"{path}: VQA questions need --annotations, the file of their answers")
    answers = read_json(annotations)
    if not isinstance(answers, dict) or "annotations" not in answers:
        raise ValueError(f"{annotations}: no annotations in it")

    answers = {answer["question_id"]: answer for answer in answers["annotations"]}
    missing = sum(question["question_id"] not in answers for question in content["questions"])
    if missing:
        raise ValueError(f"{annotations}: no annotation for {missing:,} of the questions")

    for question in content["questions"]:
        image = f"COCO_{content['data_subtype']}_{question['image_id']:012}.jpg"
        answer = answers[question["question_id"]]
        truth = [one["answer"] for one in answer["answers"]]
        kind, number = answer["answer_type"], answer["question_id"]
        yield image, question["question"], number, kind, truth, "vqa"


def read_gqa(content):
    """GQA and xGQA: the same."""
    for number, question in content.items():
        kind = question.get("types", {}).get("structural", "?")
        image, truth = f"{question['imageId']}.jpg", question["answer"]
        yield image, question["question"], number, kind, truth, "exact"


def read_pope(path, number, record):
    """A line of POPE: the same."""
    label = record["label"]
    if label not in ("yes", "no"):
        raise ValueError(f"{path}: record {number}: the label is {label!r}, must be yes or no")
    return record["image"], record["text"], record["question_id"], "yes_no", label, "pope"


def read_conversation(path, number, record, folder):
    """The turns of a LLaVA record."""
    try:
        turns, names = data.read_turns(record), data.image_files(record)
        num_tokens = sum(len(parts) - 1 for parts, _ in turns)
        if num_tokens != len(names):
            raise ValueError(f"{num_tokens} {data.IMAGE_TOKEN} token(s) for {len(names)} image(s)")
    except ValueError as error:
        raise ValueError(f"{path}: record {number} (id {record.get('id')!r}): {error}") from None

    keys = {"id", "image", "language", "kind", "skill"} & record.keys()
    fields = {"id": number, "language": "?", "kind": "?"} | {key: record[key] for key in keys}
    fields["metric"] = "caption" if fields["kind"] == "caption" else "exact"
    fields["image_paths"] = [str(folder / name) for name in names]
    questions = []
    for turn, (parts, answer) in enumerate(turns):
        fields |= {"turn": turn, "question": parts[-1].strip(), "truth": answer}
        questions.append(Question(path.stem, **fields, turns=[*turns[:turn], (parts, None)]))
    return questions


def read_questions(paths, tokenizer, config, images=None, annotations=None, suffix=""):
    """The questions of all files with their prompts. suffix: a line appended to each question.
    ValueError if an image is missing, a prompt is too long, or two questions have one name."""
    questions, named = [], {}
    for question in (q for path in paths for q in read_file(path, images, annotations)):
        encode_question(question, tokenizer, config.vision.num_patches, suffix)

        # What can't be answered is refused before the model answers anything.
        where = f"{question.split}: question {question.id!r}, turn {question.turn}"
        limit = config.text.max_position_embeddings
        if len(question.prompt) >= limit:
            raise ValueError(f"{where}: {len(question.prompt)} tokens, the model reads {limit}")
        for image in question.image_paths:
            if not Path(image).is_file():
                raise ValueError(f"{where}: {image}: no such image (--images names the folder)")

        # Answers are kept by the question's name.
        content = question.prompt, question.image_paths
        if named.setdefault(question_name(question), content) != content:
            raise ValueError(f"{where}: another question has the same name; evaluate it apart")
        questions.append(question)
    if not questions:
        raise ValueError(f"{first_few(paths)}: no questions")
    return questions


def encode_question(question, tokenizer, num_patches, suffix=""):
    """Sets the prompt, and the blind prompt: the same turns without images."""
    turns = [([parts] if isinstance(parts, str) else parts, a) for parts, a in question.turns]
    if suffix:
        *parts, last = turns[-1][0]
        turns[-1] = [*parts, f"{last}\n{suffix}"], None
    blind_turns = [("".join(parts).strip(), answer) for parts, answer in turns]

    # Later turns may show further images of the record.
    question.image_paths = question.image_paths[: sum(len(parts) - 1 for parts, _ in turns)]
    question.prompt, _ = data.encode_chat(turns, tokenizer, num_patches)
    question.blind_prompt, _ = data.encode_chat(blind_turns, tokenizer, num_patches)
