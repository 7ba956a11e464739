"""Which question-answer pairs may be taught, and why the others may not.

It judges texts; it never sees the image.

    reply ─ parse_pairs ─ {language: [(question, answer), …]} ─ filter_pairs ─ DuplicateFilter

Pairs are parallel: a pair that is rejected in one language is rejected in all. To add a language,
add its script to vocabulary/scripts.py, and to languages.json its name, and how a model says there
that it can't see (refusals) or that an object is not there (denials).
"""

import json
import re
import unicodedata
import zlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vocabulary.command import text_width
from vocabulary.conversations import OTHER_MARKERS
from vocabulary.files import read_json
from vocabulary.scripts import SCRIPTS

TABLE = read_json(Path(__file__).with_name("languages.json"))
LANGUAGES = {code: entry["name"] for code, entry in TABLE.items()}  # as the prompts say it
REFUSALS = {code: "|".join(entry["refusals"]) for code, entry in TABLE.items()}
DENIALS = {code: "|".join(entry["denials"]) for code, entry in TABLE.items()}  # of an object NAME

# In the order in which a reply and its pairs pass them.
FILTERS = {
    "image": "not a readable image of this folder, or a copy of another one",
    "no reply": "asked again when the run goes on",
    "malformed": "not the JSON that was asked for, --tries times; a larger number asks again",
    "hostile": "markup, chat roles, links, instructions, control or invisible characters",
    "turns": "the languages disagree in the number of turns, or there are none, or too many",
    "language": "less than half of a text is in the script of its language",
    "length": "too short or too long",
    "repetition": "the text repeats itself",
    "ignores": "the answer is that the image can't be seen",
    "objects": "the answer denies an object that was given",
    "verify": "the second look did not confirm it",
    "duplicate": "the same was said of this image; or, at length, of another",
    "follows": "a later turn of a conversation that lost an earlier one",
}

# Lengths in columns: a Hangul syllable or a Han character has two.
MAX_TURNS = 12
QUESTION_WIDTH = (4, 500)
ANSWER_WIDTH = (2, 2500)
LONG_ANSWER = 60

# Not \b: to it a Hangul syllable is a letter of the same word.
MARKUP = re.compile(
    r"<\s*/?\s*(image|script|img|s|im_start|im_end)\b[^>]*>|<\||\|>|\[/?INST\]|<</?SYS>>"
    r"|https?://|(?<![a-z])(user|assistant|system|human|gpt)\s*[:：]"
    r"|(?<![a-z])(ignore|disregard|forget)\b.{0,30}\b(previous|prior|above|earlier|all)\b"
    r".{0,20}\b(instruction|prompt|rule)s?"
    r"|이전.{0,10}(지시|명령).{0,10}무시|忽略.{0,10}(指令|指示|提示)",
    re.IGNORECASE,
)


class Rejected(NamedTuple):
    """Why a pair, or with pair None the whole reply, is not taught."""

    pair: int | None
    filter: str
    reason: str


def letters_and_digits(text):
    """What of a text counts when it is compared."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


# ------------------------------------------------------------------------------------ parsing
def parse_object(text):
    """The one JSON object of a reply. Reasoning that ends in </think>, a code fence, and words
    without brackets around it are forgiven. Raises ValueError."""

    def unique(pairs):
        # json.loads would keep the last of two equal names without a word.
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice in an object")
        return dict(pairs)

    answer = text.rpartition("</think>")[2]
    found = re.fullmatch(r"[^{\[]*(\{.*\})[^}\]]*", answer, re.DOTALL)
    if not found:
        raise ValueError(f"not one JSON object: {text[:80]!r}")
    try:
        return json.loads(found[1], object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_pairs(text, languages):
    """{language: [(question, answer), …]}, exactly the JSON that was asked for, or ValueError."""
    reply, pairs = parse_object(text), {}
    if set(reply) != set(languages):
        names = ", ".join(languages)
        raise ValueError(f"must be an object with {names}, has {str(list(reply))[:80]}")
    for code, listed in reply.items():
        if not isinstance(listed, list) or not all(map(is_pair, listed)):
            raise ValueError(f"{code}: must be a list of objects with question and answer, no more")

        # Texts are compared later, so each has one spelling.
        pairs[code] = [(clean(pair["question"]), clean(pair["answer"])) for pair in listed]
    return pairs


def is_pair(value):
    """Whether a JSON value is {"question": text, "answer": text}."""
    if not isinstance(value, dict) or set(value) != {"question", "answer"}:
        return False
    return all(isinstance(text, str) for text in value.values())


def clean(text):
    """A text in NFC, with line feeds only, and without space around it."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").strip())


