"""Captions, questions with their answers, and conversations about a scene, in any language.

Pipeline: world -> words -> **questions** -> records, text -> write.

A turn is a pair (question, answer). Each question has one right answer, in one wording.
"""

from dataclasses import replace

from demo.words import BASE, LANGUAGES, WORDS, fill, thing_words
from demo.world import BASE_ONLY, COLOURS, DIRECTIONS, HELD_OUT, KINDS, SIZES, YES_NO_TYPES

# How a question names its thing: three times of four by its kind.
NAMED_BY = ("kind", "kind", "kind", "colour")


def full_caption(scene, language, rng):
    """One phrase a thing, with all its attributes, in random order; then the background."""
    words = WORDS[language]
    things = rng.sample(scene.things, len(scene.things))
    parts = [fill(language, words["full"], **thing_words(language, thing)) for thing in things]
    return parts + [words["setting"][scene.background]]


def phrases(scene, language, rng, colours):
    """Every true phrase that names a colour, or every one that does not, in random order."""
    words = WORDS[language]
    found = [] if colours else [words["setting"][scene.background]]
    for thing in scene.things:
        for template in words["phrases"]:
            if ("{colour}" in template) == colours:
                found.append(fill(language, template, **thing_words(language, thing)))
        if colours:
            continue

        # Each thing to the left of a cat is a thing "to the left of a cat".
        for direction in DIRECTIONS:
            for other in scene.beside(thing, direction):
                found.append(fill_pair(language, words["pair"], other, direction, thing))
    rng.shuffle(found)
    return found


def fill_pair(language, template, thing, direction, other):
    """A template that says where `thing` is, seen from `other`."""
    words = WORDS[language]
    names = {"direction": words["direction"][direction], "other": words["kind"][other.kind]}
    return fill(language, template, **thing_words(language, thing), **names)


