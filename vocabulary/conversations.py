"""What a record may hold, in the ways in which public data sets write it.

    LLaVA      {"id", "image": file or files, "conversations": [{"from", "value"}, …]}
    messages   {"images": files, "messages": [{"role", "content": text or parts}, …]}
    question   {"question_id", "image", "text"}, without an answer

Whatever reads records calls `read_conversation`. It checks every field that anything uses, so what
is wrong with a record is known, by name, before work is done.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vocabulary.formats import shorten
from vocabulary.records import read_record, scan_records
from vocabulary.scripts import guess_language

# Marks the place of an image in a record's question. In a question typed by a user it is text.
IMAGE_TOKEN = "<image>"
UNANSWERED = "the last question has no answer"

ROLES = dict.fromkeys(("human", "user"), "human") | {"system": "system"}
ROLES |= dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "bing", "bot"), "gpt")

IMAGE_KEYS = ("image", "images", "image_path", "image_paths")
NAMED = "([_-]?(path|file|url|name|byte|base64|data)s?)?"
OTHER_MEDIA = re.compile(f"(video|audio|speech|sound|clip|point_?cloud)s?{NAMED}", re.I)
OTHER_IMAGES = re.compile(f"(image|img|picture|photo|pic)s?{NAMED}", re.I)
# What marks media in the data of other models: <video>, <img>, <|image_1|>, <ImageHere> …
OTHER_MARKERS = re.compile(
    r"<\|?/?(image|img|im|video|vid|audio|speech|sound|vision|point_?cloud)"
    r"[ _-]?(here|pad|patch|start|end|token|placeholder|context|soft_token|\d+)?\|?/?>",
    re.I,
)
CODE = re.compile("```.*?```|`[^`]*`", re.S)  # a text about HTML shows no video


class Conversation(NamedTuple):
    """A record, as every part of the project reads it."""

    turns: list  # [[parts of the question, answer], …], see data.encode_chat
    images: list  # file names, in NFC
    language: str
    kind: str
    skill: str
    dropped: bool  # it began with a turn of the model


def read_conversation(record: object, needs_answers: bool = True) -> Conversation:
    """ValueError, in one short line, says why a record can't be used. Without `needs_answers` an
    answer may be missing.

    As in LLaVA, a first turn of the model is left out. A system text is put before the first
    question."""
    if not isinstance(record, dict):
        raise ValueError(f"the record is {type(record).__name__}, must be an object")
    fields = (check_text(record, key) for key in ("language", "kind", "skill", "system"))
    language, kind, skill, system = fields
    system, _ = read_content(system)

    # The messages, as turns. What is wrong with one is said with its number.
    turns, names, dropped = [], [], False
    for i, (role, content) in enumerate(find_messages(record, needs_answers)):
        try:
            text, own_names = read_content("" if content is None and not needs_answers else content)
            names += own_names
            if role == "system" and not turns:
                system = f"{system}\n\n{text}".strip()
            elif role == "gpt" and not turns and not dropped:
                dropped = True
            else:
                add_message(turns, role, text, needs_answers)
        except ValueError as error:
            raise ValueError(f"message {i}: {error}") from None
    if not turns:
        raise ValueError("no question in it")
    if IMAGE_TOKEN in system:
        raise ValueError(f"{IMAGE_TOKEN} in the system text")
    if turns[-1][1] is None and needs_answers:
        raise ValueError(UNANSWERED)

    # As many markers as images; the model's prompt has no other place for an image.
    images, (question, answer) = read_images(record, names), turns[0]
    num_markers = sum(len(parts) - 1 for parts, _ in turns)
    if num_markers != len(images):
        raise ValueError(f"{num_markers} {IMAGE_TOKEN} marker(s) for {len(images)} image(s)")
    language = language or guess_language("".join(question) + (answer or ""))

    # Behind a single image, which comes first.
    if system and len(question) == 2:
        question[1] = f"\n{system}\n\n{question[1].strip()}".rstrip()
    elif system:
        question[0] = f"{system}\n\n{question[0]}"
    if not images and not "".join(question).strip():
        raise ValueError("the question is empty")

    # JSON can write half a surrogate pair, no file or tokenizer takes it.
    found = Conversation(turns, images, language, kind or "?", skill, dropped)
    try:
        json.dumps([found, record_id(record)], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{half} is half a character, which UTF-8 lacks") from None
    return found


def read_conversations(
    path: Path, bad: list, needs_answers: bool = True
) -> Iterator[tuple[int, dict, Conversation]]:
    """Yields (number, record, conversation) of a file's usable records. What is wrong with the
    others is appended to `bad`: file, record, id, reason."""
    for number, (start, end, record) in enumerate(scan_records(path)):
        try:
            record = read_record(path, start, end)
            yield number, record, read_conversation(record, needs_answers)
        except ValueError as error:
            bad.append(f"{record_name(path, number, record)}: {error}")


def leave_out(bad: list, policy: str) -> None:
    """ValueError with the first of these reasons; with --bad-samples skip prints and counts all."""
    if bad and policy != "skip":
        others = f" (and {len(bad) - 1:,} more)" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0]}{others}; --bad-samples skip leaves such records out")
    for reason in bad:
        print(f"left out: {reason}", file=sys.stderr)
    if bad:
        print(f"{len(bad):,} bad records left out", file=sys.stderr)


def record_name(path: Path, number: int | str, record: object) -> str:
    """How messages name a record."""
    found = record.get("id", record.get("question_id")) if isinstance(record, dict) else None
    return f"{path}: record {number} (id {shorten(repr(found), 60)})"


def record_id(record: dict) -> str | int | float | None:
    """A record's id. ValueError if it is neither a text nor a number."""
    found = record.get("id", record.get("question_id"))
    if isinstance(found, bool) or not isinstance(found, (str, int, float, type(None))):
        raise ValueError(f"id is {type(found).__name__}, must be a text or a number")
    return found


