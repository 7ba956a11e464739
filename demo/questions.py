"""Captions, questions with their answers, and conversations about a scene, in any language.

A turn is a pair (question, answer). Each question has one right answer, in one wording.
"""

from dataclasses import replace
from operator import attrgetter

from demo.phrasing import as_typed, with_unknown_word
from demo.words import LANGUAGES, WORDS, fill, templates, thing_words, word_forms, word_lists
from demo.world import (
    BACKGROUNDS,
    BASE_ONLY,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    KINDS,
    PLACES,
    SIZES,
    SKILLS,
    YES_NO_TYPES,
)

# How questions are worded: by the plain templates; varied, as people ask; noisy, which is what
# training has: varied, with words that mean nothing; or by templates of which each has a word or an
# ending that is in no other table.
PLAIN, VARIED, NOISY, UNSEEN = "plain", "varied", "noisy", "unseen"
PLAIN_SHARE = 0.4  # of the varied questions
UNKNOWN_SHARE = 0.35  # of the noisy questions, and of these again and again: an unknown word

# How a question names its thing: three times of four by its kind.
NAMED_BY = ("kind", "kind", "kind", "colour")


def full_caption(scene, language):
    """One phrase a thing, with all its attributes, row by row as one reads; then the background."""
    words, things = WORDS[language], sorted(scene.things, key=attrgetter("place"))
    parts = [fill(language, words["full"], **thing_words(language, thing)) for thing in things]
    return parts + [words["setting"][scene.background]]


def phrases(scene, language, rng, colours):
    """Every true phrase that names a colour, or every one that does not, in random order."""
    words = WORDS[language]
    found = [] if colours else [words["setting"][scene.background]]
    for thing in scene.things:
        for template in words["phrases"]:
            if ("{colour" in template) == colours:  # or a form of it
                found.append(fill(language, template, **thing_words(language, thing)))
        if not colours:
            pairs = beside_pairs(scene, thing)
            found += [fill_pair(language, words["pair"], *pair) for pair in pairs]
    rng.shuffle(found)
    return found


def beside_pairs(scene, thing):
    """(other, direction, thing) for each thing that lies in a direction from `thing`."""
    return [(other, side, thing) for side in DIRECTIONS for other in scene.beside(thing, side)]


def fill_pair(language, template, thing, direction, other):
    """A template that says where `thing` is, seen from `other`."""
    names = word_forms(language, "direction", direction)
    for name, word in word_forms(language, "kind", other.kind).items():
        if name.startswith("kind"):  # not the measure word of a kind
            names[name.replace("kind", "other")] = word
    return fill(language, template, **thing_words(language, thing), **names)