class Interviewer:
    """Asks about one scene in one language.

    text_only: there is no image, so every kind may be named in every language.
    """

    def __init__(self, scene, language, rng, text_only=False):
        self.scene = scene
        self.language = language
        self.rng = rng
        self.words = WORDS[language]
        every_kind = text_only or language == BASE
        self.kinds = [kind for kind in KINDS if every_kind or kind not in BASE_ONLY]

    def any_thing(self):
        """One of the scene's things."""
        return self.rng.choice(self.scene.things)

    def fill(self, template, thing, **values):
        """A template about one thing."""
        return fill(self.language, template, **thing_words(self.language, thing), **values)

    def ask(self, skill, thing=None, named_by=None):
        """A turn about `thing` (None: any), or None where the scene has no such question.

        named_by: how the question names it: "kind", "colour", "pronoun", or None for any.
        """
        words, scene = self.words, self.scene
        thing = thing or self.any_thing()
        if skill == "yes_no":
            question_type = self.rng.choice(YES_NO_TYPES)
            return self.ask_yes_no(question_type, self.rng.random() < 0.5, thing)

        # A relation is asked only where one thing is alone on a side of `thing`.
        answer, subject, values = words["answer"].get(skill), thing, {}
        if skill == "relation":
            sides = [(direction, scene.beside(thing, direction)) for direction in DIRECTIONS]
            sides = [(direction, others[0]) for direction, others in sides if len(others) == 1]
            if not sides:
                return None
            direction, subject = self.rng.choice(sides)
            answer, values = words["answer"]["at"], {"direction": words["direction"][direction]}

        # A question about the colour cannot name the thing by it.
        if named_by is None:
            named_by = "kind" if skill == "colour" else self.rng.choice(NAMED_BY)
        values |= {
            "it": self.fill(words["it"][named_by], thing),
            "number": words["number"][len(scene.things) - 1],
            "background": words["background"][scene.background],
            "mood": words["mood"][scene.background],
        }
        question = self.fill(self.rng.choice(words["ask"][skill]), thing, **values)
        return question, self.fill(answer, subject, **values)

    def ask_yes_no(self, question_type, yes, thing=None, pairs=None):
        """A turn whose answer is yes or no. A "no" changes one attribute of a thing that is there.

        pairs: (kind, colour) pairs to deny instead. Without them no held-out pair is denied.
        """
        thing = thing or self.any_thing()
        if not yes and question_type == "pair" and pairs:
            kind, colour = self.rng.choice(pairs)
            thing = replace(thing, kind=kind, colour=colour)
        elif not yes:
            thing = self.change_one(question_type, thing)
        return self.word_yes_no(question_type, yes, thing)

    def word_yes_no(self, question_type, yes, thing):
        """The turn that asks whether the scene shows `thing`."""
        table = self.words["yes_no"][question_type]
        return self.fill(self.rng.choice(table["ask"]), thing), table["yes" if yes else "no"]

    def change_one(self, question_type, thing):
        """A thing that differs from `thing` in one attribute and is not in the scene."""
        rng, things = self.rng, self.scene.things
        shown = {other.kind for other in things}
        if question_type == "kind":
            return replace(thing, kind=rng.choice([k for k in self.kinds if k not in shown]))
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
            colours = [c for c in COLOURS if (thing.kind, c) not in true]
            near = [c for c in colours if c in {other.colour for other in things}]
            return replace(thing, colour=self.choose_near(near, colours))
        kinds = [k for k in self.kinds if (k, thing.colour) not in true]
        near = [k for k in kinds if k in shown]
        return replace(thing, kind=self.choose_near(near, kinds))

    def choose_near(self, near, every):
        """One of `near` half of the time, if there are any; else one of `every`."""
        return self.rng.choice(near if near and self.rng.random() < 0.5 else every)

    def converse(self, num_turns, thing=None, named_by="pronoun"):
        """A conversation. A question brings one thing up, and more questions call it "it"; then
        comes another thing, or the scene as a whole. With `thing`, all is about that one."""
        rng = self.rng
        rest = [thing] if thing else rng.sample(self.scene.things, len(self.scene.things))
        whole_scene = ["count", "background", "mood", "yes_no"]
        turns = []
        while len(turns) < num_turns and (rest or whole_scene):
            if not rest:
                turns.append(self.ask(whole_scene.pop(rng.randrange(len(whole_scene)))))
                continue

            # One thing is brought up; a given one is never asked for by its place.
            one = rest.pop()
            openings = ("what", "where", "colour") if thing else ("what", "where", "colour", "at")
            first = rng.choice(openings)
            turns.append(self.ask(first, one, "kind" if first in ("where", "colour") else None))

            # not again what the first question or its answer gives away
            known = {"what": ("colour",), "at": ("where", "colour")}.get(first, (first,))
            skills = [s for s in ("where", "colour", "size", "relation") if s not in known]
            more = [self.ask(s, one, named_by) for s in rng.sample(skills, len(skills))]
            limit = num_turns - 1 if thing else rng.randint(1, 2)
            turns += [turn for turn in more if turn][:limit]
        return turns[:num_turns]

    def instruct_1(self):
        """The plainest questions: one attribute of a thing, given another. A single thing needs
        no lookup, so scenes of one thing are left out."""
        if len(self.scene.things) < 2:
            return []
        turns = [self.ask(skill, self.any_thing()) for skill in ("what", "colour") * 3]
        by_kind = ("where", "where", "size")
        return turns + [self.ask(skill, self.any_thing(), "kind") for skill in by_kind]

    def instruct_2(self):
        """More lookups, also by place and direction, and the first questions of yes or no."""
        if len(self.scene.things) < 2:
            return []
        skills = ("what", "colour", "where", "size", "at", "relation")
        turns = [self.ask(skill, self.any_thing()) for skill in skills]
        yes_no = [self.ask_yes_no("colour", yes, self.any_thing()) for yes in (True, False)]
        return [turn for turn in turns if turn] + yes_no

    def instruct(self, index):
        """{kind: turns} about the image of this number: X-LLaVA's four kinds, and yes/no."""
        rng, ask = self.rng, self.ask
        things = rng.sample(self.scene.things, len(self.scene.things)) * 4
        first, second = things[0], things[1]
        # Things take turns as subjects, in random order.
        skills = ("what", "colour", "count", "size")
        turns = {
            "object": [ask(skill, thing) for skill, thing in zip(skills, things)],
            "location": [
                ask("where", first, "kind"),
                ask("at", second),
                ask("where", second),
                ask("relation", first),
                ask("relation", second),
            ],
            "atmosphere": [ask("background"), ask("mood")],
            "conversation": self.converse(rng.randint(4, 6)),
        }

        # A single thing is asked about twice: no question twice.
        for kind in ("object", "location", "atmosphere"):
            turns[kind] = list(dict.fromkeys(filter(None, turns[kind])))[:4]
            rng.shuffle(turns[kind])

        # Four of the five types of yes/no. The bits of a counter decide which types and answers,
        # so that every type has as many yes as no.
        bits = index + 11 * LANGUAGES.index(self.language)
        left_out = YES_NO_TYPES[bits // 32 % 5]
        asked = [(name, bits >> n & 1) for n, name in enumerate(YES_NO_TYPES) if name != left_out]
        rng.shuffle(asked)
        turns["yes_no"] = [self.ask_yes_no(*pair, thing) for pair, thing in zip(asked, things)]
        return turns
