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
PLACEHOLDER = re.compile(r"{(\w*)}")
OPTIONAL = ("base", "default", "called", "noun_class", "class_forms", "capitals")


def check_tables(languages):
    """Raises ValueError with the first problem of things.json or of {language: its words}, in which
    the base language comes first."""
    for name, colour in world.HELD_OUT.items():
        if colour not in world.COLOURS:
            raise ValueError(f"things.json: {name}: held_out {colour!r} is none of the colours")
    # Cross-lingual questions deny one base-only kind of an image that shows another.
    if len(world.BASE_ONLY) < 2 or len(world.KINDS) - len(world.BASE_ONLY) < 3:
        raise ValueError("things.json: kinds needs two or more of base_only, three others")
    if sum("base" in words for words in languages.values()) != 1:
        raise ValueError("words: one language, and no other, needs 'base'")
    for language in languages:
        for problem in find_problems(language, languages):
            raise ValueError(f"words/{language}.json: {problem}")


def find_problems(language, languages):
    """Yields what is wrong with one language's words, each in one line."""
    words, base = languages[language], next(iter(languages.values()))
    yield from (f"{name} is missing" for name in OWN + WORDINGS if name not in words)
    # What is missing as a whole is empty from here on, so that all else is found, too.
    words = {**dict.fromkeys((*OWN, *WORDINGS, *OPTIONAL), {}), **words}

    # every key of the world, of the base language, and of the languages
    texts, models = shared_texts(words), shared_texts(base)
    required = models.keys() | required_keys(words, base, languages)
    more = ("names", "forms", "noun_class", "class_forms")
    there = texts.keys() | flatten({name: words[name] for name in more}).keys()
    yield from (f"{path} is missing" for path in sorted(required - there))
    yield from (f"{path} is in no other table" for path in sorted(texts.keys() - required))

    # the base language's placeholders, and no form of agreement that is not in the table
    for path in sorted(texts.keys() & models.keys()):
        own, model = properties(words, texts[path]), properties(base, models[path])
        for name in sorted(own ^ model | own - PLACEHOLDERS):
            yield f"{path}: {{{name}}} is {'not known here' if name in own else 'missing'}"
    for path, text in (texts | flatten({name: words[name] for name in WORDINGS})).items():
        for form in unknown_agreement(words, text):
            yield f"agreement.{form} is missing, which {path} uses"
    yield from agreement_problems(words)
    yield from wording_problems(words)

    # two words alike would give a question two right answers
    for name, answers in answer_tables(words).items():
        alike = [word for word, number in Counter(answers).items() if number > 1]
        yield from (f"{name}: {word!r} stands for two things" for word in alike)


def required_keys(words, base, languages):
    """The keys that tables without a model in the base language need."""
    kinds = [*KEYS["kind"], *base["other_kind"], *base["unseen_kind"]]
    keys = KEYS | {"names": languages, "it": base["it"]}
    for table, forms in words["forms"].items():
        for name in forms:
            keys[f"forms.{table}.{name}"] = kinds if table == "kind" else keys.get(table, ())

    # a class for each noun, and each form in each class
    if words["class_forms"]:
        keys["noun_class"] = [*kinds, "thing"]
    classes = set(words["noun_class"].values())
    for table, forms in words["class_forms"].items():
        for path in (f"class_forms.{table}.{name}" for name in forms):
            if table == "class":
                keys[path] = classes
            else:
                keys |= {f"{path}.{name}": keys.get(table, ()) for name in classes}
    del keys["it"]  # the base language has it
    return {f"{table}.{key}" for table in keys for key in keys[table]}


def unknown_agreement(words, template):
    """What looks like a key of the table of agreement, "a/an", and holds none."""
    found = re.findall(r"\w+/\w+", re.sub(r"{\w+}", " ", template))
    return [form for form in found if not any(key in form for key in words["agreement"])]


def agreement_problems(words):
    """Yields what is wrong with the table of agreement, and with the names of further forms."""
    for key, entry in words["agreement"].items():
        if len(entry) < 4 or len(entry) % 2 or entry[0] not in ("next", "previous"):
            yield f"agreement.{key}: needs next or previous, pairs of regex and form, another form"
            continue
        for pattern in entry[1:-1:2]:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"agreement.{key}: {pattern}: {error}"

    # Two tables may not make the same placeholder: of forms {it_x}, and of a class form x.
    made_by = {}
    for _, name, path in form_names(words):
        if name in made_by:
            yield f"{path}: {{{name}}} is also made by {made_by[name]}: rename one of them"
        made_by[name] = path

    # Programs look for these by the beginning of their names.
    names = {f"forms.it.{name}": "it_" for name in words["forms"].get("it", {})}
    for table in ("forms", "class_forms"):
        names |= {f"{table}.colour.{name}": "colour" for name in words[table].get("colour", {})}
    for path, start in names.items():
        if not path.split(".")[-1].startswith(start):
            yield f"{path}: its name must begin with {start}"


