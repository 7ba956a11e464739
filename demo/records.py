"""The LLaVA records of an image: what to train on, and questions to test with."""

from collections import Counter
from dataclasses import replace
from math import gcd

from demo.questions import NOISY, PLAIN, UNSEEN, VARIED, Interviewer, phrases
from demo.words import LANGUAGES, WORDS, training_languages, word_forms
from demo.world import (
    BASE_ONLY,
    COLOURS,
    HELD_OUT,
    KINDS,
    SKILLS,
    YES_NO_TYPES,
    random_for,
)

TRAINING_FILES = ("captions", "phrases", "instruct-1", "instruct-2", "instruct-3", "instruct")
# Every third training image is there in black and white, too: so a ViT recognises a kind in every
# colour (docs/experiments.md).
GREY_EVERY = 3
# Test splits, and the name that seeds each.
SPLITS = {
    "validation": "validation",
    "unseen_images": "unseen_pictures",
    "unseen_combinations": "unseen_combinations",
    "cross_lingual": "cross_lingual",
}
# Further questions on images of these splits: of the wording given, and what is not there.
MORE_SPLITS = {
    "validation_varied": ("validation", VARIED),
    "unseen_phrasings": ("unseen_images", UNSEEN),
    "further_nouns": ("unseen_images", PLAIN),
    "unanswerable": ("unseen_images", UNSEEN),
}
# Further nouns: of those that training may ask about, or of those kept for tests.
NOUN_SKILLS = {
    **dict.fromkeys(("known", "unknown"), "absent"),
    **dict.fromkeys(("known_yes_no", "unknown_yes_no"), "yes_no"),
}
MORE_KINDS = NOUN_SKILLS | dict.fromkeys(("is_background", "is_other_background"), "yes_no")
# What is asked once more about a training image, and what it does not answer.
UNANSWERED = ("absent", "empty", "unanswerable", "greeting", "no_image")
FURTHER_SKILLS = ("caption", "is_background", "is_other_background", *UNANSWERED)
# Of what only some training images are asked: every how manieth.
EVERY = {"empty": 2, "absent": 2, "unanswerable": 4, "greeting": 10, "no_image": 10}
BASE_ONLY_EVERY = 6  # every sixth image of a test split shows a base-only kind
# Splits about the first thing of each scene, and their types of yes/no question.
YES_NO_OF_SPLIT = {
    "unseen_combinations": ("pair", "pair", "place", "size"),
    "cross_lingual": ("pair", "kind", "place", "size"),
}


def make_record(name, language, kind, turns, image=None, **extra):
    """One LLaVA record; the marker of the image is in the first question."""
    messages = []
    for question, answer in turns:
        marker = "<image>\n" if image and not messages else ""
        messages.append({"from": "human", "value": marker + question})
        messages.append({"from": "gpt", "value": answer})
    record = {"id": name} | ({"image": image} if image else {})
    return record | {"language": language, "kind": kind, **extra, "conversations": messages}


def image_path(split, index):
    """Where an image is in the world's folder."""
    return f"images/{split}/{index:05}.png"


def train_records(scene, seed, index):
    """{file: records} about one training image, in each of its languages."""
    made = {name: [] for name in TRAINING_FILES}
    for language in training_languages(scene):
        for file, kind, name, turns in _samples(scene, seed, index, language):
            image = image_path("grey" if name == "grey" else "train", index)
            # Half of the greetings come without an image, as people begin a chat.
            is_mere_greeting = kind == "greeting" and index % (2 * EVERY[kind]) == 0
            image = None if kind == "no_image" or is_mere_greeting else image
            name = f"train-{index:05}-{language}-{name}"
            made[file].append(make_record(name, language, kind, turns, image))

    # In the other languages a base-only kind has its name in the base language.
    for language in LANGUAGES[1:] if scene.base_only else ():
        rng = random_for(seed, "borrowed", index, language)
        for n, (kind, turn) in enumerate(borrowed_turns(scene, language, rng)):
            name, image = f"train-{index:05}-{language}-borrowed-{n}", image_path("train", index)
            made["instruct"].append(make_record(name, language, kind, [turn], image))
    return made


def borrowed_turns(scene, language, rng):
    """Yields (kind, turn): questions in which kinds have their names in the base language, as
    people do who lack a word. No answer names a kind."""
    interviewer = Interviewer(scene, language, rng, wording=NOISY)
    nouns = WORDS[LANGUAGES[0]]["kind"]
    thing = next(thing for thing in scene.things if thing.kind in BASE_ONLY)
    for skill in ("colour", "size", "where"):
        yield SKILLS[skill], interviewer.ask(skill, thing, "kind", nouns[thing.kind])

    yield "yes_no", interviewer.word_yes_no("kind", True, thing, nouns[thing.kind])
    absent = [kind for kind in KINDS if kind not in {other.kind for other in scene.things}]
    other = replace(thing, kind=rng.choice(absent))
    yield "yes_no", interviewer.word_yes_no("kind", False, other, nouns[other.kind])


