"""The requests to the model; prompts.json holds their words.

All languages of an image and kind come from one request, so that they say the same."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from annotation.filters import LANGUAGES, parse_pairs, parse_verdicts
from evaluation.client import Request, strict_object
from vocabulary.files import read_json

PROMPTS = read_json(Path(__file__).with_name("prompts.json"))
SYSTEM = "\n".join(PROMPTS["system"])
KINDS = PROMPTS["kinds"]
VERIFY = "\n".join(PROMPTS["verify"])


@dataclass(frozen=True)
class Item:
    """An image and a kind: what one request is about."""

    name: str  # of the file, below the folder
    path: Path  # with links resolved
    sha: str  # of the file's bytes: a renamed image is not paid for again
    kind: str = ""
    objects: tuple = ()  # names of its main objects, if they are known


def digest(*texts):
    """A short hash of texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def make_request(item, args, system, user, parse, properties):
    """A request about an image. Its words are part of the journal's key: who edits a prompt asks
    something new. The reply must be a JSON object of `properties`, lists of objects."""
    # A server that enforces the schema can't reply with anything else.
    lists = {
        name: {"type": "array", "items": strict_object(entry)} for name, entry in properties.items()
    }
    return Request(
        key=f"{item.sha} {item.kind} {digest(system, user)} {args.model}",
        name=item.name,
        system=system,
        user=user,
        parse=parse,
        schema=strict_object(lists),
    )


def generation_request(item, args):
    """The request for an item's question-answer pairs, in all languages."""
    # Shown as an example too, for servers that don't enforce a schema.
    pair = {"question": "…", "answer": "…"}
    shape = json.dumps({code: [pair] for code in args.languages}, ensure_ascii=False)
    names = ", ".join(f"{LANGUAGES[code]} ({code})" for code in args.languages)
    system = SYSTEM.format(languages=names, shape=shape)
    user = KINDS[item.kind]
    if item.objects:
        user += PROMPTS["objects"].format(names=", ".join(item.objects))

    def parse(reply):
        return parse_pairs(reply, args.languages)

    text = {"type": "string"}
    properties = dict.fromkeys(args.languages, {"question": text, "answer": text})
    return make_request(item, args, system, user, parse, properties)


def verification_request(item, args, pairs, numbers):
    """The request for a second look at some of an item's pairs."""
    listed = []
    # Numbered anew from 0, so that the model's numbers do not depend on what was rejected.
    for n, number in enumerate(numbers):
        listed.append({"pair": n})
        for code, said in pairs.items():
            question, answer = said[number]
            listed[n][code] = {"question": question, "answer": answer}
    user = json.dumps(listed, ensure_ascii=False)

    def parse(reply):
        return parse_verdicts(reply, len(listed))

    verdict = {"pair": {"type": "integer"}, "confirmed": {"type": "boolean"}}
    return make_request(item, args, VERIFY, user, parse, {"pairs": verdict})