def answer_tables(words):
    """{name: the texts} of each table whose words are answers: no two may be alike."""
    tables = {table: words.get(table, {}) for table in KEYS if table != "number"}
    for name in ("other_kind", "unseen_kind"):
        tables["kind"] = {**tables["kind"], **words.get(name, {})}
    for name, table in words.get("yes_no", {}).items():
        tables[f"yes_no.{name}"] = {**table, "ask": ""}

    # of further forms those that an answer has
    answers = " ".join(words.get("answer", {}).values())
    for forms in words["forms"].values():
        tables |= {name: form for name, form in forms.items() if f"{{{name}}}" in answers}
    for table, forms in words["class_forms"].items():
        for name, by_class in forms.items():
            if table != "class" and re.search(rf"{{(it_)?{name}}}", answers):
                tables |= {f"{name}.{own}": form for own, form in by_class.items()}
    return {name: list(table.values()) for name, table in tables.items()}


def wording_problems(words):
    """Yields what is wrong with the patterns: a template asks with other placeholders than the
    plain ones of its skill, a name is not in the grammar, a bracket is open."""
    plain = {f"ask.{skill}": asked for skill, asked in words.get("ask", {}).items()}
    for name, table in words.get("yes_no", {}).items():
        plain[f"yes_no.{name}"] = table.get("ask", [])
    plain |= {f"it.{name}": [template] for name, template in words.get("it", {}).items()}
    plain["describe"] = words.get("describe", [])

    # Templates are joined by single spaces.
    for name, pattern in flatten(words["varied"].get("it", {})).items():
        if pattern != pattern.strip():
            yield f"varied.it.{name}: {pattern!r} loses its space: write it beside {{it}}"

    # What is not in the grammar can't be expanded.
    unknown = set()
    for path, pattern in flatten({name: words[name] for name in WORDINGS}).items():
        for name in sorted({*REFERENCE.findall(pattern)} - words["grammar"].keys()):
            yield f"{path}: @{name} is not in grammar"
            unknown |= {path, path.partition(".")[0]}
    if "grammar" in unknown:
        return

    known = {}  # placeholders of a template -> its properties
    for table in WORDINGS[1:]:
        for path, pattern in flatten(words[table]).items():
            where = f"{table}.{path}"
            if where in unknown:
                continue
            model, more = set(), {"kind", "it"}
            if required := plain.get(path.rpartition(".")[0]):
                model, more = properties(words, required[0]), {"kind"}
            for template in all_templates(pattern, words["grammar"]):
                if "[" in template or "]" in template:
                    yield f"{where}: a bracket is open"
                    break
                placeholders = tuple(PLACEHOLDER.findall(template))
                if placeholders not in known:
                    known[placeholders] = properties(words, template)
                own = known[placeholders]
                if not model <= own <= model | more:
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


def form_names(words):
    """Yields (the table that it has further forms of, placeholder, path) of each further form."""
    for table, forms in words["forms"].items():
        for name in forms:
            yield table, name, f"forms.{table}.{name}"
            if name.startswith("kind"):
                yield "other", name.replace("kind", "other"), f"forms.{table}.{name}"
    for table, forms in words.get("class_forms", {}).items():
        for name in forms:
            yield table, name, f"class_forms.{table}.{name}"
            yield table, f"it_{name}", f"class_forms.{table}.{name}"


def properties(words, template):
    """The placeholders of a template; of further forms, their tables. What only takes the class of
    a noun is none."""
    forms = {name: table for table, name, _ in form_names(words)}
    return {forms.get(name, name) for name in PLACEHOLDER.findall(template)} - {"class"}


def wording_overlaps(words):
    """Yields the templates of `unseen` whose every word and ending is in the training questions of
    their skill: they measure nothing."""
    plain = flatten({"ask": words["ask"], "describe": words["describe"]})
    plain |= flatten({"yes_no": {name: t["ask"] for name, t in words["yes_no"].items()}})
    unseen = flatten(words["unseen"])
    for skill in dict.fromkeys(path.rpartition(".")[0] for path in unseen):
        training = [*flatten(words["varied"]).items(), *plain.items()]
        known = set()
        for path, pattern in training:
            if path.startswith(skill + "."):
                for template in all_templates(pattern, words["grammar"]):
                    known |= word_units(template, words["gap"])
        for path, template in unseen.items():
            if path.startswith(skill + ".") and not word_units(template, words["gap"]) - known:
                yield f"unseen.{path}: {template!r} has no word that training lacks"


def word_units(template, gap):
    """The words of a template, endings included; without spaces its pairs of characters."""
    text = re.sub(r"[^\w' ]", " ", re.sub(r"{\w+}(?:\w+/\w+)?", " ", template.lower()))
    if gap:
        return set(text.split())
    return {word[i : i + 2] for word in text.split() for i in range(max(1, len(word) - 1))}
