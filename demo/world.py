"""What the demo world is made of, and random scenes of it.

A scene shows 1 to 3 things of different kinds and colours in front of a background. So "the cat"
and "the red thing" each name one thing. Two gaps are left in the training data on purpose, to
measure how a model generalises:

    unseen combinations   no kind ever has its held-out colour
    cross-lingual         images of a base-only kind are described in the base language alone;
                          other languages name that kind in text without images

To add a kind, add it at the end of things.json and its words to each file of demo/words, then
remake the atlas from an emoji font: python -m demo.write --atlas NotoColorEmoji.ttf
"""

import random
from dataclasses import dataclass
from pathlib import Path

from vocabulary.files import read_json


@dataclass(frozen=True)
class Kind:
    emoji: str  # gives the silhouette in assets/atlas.png
    held_out: str  # the colour that it never has in training
    base_only: bool = False  # training images of it are described in the base language alone
    centre_only: bool = False  # of the emoji, only the part connected to its centre is drawn


DATA = read_json(Path(__file__).with_name("things.json"))
KINDS = {name: Kind(**values) for name, values in DATA["kinds"].items()}
COLOURS = DATA["colours"]  # red, green, blue
SIZES = {"big": 56, "small": 40}  # pixels of the longer side, ± 5%
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
BACKGROUNDS = ("day", "night", "sunset", "snow", "rain")
DIRECTIONS = ("left", "right", "above", "below")

# What may be asked about a scene, and the kind of record that each question makes.
SKILLS = {
    **dict.fromkeys(("what", "colour", "count", "size"), "object"),
    **dict.fromkeys(("where", "at", "relation"), "location"),
    **dict.fromkeys(("background", "mood"), "atmosphere"),
    "yes_no": "yes_no",
}
YES_NO_TYPES = ("pair", "kind", "colour", "place", "size")
HELD_OUT = {name: kind.held_out for name, kind in KINDS.items()}
BASE_ONLY = tuple(name for name, kind in KINDS.items() if kind.base_only)


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    size: str
    place: int  # 0 … 8, row by row


@dataclass(frozen=True)
class Scene:
    """1 to 3 things in front of a background."""

    things: tuple
    background: str

    def beside(self, thing, direction):
        """The things strictly in `direction` of `thing`, by column or by row."""
        sign = 1 if direction in ("right", "below") else -1
        axis = 1 if direction in ("left", "right") else 0
        place = divmod(thing.place, 3)[axis]
        return [t for t in self.things if (divmod(t.place, 3)[axis] - place) * sign > 0]

    @property
    def base_only(self):
        """Whether training data may describe this scene in the base language alone."""
        return any(thing.kind in BASE_ONLY for thing in self.things)

    @property
    def key(self):
        """What makes two scenes the same; the order of the things does not."""
        return frozenset(self.things), self.background


def random_for(*names):
    """A generator that depends on its names alone, not on what was drawn before it."""
    return random.Random("/".join(map(str, names)))


def random_scene(rng, base_only=None, held_out=False):
    """A scene of 1 to 3 things. With `held_out` the first has its held-out colour, else none has.

    base_only: True shows one such kind, False none, None one in a quarter of the scenes.
    """
    if base_only is None:
        base_only = rng.random() < 0.25
    number = rng.choices((1, 2, 3), (2, 4, 4))[0]
    ordinary = [kind for kind in KINDS if kind not in BASE_ONLY]

    # The first thing is special: base-only, or in its held-out colour.
    while True:
        kinds = [rng.choice(BASE_ONLY)] if base_only else []
        kinds += rng.sample(ordinary, number - len(kinds))
        colours = rng.sample(list(COLOURS), number)
        if held_out:
            first = HELD_OUT[kinds[0]]
            colours = [first] + [colour for colour in colours if colour != first][: number - 1]

        # Draw again if a thing has its held-out colour and must not.
        pairs = list(zip(kinds, colours))
        free = pairs[1:] if held_out else pairs
        if any(HELD_OUT[kind] == colour for kind, colour in free):
            continue
        places = rng.sample(range(9), number)
        things = [
            Thing(*pair, rng.choice(list(SIZES)), place) for pair, place in zip(pairs, places)
        ]
        return Scene(tuple(things), rng.choice(BACKGROUNDS))