def parse_verdicts(text, count):
    """The numbers of the confirmed pairs. ValueError unless each of `count` got one verdict."""
    try:
        verdicts = {entry["pair"]: entry["confirmed"] for entry in parse_object(text)["pairs"]}
    except (KeyError, TypeError):
        verdicts = {}
    if set(verdicts) != set(range(count)) or not all(type(v) is bool for v in verdicts.values()):
        raise ValueError(f"must hold a verdict, true or false, for each of {count} pairs")
    return {n for n, confirmed in verdicts.items() if confirmed}


# ------------------------------------------------------------------------------------ one pair
def find_hostile(text):
    """Why a text is more than plain text, or None."""
    for c in text:
        # The two joiners are spelling in some scripts, and part of emoji.
        if c in "\n\u200c\u200d":
            continue
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            return f"a character that isn't text: U+{ord(c):04X}"

    found = MARKUP.search(text) or OTHER_MARKERS.search(text)
    return f"not plain text: {found[0]!r}" if found else None


def share_in_script(text, language):
    """Share of the letters, by width, that are in the language's script; 1 without letters."""
    letters = "".join(c for c in text if c.isalpha())
    if not letters:
        return 1.0
    return text_width("".join(SCRIPTS[language].findall(letters))) / text_width(letters)


def is_repetitive(text):
    """Whether less than half of a text's runs of eight characters are distinct."""
    runs = [text[i : i + 8] for i in range(len(text) - 7)]
    return len(runs) > 30 and len(set(runs)) < len(runs) / 2


def find_fault(question, answer, language, objects):
    """(filter, reason) of the first filter that rejects a pair, or None."""
    parts = (("question", question, QUESTION_WIDTH), ("answer", answer, ANSWER_WIDTH))
    for part, text, (least, most) in parts:
        if (share := share_in_script(text, language)) < 0.5:
            return "language", f"{part}: {share:.0%} of the letters are {LANGUAGES[language]}"
        if not least <= text_width(text) <= most or not letters_and_digits(text):
            columns = f"{text_width(text)} columns, must be {least} to {most}"
            return "length", f"{part}: {columns} and hold a letter or a digit"

        # A small model may fall into a loop.
        if is_repetitive(text):
            return "repetition", part

    # A language without such patterns is not searched for them.
    if language in REFUSALS and (found := re.search(REFUSALS[language], answer, re.IGNORECASE)):
        return "ignores", f"answer: {found[0]!r}"
    if language in DENIALS:
        for name in objects:
            pattern = DENIALS[language].replace("NAME", re.escape(name))
            if found := re.search(pattern, f"{question} {answer}", re.IGNORECASE):
                return "objects", f"{name} is there, but: {found[0]!r}"
    return None