def _samples(scene, seed, index, language):
    """Yields (file, kind, end of the id, turns) of one training image in one language."""
    words, rng = WORDS[language], random_for(seed, "said", index, language)
    join, requests = words["comma"].join, words["list"]
    interviewer = Interviewer(scene, language, rng, wording=NOISY)
    caption = [interviewer.describe()]
    yield "captions", "caption", "caption", caption
    yield "instruct-2", "caption", "instruct-2-caption", caption
    yield "instruct", "caption", "caption-again", caption

    # phrases with colours and without; the grey image has the latter alone
    plain = join(phrases(scene, language, rng, colours=False))
    coloured = join(phrases(scene, language, rng, colours=True))
    yield "phrases", "phrases", "phrases", [(rng.choice(requests), plain)]
    yield "phrases", "colours", "colours", [(rng.choice(requests), coloured)]
    if index % GREY_EVERY == 0:
        yield "phrases", "phrases", "grey", [(rng.choice(requests), plain)]

    # Looking things up is learnt sooner if it is asked for in few ways.
    for name, turns in Interviewer(scene, language, rng).lookups().items():
        for n, turn in enumerate(dict.fromkeys(turns)):
            yield name, name, f"{name}-{n}", [turn]

    # Each question is a record by itself, conversations aside: the model could copy an answer
    # that an earlier turn gives away.
    for kind, turns in interviewer.instruct(index).items():
        samples = [turns] if kind == "conversation" else [[turn] for turn in turns]
        for n, sample in enumerate(samples):
            yield "instruct", kind, f"{kind}-{n}", sample

    # a second caption in other words, and what the image does not answer
    for skill in FURTHER_SKILLS:
        if index % EVERY.get(skill, 1) == 0:
            turn = further_turn(interviewer, skill)
            yield "instruct", MORE_KINDS.get(skill, skill), f"more-{skill}", [turn]


def further_turn(interviewer, skill):
    """A turn of one of FURTHER_SKILLS."""
    match skill:
        case "caption":
            return interviewer.describe()
        case "is_background" | "is_other_background":
            return interviewer.ask_background(yes=skill == "is_background")
        case "absent":
            return interviewer.ask_absent()
        case "empty":
            return interviewer.ask_empty()
        case "no_image":
            return interviewer.ask_without_image()
    return interviewer.ask_unanswerable(skill)


