"""The words of the demo world: one JSON file a language. README.md explains the tables.

A further file is a further language: nothing else has to change. All files are read, and checked
against each other, when this package is imported.
"""

import json
import re
import unicodedata
from functools import cache
from pathlib import Path

from demo.check import check_tables
from demo.phrasing import all_templates
from demo.world import PLACES


def read_languages(folder):
    """{language: its words} of all files in a folder, the base language first."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:  # with line and column
            raise ValueError(f"words/{path.name}: {error}") from None

    # A language may say itself what it is called in the others.
    for language, words in found.items():
        for other, name in words.get("called", {}).items():
            found.get(other, {}).setdefault("names", {})[language] = name
    languages = dict(sorted(found.items(), key=lambda pair: "base" not in pair[1]))
    check_tables(languages)
    return languages


try:
    WORDS = read_languages(Path(__file__).parent)
except ValueError as problem:
    raise SystemExit(f"demo/{problem}") from None
LANGUAGES = tuple(WORDS)
BASE = LANGUAGES[0]


def training_languages(scene):
    """The languages in which training data describes the image of a scene."""
    return (BASE,) if scene.base_only else LANGUAGES


def word_forms(language, table, key):
    """{placeholder: word} of one entry of a table: the word itself, and its further forms."""
    words = WORDS[language]
    names = words[table]
    if table == "kind":
        names = names | words["other_kind"] | words["unseen_kind"]
    forms = words["forms"].get(table, {})
    return {table: names[key]} | {name: form[key] for name, form in forms.items()}


def thing_words(language, thing):
    """{placeholder: word} for templates about one thing, which may be of no kind of the world."""
    keys, values = vars(thing) | {"place": PLACES[thing.place]}, {}
    for table, key in keys.items():
        values |= word_forms(language, table, key)
    return values


@cache
def templates(language, pattern):
    """Every template that a pattern of this language stands for."""
    return all_templates(pattern, WORDS[language]["grammar"])


@cache
def _agreement_pattern(language):
    """A regex of all that the language's table of agreement replaces."""
    written = sorted(WORDS[language]["agreement"], key=len, reverse=True)
    return re.compile("|".join(map(re.escape, written)) or "(?!)")  # (?!) never matches


def fill(language, template, **values):
    """A template with its placeholders filled in and its forms of agreement chosen."""
    text = template.format_map(values)

    def choose(match):
        side, pattern, if_match, otherwise = WORDS[language]["agreement"][match[0]]
        if side == "previous":
            neighbour = text[: match.start()].rpartition(" ")[2]
        else:
            neighbour = text[match.end() :].lstrip().partition(" ")[0]
        # Decomposed, a Hangul syllable shows its final consonant, on which particles depend.
        letters = unicodedata.normalize("NFD", neighbour)
        return if_match if re.search(pattern, letters) else otherwise

    return _agreement_pattern(language).sub(choose, text)


def parse_shares(given):
    """{"ko": 0.1} from ["ko=0.1"], as --share takes it."""
    shares = {}
    for word in given:
        language, _, share = word.partition("=")
        if language not in LANGUAGES[1:] or not re.fullmatch(r"0|1|0?\.\d+", share):
            choices = " or ".join(LANGUAGES[1:])
            raise ValueError(f"--share {word}: give LANGUAGE=SHARE, {choices}, from 0 to 1")
        # Lines of this language could not be told from those of the base language.
        if not WORDS[language]["script"]:
            raise ValueError(f"--share {word}: words/{language}.json has no script to find it by")
        if language in shares:
            raise ValueError(f"--share {word}: {language} has a share already")
        shares[language] = float(share)
    return shares
