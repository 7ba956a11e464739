"""Text without images: descriptions, questions on them, translations and a dictionary.

Here every kind is named in every language, the base-only ones too.
"""

from demo.questions import VARIED, Interviewer, beside_pairs, fill_pair, full_caption
from demo.records import FURTHER_SKILLS, further_turn, make_record
from demo.words import LANGUAGES, WORDS, fill, thing_words
from demo.world import SKILLS, random_for, random_scene

# The tables of the dictionary, and what a translation asks for, some of it more often.
TABLES = ("kind", "colour", "size", "background", "direction", "other_kind")
FURTHER_SHARE = 0.3  # of the texts are asked for a caption, or what they do not answer
GLOSSARY = ("kind", "kind", *TABLES, "place", "phrase", "phrase")


def sentence(language, number, thing):
    """A sentence about a thing, in one of the language's wordings."""
    template = WORDS[language]["sentences"][number]
    return fill(language, template, **thing_words(language, thing))


def description(scene, language, rng, plain=False):
    """A scene as sentences, or unless `plain` also as a shuffled caption or as notes."""
    words, parts = WORDS[language], []
    style = 0 if plain else rng.random()
    things = rng.sample(scene.things, len(scene.things))
    background = words["background"][scene.background]
    if style < 0.5:
        numbers = range(len(words["sentences"]))
        parts = [sentence(language, rng.choice(numbers), thing) for thing in things]
        place = rng.choice((0, len(parts)))
        template = rng.choice(words["background_says"])
        parts.insert(place, fill(language, template, background=background))
        return words["gap"].join(parts)

    # the phrases of a caption
    if style < 0.75:
        parts = full_caption(scene, language)
        rng.shuffle(parts)
        return words["comma"].join(parts) + words["stop"]

    # notes: a place and what is there
    for thing in things:
        names = thing_words(language, thing)
        notes = rng.sample((names["kind"], names["colour"], names["size"]), 3)
        notes = words["comma"].join(notes)
        parts.append(fill(language, words["note"], **names, notes=notes))
    return words["gap"].join([*parts, background + words["stop"]])


def questions_on(text, scene, language, rng, num_turns):
    """Turns about a scene that `text` described, which comes before the first question."""
    interviewer = Interviewer(scene, language, rng, text_only=True, wording=VARIED)
    turns = [interviewer.ask(skill) for skill in rng.sample(list(SKILLS), num_turns + 1)]
    turns = [turn for turn in turns if turn][:num_turns]
    if rng.random() < FURTHER_SHARE:
        turns[-1] = further_turn(interviewer, rng.choice(FURTHER_SKILLS))
    (question, answer), *rest = turns
    return [(text + question, answer), *rest]


def glossary(rng):
    """{language: the same word or phrase}."""
    table = rng.choice(GLOSSARY)
    if table in TABLES:
        key = rng.choice(list(WORDS[LANGUAGES[0]][table]))
        return {language: words[table][key] for language, words in WORDS.items()}

    # a phrase about a thing, or a place alone
    things = random_scene(rng).things
    thing, n = things[0], None
    if table != "place":
        thing, n = rng.choice(things), rng.randrange(len(WORDS[LANGUAGES[0]]["phrases"]) + 1)
    found = {}
    for code, words in WORDS.items():
        text = words["location"] if n is None else [*words["phrases"], words["full"]][n]
        found[code] = fill(code, text, **thing_words(code, thing))
    return found


def dictionary():
    """Lines of words that mean the same, "cat = 고양이 = 猫"."""
    lines = []
    for table in TABLES:
        for key in WORDS[LANGUAGES[0]][table]:
            names = [words[table][key] for words in WORDS.values()]
            lines += [" = ".join(names)] if len(names) > 1 else []
    return lines


def translation(rng):
    """(language, turn): how to say in one language a word of another, asked in one of the two."""
    words = glossary(rng)
    language = rng.choice(LANGUAGES)
    source, target = rng.sample(LANGUAGES, 2)
    if language not in (source, target):
        language = source
    template, name = rng.choice(WORDS[language]["translate"]), WORDS[language]["names"][target]
    return language, (fill(language, template, word=words[source], name=name), words[target])


def dialogue(turns):
    return " ".join(f"USER: {question} ASSISTANT: {answer}" for question, answer in turns)


def document(kind, rng):
    """One line of text: in one language, or ("parallel") the same thing in several."""
    scene = random_scene(rng, base_only=rng.random() < 0.33)
    if kind == "parallel":
        return _parallel_document(scene, rng)

    # sentences, with more on the mood and on who is beside whom
    words, text = WORDS[kind], description(scene, kind, rng, plain=True)
    if rng.random() < 0.3:
        more = [fill(kind, words["mood_says"], mood=words["mood"][scene.background])]
        pairs = [pair for thing in scene.things for pair in beside_pairs(scene, thing)]
        for pair in rng.sample(pairs, min(2, len(pairs))):
            more.append(fill_pair(kind, words["pair_says"], *pair))
        return words["gap"].join([text, *rng.sample(more, len(more))])

    # or a description with questions on it
    text = description(scene, kind, rng) + words["gap"]
    return dialogue(questions_on(text, scene, kind, rng, rng.randint(2, 5)))


def _parallel_document(scene, rng):
    """The same sentences, words, translations, or questions in another language on a text."""
    style = rng.random()
    languages = rng.sample(LANGUAGES, rng.choice((2, min(3, len(LANGUAGES)))))
    if style < 0.35:
        things = rng.sample(scene.things, len(scene.things))
        numbers = [rng.randrange(len(WORDS[LANGUAGES[0]]["sentences"])) for _ in things]
        lines = []
        for code in languages:
            parts = [sentence(code, n, thing) for n, thing in zip(numbers, things)]
            lines.append(WORDS[code]["gap"].join(parts))
        return rng.choice((" = ", " / ", " ")).join(lines)

    if style < 0.55:
        words = glossary(rng)
        return rng.choice((" = ", " / ", ": ")).join(words[code] for code in languages)
    if style < 0.75:
        return dialogue([translation(rng)[1] for _ in range(rng.randint(1, 3))])
    text = description(scene, languages[0], rng) + " "
    return dialogue(questions_on(text, scene, languages[1], rng, rng.randint(2, 4)))


def text_record(index, seed):
    """A record without an image: questions on a text, maybe in another language, or (every fourth)
    a translation."""
    rng = random_for(seed, "text record", index)
    block, place = divmod(index, 4)
    if place == 3 and len(LANGUAGES) > 1:
        language, turn = translation(rng)
        return make_record(f"text-{index:05}", language, "text", [turn])

    language = LANGUAGES[(block + place) % len(LANGUAGES)]
    scene = random_scene(rng, base_only=rng.random() < 0.5)
    told_in = rng.choice((language, *LANGUAGES))
    turns = questions_on("", scene, language, rng, rng.randint(4, 6))
    gap = WORDS[language]["gap"] if told_in == language else " "
    turns[0] = (description(scene, told_in, rng) + gap + turns[0][0], turns[0][1])
    return make_record(f"text-{index:05}", language, "text", turns)
