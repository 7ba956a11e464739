"""Checks the tables of kinds and words when `demo.words` reads them: a missing word stops the run
at once, with the file and the key in one line."""

import re
from collections import Counter

from demo import world
from demo.phrasing import REFERENCE, all_templates

# The keys that these tables need in each language. Other tables follow the base language's.
KEYS = {
    "kind": world.KINDS,
    "colour": world.COLOURS,
    "size": world.SIZES,
    "place": world.PLACES,
    "direction": world.DIRECTIONS,
    **dict.fromkeys(("background", "setting", "mood"), world.BACKGROUNDS),
    "number": range(3),
}
PLACEHOLDERS = {*KEYS, "it", "other", "notes", "word", "name"}
# Tables without a counterpart in the base language.
OWN = ("vocab_size", "tokenizer_flags", "script", "agreement", "names", "forms")
# Patterns, of which each language has as many as it likes.
WORDINGS = ("grammar", "varied", "unseen")
OPTIONAL = ("base", "called")


def check_tables(languages):
    """Raises ValueError with the first problem of things.json or of {language: its words}, in which
    the base language comes first."""
    for name, colour in world.HELD_OUT.items():
        if colour not in world.COLOURS:
            raise ValueError(f"things.json: {name}: held_out {colour!r} is none of the colours")
    # Cross-lingual questions deny one base-only kind of an image that shows another.
    if len(world.BASE_ONLY) < 2 or len(world.KINDS) - len(world.BASE_ONLY) < 3:
        raise ValueError("things.json: kinds needs two or more of base_only, three others")
    if len(languages) < 2 or sum("base" in words for words in languages.values()) != 1:
        raise ValueError("words: needs two or more languages, one of them with 'base'")
    for language in languages:
        for problem in find_problems(language, languages):
            raise ValueError(f"words/{language}.json: {problem}")


def find_problems(language, languages):
    """Yields what is wrong with one language's words, each in one line."""
    words, base = languages[language], next(iter(languages.values()))
    yield from (f"{name} is missing" for name in OWN + WORDINGS if name not in words)

    # every key of the world, of the base language, and of the languages
    texts, models, forms = shared_texts(words), shared_texts(base), form_tables(words)
    keys = KEYS | {"names": languages}
    kinds = {**KEYS["kind"], **base["other_kind"], **base["unseen_kind"]}
    keys |= {
        f"forms.{table}.{name}": kinds if table == "kind" else KEYS[table]
        for name, table in forms.items()
    }
    required = models.keys() | {f"{table}.{key}" for table in keys for key in keys[table]}
    there = texts.keys() | flatten({name: words[name] for name in ("names", "forms")}).keys()
    yield from (f"{path} is missing" for path in sorted(required - there))
    yield from (f"{path} is in no other table" for path in sorted(texts.keys() - required))

    # the base language's placeholders, and no form of agreement that is not in the table
    for path in sorted(texts.keys() & models.keys()):
        own, model = properties(words, texts[path]), properties(base, models[path])
        for name in sorted(own ^ model | own - PLACEHOLDERS):
            yield f"{path}: {{{name}}} is {'not known here' if name in own else 'missing'}"
        for form in re.findall(r"\w+/\w+", re.sub(r"{\w+}", " ", texts[path])):
            if form not in words["agreement"]:
                yield f"agreement.{form} is missing, which {path} uses"

    yield from wording_problems(words)

    # two words alike would give a question two right answers
    tables = {table: words[table] for table in KEYS if table != "number"}
    tables["kind"] = words["kind"] | words["other_kind"] | words["unseen_kind"]
    tables |= {f"yes_no.{name}": words["yes_no"][name] | {"ask": ""} for name in world.YES_NO_TYPES}
    for name, table in forms.items():
        if f"{{{name}}}" in " ".join(words["answer"].values()):
            tables[name] = words["forms"][table][name]
    for name, table in tables.items():
        alike = [word for word, number in Counter(table.values()).items() if number > 1]
        yield from (f"{name}: {word!r} stands for two things" for word in alike)


def wording_problems(words):
    """Yields what is wrong with the patterns: a template asks with other placeholders than the
    plain ones of its skill, a name is not in the grammar, a bracket is open."""
    plain = {f"ask.{skill}": asked for skill, asked in words["ask"].items()}
    plain |= {f"yes_no.{name}": table["ask"] for name, table in words["yes_no"].items()}
    plain |= {f"it.{name}": [template] for name, template in words["it"].items()}
    plain["describe"] = words["describe"]
    for table in WORDINGS[1:]:
        for path, pattern in flatten(words[table]).items():
            where = f"{table}.{path}"
            for name in REFERENCE.findall(pattern):
                if name not in words["grammar"]:
                    yield f"{where}: @{name} is not in grammar"
                    return
            required = plain.get(path.rpartition(".")[0])
            for template in all_templates(pattern, words["grammar"]):
                if "[" in template or "]" in template:
                    yield f"{where}: a bracket is open"
                    break
                if required is None:
                    continue
                own, model = properties(words, template), properties(words, required[0])
                if not model <= own <= model | {"kind"}:
                    names = ", ".join(sorted(own ^ model))
                    yield f"{where}: {template!r} differs in {names} from the plain templates"
                    break
        for path in plain.keys() - {"it.kind", "it.colour", "it.pronoun"}:
            if not any(key.startswith(path + ".") for key in flatten(words[table])):
                yield f"{table}.{path} is missing"


def flatten(table, path=""):
    """{"ask.colour.2": text} for all texts in nested tables."""
    if isinstance(table, str):
        return {path[1:]: table}
    texts, pairs = {}, table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in pairs:
        texts |= flatten(value, f"{path}.{key}")
    return texts


def shared_texts(words):
    """The texts that have a counterpart in the base language."""
    without = OWN + OPTIONAL + WORDINGS
    return flatten({name: table for name, table in words.items() if name not in without})


def form_tables(words):
    """{placeholder: the table that it has further forms of}."""
    return {name: table for table, forms in words["forms"].items() for name in forms}


def properties(words, template):
    """The placeholders of a template; of further forms, their tables."""
    forms = form_tables(words)
    return {forms.get(name, name) for name in re.findall(r"{(\w*)}", template)}
