"""Fertility: tokens per character, by language, before and after the vocabulary is extended."""

from itertools import islice

from course.figures._shapes import BLUE, GREY, ORANGE, rect, svg, text
from tokenizer import Tokenizer
from vocabulary.files import read_lines
from vocabulary.report import fertility_counts

ENDING = ".svg"
MODELS = {"en.model": (ORANGE, "English only"), "tokenizer.model": (BLUE, "extended")}
LINES = 2000
PER_TOKEN = 180  # pixels


def draw(run):
    parts, y = [], 20
    for name, (colour, label) in MODELS.items():
        parts += [rect(60, y - 10, 12, 12, colour), text(78, y, f"{name}: {label}")]
        y += 20
    for language in ("en", "ko", "zh"):
        lines = list(islice(read_lines([run / "data" / "text" / f"{language}.txt"]), LINES))
        y += 14
        parts.append(text(50, y + 22, language, anchor="end"))
        for name, (colour, _) in MODELS.items():
            counts, _ = fertility_counts(Tokenizer.load(run / name), lines)
            value = counts["tokens"] / counts["characters"]
            parts.append(rect(60, y, value * PER_TOKEN, 20, colour))
            parts.append(text(66 + value * PER_TOKEN, y + 15, f"{value:.2f}"))
            y += 23
    parts.append(
        text(60, y + 20, f"tokens per character, {LINES:,} lines of {run}/data/text", GREY)
    )
    return svg(520, y + 32, parts)
