"""The words of the demo world: one JSON file a language. README.md explains the tables.

A further file is a further language: nothing else has to change. WORDS and LANGUAGES hold those
that the world is described in: those marked "default", until `choose_languages` changes them.
Files are checked against each other when they are read (python -m demo.words check FILE).
"""

import json
import re
import unicodedata
from functools import cache
from pathlib import Path

from demo.check import check_tables
from demo.phrasing import all_templates, capital
from demo.world import PLACES

FOLDER = Path(__file__).parent
AVAILABLE = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
WORDS, LANGUAGES = {}, []


def read_file(path):
    """The words of one file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # with line and column
        raise ValueError(f"words/{path.name}: {error}") from None


def arrange(found):
    """{language: its words}, the base language first. A language may say itself what it is called
    in the others."""
    for language, words in found.items():
        for other, name in words.get("called", {}).items():
            found.get(other, {}).setdefault("names", {})[language] = name
    return dict(sorted(found.items(), key=lambda pair: ("base" not in pair[1], pair[0])))


def read_languages(folder, chosen=()):
    """{language: its words} of the chosen files in a folder, or of all marked "default"."""
    found = {path.stem: read_file(path) for path in sorted(folder.glob("*.json"))}
    if chosen:
        # The file marked "base" is the model of all others, chosen or not.
        is_used = {name: name in chosen or "base" in words for name, words in found.items()}
    else:
        is_used = {name: words.get("default") for name, words in found.items()}
    languages = arrange({name: words for name, words in found.items() if is_used[name]})
    check_tables(languages)
    if not chosen:
        if len(languages) < 2:
            raise ValueError("words: two or more languages need 'default'")
        return languages

    # The first is the base language; the order of the others is fixed.
    order = [chosen[0], *sorted(set(chosen[1:]) - {chosen[0]})]
    return {name: languages[name] for name in order}


def choose_languages(names=()):
    """Makes these the languages of the world, the base language first, or those marked
    "default"."""
    if names and names[0] == LANGUAGES[0] and set(names) == set(LANGUAGES):
        return
    languages = read_languages(FOLDER, names)
    WORDS.clear()
    WORDS.update(languages)
    LANGUAGES[:] = languages


try:
    choose_languages()
except ValueError as problem:
    raise SystemExit(f"demo/{problem}") from None
DEFAULT = tuple(LANGUAGES)


def training_languages(scene):
    """The languages in which training data describes the image of a scene."""
    return LANGUAGES[:1] if scene.base_only else LANGUAGES


def word_forms(language, table, key):
    """{placeholder: word} of one entry of a table: the word itself, and its further forms."""
    words = WORDS[language]
    tables = ("kind", "other_kind", "unseen_kind") if table == "kind" else (table,)
    word = next(words[name][key] for name in tables if key in words[name])
    forms = words["forms"].get(table, {})
    return {table: word} | {name: form[key] for name, form in forms.items()}


@cache
def word_lists(language):
    """(nouns, known words, script): what made-up words are made of, and what they must not have in
    them."""
    words, known = WORDS[language], set()
    for table in ("kind", "other_kind", "unseen_kind", "colour", "size", "place", "background"):
        for names in (words[table], *words["forms"].get(table, {}).values()):
            known.update(names.values() if isinstance(names, dict) else names)
    nouns = [noun for noun in words["other_kind"].values() if len(noun) > 1]
    return nouns, sorted(known - {""}), words["script"]


def agreeing_words(language, keys, noun, prefix=""):
    """{placeholder: word} of all that takes the class (such as the gender) of a noun: a kind, or
    "thing". keys: {table: key} of the words that have forms by class."""
    words, found = WORDS[language], {}
    for table, forms in words.get("class_forms", {}).items():
        for name, by_class in forms.items():
            form = by_class[words["noun_class"][noun]]
            found[prefix + name] = form if table == "class" else form[keys[table]]
    return found


@cache
def thing_words(language, thing, named_by="kind"):
    """{placeholder: word} for templates about one thing, which may be of no kind of the world.
    Kept for the next call: not to be changed.

    named_by: how a question names the thing, with which {it_…} agrees.
    """
    keys, values = vars(thing) | {"place": PLACES[thing.place]}, {}
    for table, key in keys.items():
        values |= word_forms(language, table, key)
    values |= agreeing_words(language, keys, thing.kind)
    noun = "thing" if named_by == "colour" else thing.kind
    values |= agreeing_words(language, keys, noun, "it_")

    # Forms of "it" are templates, like "it" itself.
    for name, by_naming in WORDS[language]["forms"].get("it", {}).items():
        values[name] = by_naming[named_by].format_map(values)
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
    """A template with its placeholders filled in and its forms of agreement chosen. "^" makes the
    letter after it a capital."""
    text = template.format_map(values)

    def choose(match):
        side, *choices, otherwise = WORDS[language]["agreement"][match[0]]
        if side == "previous":
            neighbour = text[: match.start()].rstrip().rpartition(" ")[2]
        else:
            neighbour = text[match.end() :].lstrip().partition(" ")[0]
        neighbour = re.sub(r"^\W+|\W+$", "", neighbour)
        # Decomposed, a Hangul syllable shows its final consonant, on which particles depend.
        letters = unicodedata.normalize("NFD", neighbour)
        for pattern, form in zip(choices[::2], choices[1::2]):
            if re.search(pattern, letters):
                return form
        return otherwise

    first, *rest = _agreement_pattern(language).sub(choose, text).split("^")
    return first + "".join(capital(part, WORDS[language].get("capitals", {})) for part in rest)


def parse_shares(given):
    """{"ko": 0.1} from ["ko=0.1"], as --share takes it."""
    shares = {}
    for word in given:
        language, _, share = word.partition("=")
        if language not in LANGUAGES or not re.fullmatch(r"0|1|0?\.\d+", share):
            choices = " or ".join(LANGUAGES)
            raise ValueError(f"--share {word}: give LANGUAGE=SHARE, {choices}, from 0 to 1")
        if language in shares:
            raise ValueError(f"--share {word}: {language} has a share already")
        shares[language] = float(share)
    return shares