def check_text(record: dict, key: str) -> str:
    """The text of a field; "" if it is missing or null."""
    value = record.get(key)
    if not isinstance(value, (str, type(None))):
        raise ValueError(f"{key} is {type(value).__name__}, must be a text")
    return value or ""


# ------------------------------------------------------------------------------------ messages
def raw_messages(record: object) -> list[tuple]:
    """[(role, content), …] of a record, unchecked. role: "human", "gpt", "system", or as it is."""
    record = record if isinstance(record, dict) else {}
    messages = record.get("conversations") or record.get("messages")
    found, messages = [], messages if isinstance(messages, list) else []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, value = message.get("from") or message.get("role"), message.get("value")
        if isinstance(role, str):
            role = ROLES.get(role.casefold(), role)
        found.append((role, message.get("content") if value is None else value))
    return found


def begins_with_answer(messages: list[tuple]) -> bool:
    """Whether the first of `raw_messages`, a system text aside, is the model's."""
    return [role for role, _ in messages[:2] if role != "system"][:1] == ["gpt"]


def find_messages(record: dict, needs_answers: bool) -> list[tuple]:
    """[("human", "gpt" or "system", content), …]. ValueError if there are none."""
    messages = raw_messages(record)
    for i, (role, _) in enumerate(messages):
        if role not in ("human", "gpt", "system"):
            role = shorten(repr(role), 40)
            raise ValueError(f"message {i}: from {role}, must be 'human' or 'gpt'")
    if messages:
        return messages

    # A file of questions, or something else?
    question = record.get("text") or record.get("question")
    if isinstance(question, str) and not needs_answers:
        has_image = any(map(record.get, IMAGE_KEYS)) and IMAGE_TOKEN not in question
        return [("human", f"{IMAGE_TOKEN}\n{question}" if has_image else question)]
    has_answer = {"answer", "answers", "label"} & record.keys()
    if needs_answers and not has_answer and (isinstance(question, str) or "questions" in record):
        raise ValueError(UNANSWERED)
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise ValueError(f"no conversations in it; the list in {key!r} may be records")
    raise ValueError(f"no conversations in it (it has: {shorten(', '.join(record), 80)})")


