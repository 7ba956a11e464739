"""OpenAI's chat-completions request -> what the model is asked. A ValueError is an error 400.

Images come as data URLs only: other URLs are refused, so nobody can make the server fetch one. Our
own field `details` asks for a `token` in each chunk of a stream (answers.py).
"""

import base64
import re
from typing import NamedTuple

from vocabulary.conversations import read_conversation
from vocabulary.formats import shorten

READ = set(
    "model messages stream stream_options max_tokens max_completion_tokens temperature top_p seed "
    "stop details user metadata store".split()
)
HARMLESS = (None, False, 0, "", [], {}, {"type": "text"})  # values of what is not read
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,([^,]*)", re.ASCII)
LESS_THAN = "\x02"  # stands for "<" while messages are read: a typed "<image>" is text


class Request(NamedTuple):
    """A question to a stage."""

    stage: str
    turns: list  # see data.encode_chat
    images: list  # files, as bytes
    options: dict  # of generate.generate
    seed: int | None  # None: other draws each time
    stop: list  # texts that end the answer
    details: bool


def read_request(body, default_stage):
    """The Request in a body. What the model can't do is refused by name."""
    asked = [name for name in body if name not in READ and body[name] not in HARMLESS]
    unknown = [name for name in asked if (name, body[name]) != ("n", 1)]
    if unknown:
        raise ValueError(f"{shorten(', '.join(unknown))}: not supported")
    stop = body.get("stop") or []
    stop = stop if isinstance(stop, list) else [stop]
    if len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise ValueError("stop must be a text, or up to 4 of them")

    limit = "max_completion_tokens" if body.get("max_tokens") is None else "max_tokens"
    options = {
        "max_new_tokens": number(body, limit, 128, 1, 10**9, int),
        "temperature": number(body, "temperature", 0.0, 0, 100),
        "top_p": number(body, "top_p", 1.0, 0, 1),
    }
    seed = number(body, "seed", None, -(2**63), 2**63 - 1, int)
    turns, images = read_messages(body.get("messages"))
    details = body.get("details") is True
    return Request(body.get("model") or default_stage, turns, images, options, seed, stop, details)


def number(body, name, default, least, most, kind=(int, float)):
    """A number of the body; `default` if it is missing or null."""
    value = default if body.get(name) is None else body[name]
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if value is not None and not (is_number and least <= value <= most):
        raise ValueError(f"{name} is {shorten(repr(value), 40)}, must be from {least} to {most}")
    return value


def read_messages(messages):
    """(turns, images): messages are read as those of a training record are."""
    record, images = {"messages": []}, []
    for message in messages if isinstance(messages, list) else []:
        message = message if isinstance(message, dict) else {}
        parts = message.get("content")
        parts = parts if isinstance(parts, list) else [{"type": "text", "text": parts}]
        parts = [read_part(part, images) for part in parts]
        record["messages"].append({"role": message.get("role"), "content": parts})

    turns = read_conversation(record, needs_answers=False).turns
    if turns[-1][1] is not None:
        raise ValueError("the last message must be the user's")
    for turn in turns:
        turn[0] = [text.replace(LESS_THAN, "<") for text in turn[0]]
        turn[1] = turn[1] and turn[1].replace(LESS_THAN, "<")
    return turns, images


def read_part(part, images):
    """A part of a message, as a record has it. The bytes of an image are added to `images`."""
    part = part if isinstance(part, dict) else {}
    if isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"].replace("<", LESS_THAN)}
    if part.get("type") != "image_url":
        return part

    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    found = DATA_URL.fullmatch(url) if isinstance(url, str) else None
    if not found:
        given = shorten(repr(url), 30)
        raise ValueError(f"image_url is {given}, must be data:image/…;base64,…: nothing is fetched")
    try:
        images.append(base64.b64decode(found[1], validate=True))
    except ValueError:
        raise ValueError("image_url: its base64 is broken") from None
    return {"type": "image", "image": f"image {len(images)}"}