# ------------------------------------------------------------------------------------ a reply
def filter_pairs(pairs, kind, objects=()):
    """What a parsed reply is worth by itself -> (numbers of the pairs that pass, [Rejected]): one
    for each pair that does not, and what `truncate_conversation` cuts off."""
    # One hostile text is reason enough to trust none of the reply.
    for code, said in pairs.items():
        for n, (question, answer) in enumerate(said):
            if reason := find_hostile(question) or find_hostile(answer):
                return [], [Rejected(None, "hostile", f"{code}, pair {n}: {reason}")]

    # Pairs are parallel by their number alone.
    counts = {code: len(said) for code, said in pairs.items()}
    most = max(counts.values())
    if len(set(counts.values())) > 1 or not 1 <= most <= MAX_TURNS:
        listed = ", ".join(f"{code} {count}" for code, count in counts.items())
        return [], [Rejected(None, "turns", listed)]

    # A fault in one language rejects the pair in all.
    passed, rejected = [], []
    for n in range(most):
        for code, said in pairs.items():
            if fault := find_fault(*said[n], code, objects):
                rejected.append(Rejected(n, fault[0], f"{code}: {fault[1]}"))
                break
        else:
            passed.append(n)
    return truncate_conversation(kind, passed, rejected)


def truncate_conversation(kind, passed, rejected):
    """A conversation ends before its first rejected turn: later turns refer to it. -> (passed, with
    no later number; rejected, and the later ones as "follows")."""
    first = min((entry.pair for entry in rejected if entry.pair is not None), default=None)
    if kind != "conversation" or first is None:
        return passed, rejected
    later = [Rejected(n, "follows", f"pair {first} is gone") for n in passed if n > first]
    return [n for n in passed if n < first], rejected + later


class DuplicateFilter:
    """Finds pairs that repeat what was said before.

    A short answer ("two", "a cat") is true of many images. A long one that returns for another
    image comes from the model's habit. Two answers are near if 80% of the runs of five characters
    in either are in both; MinHash finds them (Broder 1997: similar sets have the same smallest
    hashes).
    """

    def __init__(self):
        self.a, self.b = np.random.default_rng(0).integers(1, 2**31 - 1, (2, 32), dtype=np.uint64)
        self.places = {}  # (image, language, question, answer) -> where it was said
        self.bands = defaultdict(list)  # four of an answer's 32 smallest hashes -> [(place, runs)]

    def find(self, image, place, texts):
        """Why a pair {language: (question, answer)} of an image is a duplicate, or None. Only
        then it is remembered, as said at `place`."""
        new_pairs, new_bands = [], []
        for code, (question, answer) in texts.items():
            answer = letters_and_digits(answer)
            pair = (image, code, letters_and_digits(question), answer)
            if pair in self.places:
                return f"{code}: the same question and answer as in {self.places[pair]}"
            new_pairs.append(pair)
            if text_width(answer) < LONG_ANSWER:
                continue

            # Answers that agree in one band of hashes are compared run by run.
            runs = self.hash_runs(answer)
            for band in self.hash_bands(code, runs):
                for other_place, other in self.bands[band]:
                    shared = len(np.intersect1d(runs, other, assume_unique=True))
                    if shared >= 0.8 * (len(runs) + len(other) - shared):
                        return f"{code}: the answer is nearly that of {other_place}"
                new_bands.append((band, runs))

        # Only now, as a pair that is dropped must not reject a later one.
        self.places.update(dict.fromkeys(new_pairs, place))
        for band, runs in new_bands:
            self.bands[band].append((place, runs))
        return None

    @staticmethod
    def hash_runs(answer):
        """The distinct hashes of all runs of five characters, uint32."""
        runs = [zlib.crc32(answer[i : i + 5].encode()) for i in range(len(answer) - 4)]
        return np.unique(np.array(runs, dtype=np.uint32))

    def hash_bands(self, code, runs):
        """Eight keys of four smallest hashes each, by 32 random hash functions (a·x + b)
        mod 2³¹ − 1."""
        hashes = (runs[:, None].astype(np.uint64) * self.a + self.b) % np.uint64(2**31 - 1)
        smallest = hashes.min(0)
        return [(code, n, smallest[n : n + 4].tobytes()) for n in range(0, 32, 4)]