def read_content(content: object) -> tuple[str, list]:
    """(text, names of images) of a message's content: a text, or a list of parts, {"type": "text",
    "text"} and {"type": "image", …}. Between parts is a line break, but none between images."""
    text, names = "", []
    parts = content if isinstance(content, list) else [{"text": content}]
    for number, part in enumerate(parts):
        part = part if isinstance(part, dict) else {}
        part_type = part.get("type", "text")
        is_image = part_type in ("image", "image_url")
        text += "\n" if number and not (is_image and text.endswith(IMAGE_TOKEN)) else ""
        if is_image:
            text += IMAGE_TOKEN
            name = next(filter(None, map(part.get, ("image", "image_url", "url", "path"))), None)
            name = name.get("url") if isinstance(name, dict) else name
            names += [name] if name else []
        elif part_type != "text":
            part_type = shorten(repr(part_type), 40)
            raise ValueError(f"a part of type {part_type}; only text and images are read")
        elif isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise ValueError("the value is not a text")

    # Other models' markers would be trained as text.
    marker = OTHER_MARKERS.search(CODE.sub("", text).replace(IMAGE_TOKEN, ""))
    if marker:
        raise ValueError(f"{marker[0]} in it; only images are read, their places are {IMAGE_TOKEN}")
    return text, names


def add_message(turns: list, role: str, text: str, needs_answers: bool) -> None:
    """Adds a question, or the answer to the last one."""
    expected = "gpt" if turns and turns[-1][1] is None else "human"
    if role != expected:
        raise ValueError(f"from {role!r}, must be {expected!r}")
    if role == "human":
        turns.append([split_question(text), None])
    elif IMAGE_TOKEN in text:
        raise ValueError(f"{IMAGE_TOKEN} in an answer")
    elif needs_answers and not text.strip():
        raise ValueError("the answer is empty")
    else:
        turns[-1][1] = text.strip()


def split_question(text: str) -> list[str]:
    """The parts of a question between its images: n + 1 strings for n images."""
    parts = text.split(IMAGE_TOKEN)
    if len(parts) == 2:
        # As in LLaVA-1.5 a single image comes first, wherever the file has it.
        text = "".join(parts).strip()
        parts = ["", "\n" + text if text else ""]
    parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
    return parts


# ------------------------------------------------------------------------------------ images
def without_images(turns: list) -> list:
    """The same turns as text alone, as a blind model gets them."""
    return [("".join(parts).strip(), answer) for parts, answer in turns]


def read_images(record: dict, names: list) -> list[str]:
    """The image files of a record, in order. names: those in its messages."""
    given = {key: value for key, value in record.items() if value not in (None, "", [])}
    found = {"a message": names} if names else {}
    for key in IMAGE_KEYS:
        if key in given:
            found[key] = given[key] if isinstance(given[key], list) else [given[key]]
    for key in sorted(given.keys() - IMAGE_KEYS):
        if OTHER_MEDIA.fullmatch(key) or (OTHER_IMAGES.fullmatch(key) and not found):
            raise ValueError(f"{shorten(key, 40)!r} is not read, only {', '.join(IMAGE_KEYS)}")

    # Two fields may say the same.
    (key, images), *others = found.items() or [("image", [])]
    for other, same in others:
        if same != images:
            raise ValueError(f"{key} and {other} name different images")
    return [check_name(name, key) for name in images]


def check_name(name: object, key: str) -> str:
    """The name of an image file, in NFC. ValueError if it is anything else."""
    if not isinstance(name, str) or not name:
        kind = "an empty text" if name == "" else type(name).__name__
        raise ValueError(f"{key} is {kind}, must be a file name or a list of them")
    name = name.removeprefix("file://")
    if name[:5].lower() == "data:" or len(name) > 1000:
        raise ValueError(f"{shorten(name, 60)}: base64? images are read from files")
    if re.match("[a-z][a-z0-9+.-]+:/", name, re.I):
        raise ValueError(f"{shorten(name, 60)}: a URL? images are read from files")
    return unicodedata.normalize("NFC", name)