class Interviewer:
    """Asks about one scene in one language. `text_only`: every kind may be named."""

    def __init__(self, scene, language, rng, text_only=False, wording=PLAIN):
        self.scene, self.language, self.rng = scene, language, rng
        self.is_noisy, self.wording = wording == NOISY, VARIED if wording == NOISY else wording
        self.words = WORDS[language]
        # Base-only kinds are not named with an image in the other languages. Nor are nouns of no
        # kind in training: else the model learns that a word which no image came with means a thing
        # that is not there. Both have their names in the base language (see borrowed_noun).
        self.every_kind = text_only or language == LANGUAGES[0]
        self.kinds = [kind for kind in KINDS if self.every_kind or kind not in BASE_ONLY]

    def fill(self, template, thing, **values):
        return fill(self.language, template, **thing_words(self.language, thing) | values)

    def word(self, thing, plain, *keys, **values):
        """A question from the tables `plain`, or where `keys` lead in the other tables."""
        if self.wording == PLAIN:
            return self.fill(self.rng.choice(plain), thing, **values)

        patterns = self.words[self.wording]
        for key in keys:
            patterns = patterns[key]
        if self.wording == VARIED and plain and self.rng.random() < PLAIN_SHARE:
            patterns = plain
        template = self.draw_template(patterns)
        if self.wording != VARIED:
            return self.fill(template, thing, **values)

        # A background is named by the template itself: that word must stay.
        is_noisy = self.is_noisy and keys[0] != "is_background"
        while is_noisy and self.rng.random() < UNKNOWN_SHARE:
            template = with_unknown_word(template, *word_lists(self.language), self.rng)
        question = self.fill(template, thing, **values)
        return as_typed(question, self.rng, self.words.get("capitals", {}))

    def name(self, thing, named_by, noun=None):
        """{"it" and what agrees with it: text}: how a question names its thing. noun: instead of
        the word for its kind."""
        template = self.words["it"][named_by]
        if self.wording == VARIED:
            template = self.draw_template(self.words["varied"]["it"][named_by])
        values = thing_words(self.language, thing, named_by) | self.forms_of(noun)
        own = {name: word for name, word in values.items() if name.startswith("it_")}
        return own | {"it": fill(self.language, template, **values)}

    def forms_of(self, noun):
        """{placeholder: noun} for all forms of a kind's word; {} without a noun."""
        forms = ["kind", *self.words["forms"].get("kind", ())] if noun else []
        return {name: noun for name in forms if name.startswith("kind")}

    def draw_template(self, patterns):
        return self.rng.choice(templates(self.language, self.rng.choice(patterns)))

    def ask(self, skill, thing=None, named_by=None, noun=None):
        """A turn about a thing, or None where the scene has no such question. It names the thing
        by its "kind" (whose word `noun` replaces), "colour" or "pronoun". What is not given is
        drawn."""
        words, scene, rng = self.words, self.scene, self.rng
        thing = thing or self.rng.choice(self.scene.things)
        if skill == "yes_no":
            return self.ask_yes_no(rng.choice(YES_NO_TYPES), rng.random() < 0.5, thing)

        # A relation is asked only where one thing is alone on a side of `thing`.
        answer, subject, values = words["answer"].get(skill), thing, {}
        if skill == "relation":
            sides = [(side, scene.beside(thing, side)) for side in DIRECTIONS]
            sides = [(side, others[0]) for side, others in sides if len(others) == 1]
            if not sides:
                return None
            side, subject = rng.choice(sides)
            answer, values = words["answer"]["at"], word_forms(self.language, "direction", side)

        # A question about the colour cannot name the thing by it.
        if named_by is None:
            named_by = "kind" if skill == "colour" else rng.choice(NAMED_BY)
        values |= {name: words[name][scene.background] for name in ("background", "mood")}
        values["number"] = words["number"][len(scene.things) - 1]
        values |= self.name(thing, named_by, noun)
        question = self.word(thing, words["ask"][skill], "ask", skill, **values)
        return question, self.fill(answer, subject, **values)

    def ask_yes_no(self, question_type, yes, thing=None, pairs=None):
        """A turn whose answer is yes or no. A "no" changes one attribute of a thing that is there,
        to no held-out pair, or denies one of the given (kind, colour) pairs."""
        thing = thing or self.rng.choice(self.scene.things)
        if not yes and question_type == "pair" and pairs:
            kind, colour = self.rng.choice(pairs)
            thing = replace(thing, kind=kind, colour=colour)
        elif not yes:
            thing = self.change_one(question_type, thing)
        return self.word_yes_no(question_type, yes, thing, self.borrowed_noun(thing))

    def borrowed_noun(self, thing):
        """In training, what other languages call a thing of no kind of the world: by its name in
        the base language. None for the thing's own name."""
        nouns = WORDS[LANGUAGES[0]]["other_kind"]
        return nouns.get(thing.kind) if self.is_noisy and not self.every_kind else None

    def word_yes_no(self, question_type, yes, thing, noun=None):
        """The turn that asks whether the scene shows `thing`."""
        table, forms = self.words["yes_no"][question_type], self.forms_of(noun)
        question = self.word(thing, table["ask"], "yes_no", question_type, **forms)
        return question, table["yes" if yes else "no"]

    def ask_background(self, yes):
        """A turn that asks whether the background is this one."""
        right, table = self.scene.background, self.words["yes_no"]["colour"]
        others = [background for background in BACKGROUNDS if background != right]
        asked = right if yes else self.rng.choice(others)
        question = self.word(self.scene.things[0], [], "is_background", asked)
        return question, table["yes" if yes else "no"]

    def describe(self):
        """A turn that asks for a caption."""
        question = self.word(self.scene.things[0], self.words["describe"], "describe")
        return question, self.words["comma"].join(full_caption(self.scene, self.language))

    def ask_absent(self, table=None):
        """A turn about a thing that is not there: of no kind of the world, unless a kind of the
        world that the image does not show is drawn."""
        rng, thing = self.rng, self.rng.choice(self.scene.things)
        kinds = list(self.words[table or "other_kind"])
        if table is None and rng.random() < 0.3:
            kinds = [kind for kind in self.kinds if kind not in {t.kind for t in self.scene.things}]
        absent = replace(thing, kind=rng.choice(kinds))
        skill = rng.choice(("colour", "size", "where"))
        name = self.name(absent, "kind", self.borrowed_noun(absent))
        question = self.word(absent, self.words["ask"][skill], "ask", skill, **name)
        return question, self.words["unanswered"]["unanswerable"]

    def ask_empty(self):
        """A turn about a place where nothing is."""
        taken = {thing.place for thing in self.scene.things}
        place = self.rng.choice([place for place in range(len(PLACES)) if place not in taken])
        thing = replace(self.scene.things[0], place=place)
        question = self.word(thing, self.words["ask"]["at"], "ask", "at")
        return question, self.words["unanswered"]["empty"]

    def ask_unanswerable(self, reason="unanswerable"):
        """A turn that no image answers; or ("greeting") that asks nothing."""
        thing = self.rng.choice(self.scene.things)
        question = self.word(thing, [], reason, **self.name(thing, "kind"))
        return question, self.words["unanswered"][reason]

    def ask_without_image(self):
        """A turn that asks about an image where none is given."""
        asked = self.ask(self.rng.choice(list(SKILLS))) or self.describe()
        return asked[0], self.words["unanswered"]["no_image"]

    def change_one(self, question_type, thing):
        """A thing that differs from `thing` in one attribute and is not in the scene."""
        rng, things = self.rng, self.scene.things
        shown = {other.kind for other in things}
        if question_type == "kind":
            kinds = [kind for kind in self.kinds if kind not in shown]
            names_any = self.is_noisy or self.wording == VARIED and self.every_kind
            if names_any and rng.random() < 0.5:
                kinds = list(self.words["other_kind"])
            return replace(thing, kind=rng.choice(kinds))
        if question_type == "size":
            return replace(thing, size=next(size for size in SIZES if size != thing.size))
        if question_type == "place":  # where another thing is, or anywhere
            places = [other.place for other in things if other != thing]
            if not places or rng.random() >= 0.5:
                places = [place for place in range(9) if place != thing.place]
            return replace(thing, place=rng.choice(places))

        # Another colour or kind: in half of the cases one that another thing has.
        true = {(other.kind, other.colour) for other in things} | set(HELD_OUT.items())
        if question_type == "colour" or rng.random() < 0.5:
            name, near = "colour", {other.colour for other in things}
            choices = [c for c in COLOURS if (thing.kind, c) not in true]
        else:
            name, near = "kind", shown
            choices = [k for k in self.kinds if (k, thing.colour) not in true]
        near = [choice for choice in choices if choice in near]
        if near and rng.random() < 0.5:
            choices = near
        return replace(thing, **{name: rng.choice(choices)})

    def converse(self, num_turns, thing=None, named_by="pronoun"):
        """A conversation about one thing after another, "it" after its first question, then about
        the scene as a whole. With `thing`, all is about that one."""
        rng, turns = self.rng, []
        rest = [thing] if thing else rng.sample(self.scene.things, len(self.scene.things))
        whole_scene = ["count", "background", "mood", "yes_no"]
        while len(turns) < num_turns and (rest or whole_scene):
            if not rest:
                turns.append(self.ask(whole_scene.pop(rng.randrange(len(whole_scene)))))
                continue

            # One thing is brought up; a given one is never asked for by its place.
            one, openings = rest.pop(), ("what", "where", "colour", "at")
            first = rng.choice(openings[:3] if thing else openings)
            turns.append(self.ask(first, one, "kind" if first in ("where", "colour") else None))

            # not again what the first question or its answer gives away
            known = {"what": ("colour",), "at": ("where", "colour")}.get(first, (first,))
            skills = [s for s in ("where", "colour", "size", "relation") if s not in known]
            more = [self.ask(s, one, named_by) for s in rng.sample(skills, len(skills))]
            limit = num_turns - 1 if thing else rng.randint(1, 2)
            turns += [turn for turn in more if turn][:limit]
        return turns[:num_turns]

    def lookups(self):
        """{file: turns}: one attribute of a thing, given another; then also by place and direction;
        then whether it has this colour. A single thing needs no lookup: no turns."""
        if len(self.scene.things) < 2:
            return {}
        first = [self.ask(skill) for skill in ("what", "colour") * 3]
        first += [self.ask(skill, named_by="kind") for skill in ("where", "where", "size")]
        second = [self.ask(s) for s in ("what", "colour", "where", "size", "at", "relation")]
        second += [self.ask_yes_no("colour", yes) for yes in (True, False)]
        third = [self.ask_yes_no("colour", yes) for yes in (True, False) * 3]
        third += [self.ask(skill, named_by="kind") for skill in ("colour", "where")]
        third += [self.ask(skill) for skill in ("at", "relation")]
        turns = {"instruct-1": first, "instruct-2": second, "instruct-3": third}
        return {name: list(filter(None, own)) for name, own in turns.items()}

    def instruct(self, index):
        """{kind: turns} about the image of this number: X-LLaVA's four kinds, and yes/no."""
        rng, ask = self.rng, self.ask
        # Things take turns as subjects, in random order.
        things = rng.sample(self.scene.things, len(self.scene.things)) * (len(YES_NO_TYPES) + 2)
        first, second = things[:2]
        asked = {
            "object": zip(("what", "colour", "count", "size"), things),
            "location": [
                *(("where", first, "kind"), ("at", second), ("where", second)),
                *(("relation", first), ("relation", second)),
            ],
            "atmosphere": [(rng.choice(("background", "mood")),)],
        }
        turns = {kind: [ask(*question) for question in asked[kind]] for kind in asked}
        turns["conversation"] = self.converse(rng.randint(4, 6))

        # A single thing is asked about twice: no question twice.
        for kind in asked:
            turns[kind] = list(dict.fromkeys(filter(None, turns[kind])))[:4]
            rng.shuffle(turns[kind])

        # The bits of a counter give each type of yes/no as many yes as no.
        bits = index + 11 * LANGUAGES.index(self.language)
        pairs = [(name, bits >> n & 1) for n, name in enumerate(YES_NO_TYPES)]
        # What is hardest to learn is asked for both answers.
        pairs += [(name, not yes) for name, yes in pairs if name in ("colour", "pair")]
        rng.shuffle(pairs)
        turns["yes_no"] = [self.ask_yes_no(*pair, thing) for pair, thing in zip(pairs, things)]
        return turns
