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

from tqdm import tqdm

import data
import vision
from evaluation.metrics import NEGATIONS
from generate import question_parts
from vocabulary.command import first_few
from vocabulary.conversations import (
    IMAGE_TOKEN,
    check_name,
    leave_out,
    read_conversation,
    record_id,
    record_name,
    without_images,
)
from vocabulary.files import read_json
from vocabulary.formats import open_text, shorten
from vocabulary.records import read_record, scan_records
from vocabulary.scripts import guess_language

# Codes that a file's or a folder's name may have: xGQA's, and some more
CODES = "en|ko|zh|de|pt|ru|id|bn|ar|es|fr|ja|sw|tr"


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
    blind_paths: list = field(default_factory=list)  # of the images that the blind model gets
    where: str = ""  # file, record and id, for messages

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


def earlier_turns(question, questions):
    """The questions before this one in its record."""
    record = [q for q in questions if (q.split, q.id) == (question.split, question.id)]
    return sorted((q for q in record if q.turn < question.turn), key=lambda q: q.turn)


def image_names(question):
    """The names of its images."""
    images = question.image if isinstance(question.image, list) else [question.image]
    return [name for name in images if name]


def read_file(path, images=None, annotations=None, bad=None):
    """The questions of one file, not yet encoded. What is wrong with a record is appended to the
    list `bad`: file, record, id, reason. Without one it is a ValueError."""
    path, reasons, questions = Path(path), [] if bad is None else bad, []
    folder = Path(images) if images else path.parent
    for where, read, *fields in find_entries(path, annotations):
        try:
            new = read(path, *fields)
        except KeyError as error:
            reasons.append(f"{where}: a question has no {error}")
            continue
        except (ValueError, TypeError, AttributeError) as error:  # not as it is published
            reasons.append(f"{where}: {error}")
            continue
        for question in new:
            question.where = where
            question.image_paths = [str(folder / name) for name in question.image_paths]
        questions += new
    if bad is None and reasons:
        raise ValueError(reasons[0])
    return questions


def find_entries(path, annotations):
    """Yields (where, the function that reads it, its arguments) for each entry of a file."""
    # VQAv2 and GQA are one object, POPE and LLaVA are records.
    content = read_object(path)
    if isinstance(content.get("questions"), list):
        answers = read_annotations(path, content, annotations)
        for number, question in enumerate(content["questions"]):
            yield f"{path}: question {number}", read_vqa, content, answers, question
    elif content and all(isinstance(q, dict) and "imageId" in q for q in content.values()):
        for number, question in content.items():
            yield f"{path}: question {shorten(number)}", read_gqa, number, question
    else:
        for number, (start, end, record) in enumerate(scan_records(path)):
            yield record_name(path, number, record), read_turns, number, start, end


def read_object(path):
    """A file's JSON object; {} if it is anything else."""
    # Large lists of records are not parsed here.
    with open_text(path) as file:
        content = file.read()
    try:
        return json.loads(content) if content.lstrip()[:1] == b"{" else {}
    except (ValueError, RecursionError):
        return {}


def public_question(path, image, text, number, kind, truth, metric):
    """A question of one turn and image, in a list."""
    for name, value in (("question", text), ("answer", truth), ("image", image), ("kind", kind)):
        texts = value if name == "answer" and isinstance(value, list) and value else [value]
        if not all(isinstance(one, str) for one in texts):
            raise ValueError(f"the {name} is {type(value).__name__}, must be a text")
    record_id({"id": number})

    # The file's or its folder's name has the language (xgqa/ko/…, …_ko.json), or the script.
    named = re.findall(rf"(?<![a-z])({CODES})(?=[/._-])", "/".join(path.parts[-2:]))
    language = named[-1] if named else guess_language(text)
    image = check_name(image, "image")
    question = Question(path.stem, number, language, kind, text, truth, kind, metric, image)
    question.turns = [(question_parts(text, 1), None)]
    question.image_paths = [image]
    return [question]


