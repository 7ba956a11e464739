"""Merges growing: one sentence in each language, after 0, 10, 30 … merges."""

from itertools import islice

from course.figures._shapes import GREY, rect, svg, text
from tokenizer import bpe_textbook, learn_merges_textbook
from vocabulary.command import text_width
from vocabulary.fast_bpe import count_words
from vocabulary.files import read_lines
from vocabulary.scripts import split_word
from vocabulary.sentencepiece_file import SPACE

ENDING = ".svg"
SENTENCES = {
    "en": "the big red cat is at the top left",
    "ko": "큰 빨간 고양이가 왼쪽 위에 있어요",
    "zh": "左上角有一只红色的大猫",
}
STEPS = (0, 3, 10, 30, 100, 200)
COLOURS = ("#cfe3f7", "#fbdcc4", "#d3efd8", "#f3d4e6", "#fbf0bd")
LINES = 300  # of each text: enough to learn from, quick with the textbook's BPE


def draw(run):
    parts, y = [], 0
    for language, sentence in SENTENCES.items():
        lines = read_lines([run / "data" / "text" / f"{language}.txt"])
        # without chats: USER and ASSISTANT would fill the first merges
        words = count_words(islice((line for line in lines if "USER" not in line), LINES))
        pieces = {}
        for word, n in words.items():
            for part in split_word(SPACE + word):
                pieces[part] = pieces.get(part, 0) + n
        merges = learn_merges_textbook(pieces, max(STEPS), 16)
        y += 24
        parts.append(text(10, y, f"{language}: BPE learnt from {LINES} lines", GREY))
        for step in STEPS:
            y += 26
            parts += row(y, step, encode(sentence, merges[:step]))
        y += 12
    return svg(760, y + 10, parts)


def encode(sentence, merges):
    """The pieces of a sentence with some of the merges."""
    scores = {piece: -rank for rank, piece in enumerate(merges)}
    words = [split_word(SPACE + word) for word in sentence.split()]
    return [piece for parts in words for part in parts for piece in bpe_textbook(part, scores)]


def row(y, step, pieces):
    """The pieces as coloured boxes, behind the number of merges."""
    parts = [text(90, y, f"{step} merges", GREY, "end")]
    x = 100
    for i, piece in enumerate(pieces):
        width = 8 * text_width(piece) + 5
        parts.append(rect(x, y - 15, width, 20, COLOURS[i % len(COLOURS)], piece))
        parts.append(text(x + width / 2, y, piece, anchor="middle"))
        x += width + 2
    return [*parts, text(x + 8, y, len(pieces), GREY)]