def language_rotation():
    """The languages that take turns about test images without base-only kinds.

    Every sixth image is asked about in the base language alone. To make up for it, of L languages
    the base takes 6 - L turns here where each other one takes 6.
    """
    base_turns = max(0, BASE_ONLY_EVERY - len(LANGUAGES))
    divisor, rotation = gcd(BASE_ONLY_EVERY, base_turns), []
    for n in range(BASE_ONLY_EVERY // divisor):
        rotation += LANGUAGES[1:]
        if n < base_turns // divisor:
            rotation.append(LANGUAGES[0])
    return rotation


def split_records(split, scenes, seed):
    """A question of each skill, and a conversation, about each scene of a test split, in turn in
    each language; `cross_lingual`: in all but the base, and only what needs the kind's name."""
    made, yes_counts, rotation = [], Counter(), language_rotation()
    skills = (*SKILLS, "conversation")
    for index, scene in enumerate(scenes):
        rng = random_for(seed, "asked", SPLITS[split], index)
        for number, skill in enumerate(skills):
            position = index - index // BASE_ONLY_EVERY + number
            languages = [LANGUAGES[0] if scene.base_only else rotation[position % len(rotation)]]
            if split == "cross_lingual":
                no_name = skill in ("count", "background", "mood")
                languages = [] if no_name else LANGUAGES[1:]

            for language in languages:
                interviewer = Interviewer(scene, language, rng)
                turns = _split_turns(split, interviewer, skill, index, yes_counts)
                if turns:
                    name = f"{split}-{index:05}-{skill}-{language}"
                    kind, image = SKILLS.get(skill, skill), image_path(split, index)
                    made.append(make_record(name, language, kind, turns, image, skill=skill))
    return made


def more_records(split, scenes, seed):
    """The records of a split in MORE_SPLITS. Each asks in the languages in turn."""
    made, yes_counts, rotation = [], Counter(), language_rotation()
    source, wording = MORE_SPLITS[split]
    for index, scene in enumerate(scenes):
        rng = random_for(seed, "asked", split, index)
        for number, skill in enumerate(_more_skills(split)):
            position = index - index // BASE_ONLY_EVERY + number
            language = LANGUAGES[0] if scene.base_only else rotation[position % len(rotation)]
            interviewer = Interviewer(scene, language, rng, wording=wording)
            turns = _more_turns(split, interviewer, skill, index, yes_counts)
            if turns:
                name = f"{split}-{index:05}-{skill}-{language}"
                image = None if skill == "no_image" else image_path(source, index)
                kind = SKILLS.get(skill, MORE_KINDS.get(skill, skill))
                made.append(make_record(name, language, kind, turns, image, skill=skill))
    return made


def _more_skills(split):
    """What a split of MORE_SPLITS asks about each image."""
    without = ("unanswerable", "greeting", "no_image", "empty")
    if split == "further_nouns":
        return tuple(NOUN_SKILLS)
    if split == "unanswerable":
        return without
    asked = (*SKILLS, "caption")
    return asked if split == "unseen_phrasings" else (*asked, "is_background", "absent", *without)


def _more_turns(split, interviewer, skill, index, yes_counts):
    """The turns of one record of `more_records`, or [] if there is no such question."""
    rng, scene = interviewer.rng, interviewer.scene
    if skill in ("known", "unknown"):  # a noun that training asked about, or never
        return [interviewer.ask_absent("other_kind" if skill == "known" else "unseen_kind")]
    if skill in ("known_yes_no", "unknown_yes_no"):
        nouns = interviewer.words["other_kind" if skill == "known_yes_no" else "unseen_kind"]
        thing = replace(scene.things[0], kind=rng.choice(list(nouns)))
        return [interviewer.word_yes_no("kind", False, thing)]

    if skill == "is_background" and index % 2:
        skill = "is_other_background"
    if skill in FURTHER_SKILLS:
        return [further_turn(interviewer, skill)]
    return _split_turns(split, interviewer, skill, index, yes_counts)


def _split_turns(split, interviewer, skill, index, yes_counts):
    """The turns of one test record: one question or a conversation, or [] if there is none."""
    things = interviewer.scene.things
    subject = things[0] if split in YES_NO_OF_SPLIT else None
    by_kind = "kind" if split == "cross_lingual" else None
    if skill == "conversation":
        return interviewer.converse(3, subject, by_kind or "pronoun")

    if skill == "yes_no":
        types = YES_NO_OF_SPLIT.get(split, YES_NO_TYPES)
        question_type = types[(index // BASE_ONLY_EVERY + index) % len(types)]
        # Yes and no alternate in each language and type.
        key = interviewer.language, question_type
        yes_counts[key] += 1
        return [_split_yes_no(split, interviewer, question_type, yes_counts[key] % 2, subject)]

    if skill != "relation":
        return [interviewer.ask(skill, subject, by_kind)]

    # between any two things, but it must name the subject
    by_kind = "kind" if subject else None
    names = [""]
    if subject:
        forms = word_forms(interviewer.language, "kind", subject.kind)
        names = [word for form, word in forms.items() if form.startswith("kind")]
    order = interviewer.rng.sample(things, len(things))
    turns = [interviewer.ask(skill, thing, by_kind) for thing in order]
    turns = [turn for turn in turns if turn]
    return [turn for turn in turns if any(name in " ".join(turn).lower() for name in names)][:1]


def _split_yes_no(split, interviewer, question_type, yes, subject):
    """A turn of yes or no. A split about held-out pairs or base-only kinds denies these, too."""
    denied, pairs = None if yes else (split, question_type), None
    if denied == ("unseen_combinations", "pair"):
        shown = {(thing.kind, thing.colour) for thing in interviewer.scene.things}
        pairs = [p for p in HELD_OUT.items() if p not in shown and p[0] in interviewer.kinds]
        seen = {name for pair in shown for name in pair}
        pairs = [pair for pair in pairs if seen & set(pair)] or pairs
    elif denied == ("cross_lingual", "pair"):
        true = subject.colour, HELD_OUT[subject.kind]
        pairs = [(subject.kind, colour) for colour in COLOURS if colour not in true]
    elif denied == ("cross_lingual", "kind"):
        other = BASE_ONLY[(BASE_ONLY.index(subject.kind) + 1) % len(BASE_ONLY)]
        return interviewer.word_yes_no("kind", False, replace(subject, kind=other))
    return interviewer.ask_yes_no(question_type, yes, subject, pairs)