def read_annotations(path, content, annotations):
    """{question_id: entry} of VQAv2's annotations."""
    if not annotations:
        raise ValueError(f"{path}: VQA questions need --annotations, the file of their answers")
    found = read_json(annotations)
    if not isinstance(found, dict) or "annotations" not in found:
        raise ValueError(f"{annotations}: no annotations in it")
    try:
        answers = {answer["question_id"]: answer for answer in found["annotations"]}
        missing = sum(question["question_id"] not in answers for question in content["questions"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{annotations}: not as VQAv2 publishes them ({error})") from None
    if missing:
        raise ValueError(f"{annotations}: no annotation for {missing:,} of the questions")
    return answers


def read_vqa(path, content, answers, question):
    answer = answers[question["question_id"]]
    truth = [one["answer"] for one in answer["answers"]]
    if len(truth) < 4:  # three others must agree with an annotator
        raise ValueError(f"{len(truth)} answers, VQAv2 has ten: below four none can be right")
    image = f"COCO_{content['data_subtype']}_{question['image_id']:012}.jpg"
    fields = answer["question_id"], answer["answer_type"], truth
    return public_question(path, image, question["question"], *fields, "vqa")


def read_gqa(path, number, question):
    kind = question.get("types", {}).get("structural", "?")
    image, truth = f"{question['imageId']}.jpg", question["answer"]
    return public_question(path, image, question["question"], number, kind, truth, "exact")


def read_turns(path, number, start, end):
    """The questions of a record: a line of POPE, or LLaVA's turns."""
    record = read_record(path, start, end)
    if isinstance(record, dict) and {"text", "label", "image"} <= record.keys():
        label = record["label"]
        if label not in ("yes", "no"):
            raise ValueError(f"the label is {shorten(repr(label))}, must be yes or no")
        fields = record["text"], record["question_id"], "yes_no", label, "pope"
        questions = public_question(path, record["image"], *fields)
        if (language := questions[0].language) not in ("en", *NEGATIONS):
            raise ValueError(f"POPE's yes and no are read in en ko zh, not in {language}")
        return questions

    conversation, questions = read_conversation(record), []
    names, kind = conversation.images, conversation.kind
    fields = {
        "id": number if record_id(record) is None else record_id(record),
        "image": names[0] if len(names) == 1 else names or None,
        "language": conversation.language,
        "kind": kind,
        "skill": conversation.skill,
        "metric": "caption" if kind == "caption" else "exact",
    }
    for turn, (parts, answer) in enumerate(conversation.turns):
        # A single image comes first, of several the text says which is where.
        text = IMAGE_TOKEN.join(parts) if len(parts) > 2 else parts[-1]
        fields |= {"turn": turn, "question": text.strip(), "truth": answer}
        turns = [*conversation.turns[:turn], (parts, None)]
        questions.append(Question(path.stem, **fields, turns=turns, image_paths=names))
    return questions


def read_questions(
    paths, tokenizer, config, suffix="", bad_samples="error", with_reference=False, **files
):
    """The questions of all files with their prompts. suffix: a line appended to each question.
    files: images and annotations, as `read_file` takes them. with_reference: the model must be able
    to read the answer, too.

    ValueError, before the model answers anything, if there are none, or one can't be asked and
    bad_samples is not "skip"."""
    questions, bad, named, image_faults, repeated = [], [], {}, {}, 0
    found = [q for path in paths for q in read_file(path, bad=bad, **files)]
    for question in tqdm(found, desc="checking", unit="question", leave=False, disable=None):
        try:
            encode_question(question, tokenizer, config.vision.num_patches, suffix)
            # A token for the answer, or all of it.
            answer = tokenizer.encode(reference_answer(question)) if with_reference else []
            data.check_length([*question.prompt, *answer, None], config)
            check_images(question, image_faults)

            # Answers are kept by the question's name.
            content = question.prompt, question.image_paths, question.truth
            name = question_name(question)
            if named.setdefault(name, content) is content:
                questions.append(question)
            elif named[name] == content:
                repeated += 1
            else:
                raise ValueError("another question has the same name; evaluate it apart")
        except ValueError as error:
            bad.append(f"{question.where}, turn {question.turn}: {error}")
    leave_out(bad, bad_samples)
    if repeated:
        print(f"{repeated:,} questions are there more than once; each is asked once")
    if not questions:
        raise ValueError(f"{first_few(paths)}: no questions")
    return questions


def check_images(question, faults):
    """ValueError if an image can't be read. faults: {path: what is wrong with it, or None}."""
    for image in question.image_paths:
        if image not in faults:
            faults[image] = None
            try:
                vision.load_image(image)
            except ValueError as error:
                faults[image] = f"{error} (--images names the folder)"
        if faults[image]:
            raise ValueError(faults[image])


def encode_question(question, tokenizer, num_patches, suffix=""):
    """Sets the prompt, and the blind prompt: the same turns without images."""
    turns = [([parts] if isinstance(parts, str) else parts, a) for parts, a in question.turns]
    if suffix:
        *parts, last = turns[-1][0]
        turns[-1] = [*parts, f"{last}\n{suffix}"], None

    # Later turns may show further images of the record.
    question.image_paths = question.image_paths[: sum(len(parts) - 1 for parts, _ in turns)]
    question.prompt, _ = data.encode_chat(turns, tokenizer, num_patches)
    question.blind_prompt, _ = data.encode_chat(without_images(turns), tokenizer, num_patches)
