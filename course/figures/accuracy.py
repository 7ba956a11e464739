"""Accuracy per language with its intervals: with the image, without it, and chance."""

from course.figures._shapes import BLUE, GREY, ORANGE, PALE, line, rect, svg, text
from vocabulary.files import read_json

ENDING = ".svg"
COLOURS = {"full": BLUE, "blind": ORANGE, "chance": GREY}
WIDTH, LEFT, STEP = 640, 170, 18  # pixels


def read_rows(run):
    """{(split, language): {"full": row, "blind": row, "chance": row}}."""
    path = run / "eval.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give --run a finished demo")
    groups = {}
    for row in read_json(path)["rows"]:
        if row["kind"] == "all" and row["language"] != "all":
            groups.setdefault((row["split"], row["language"]), {})[row["model"]] = row
    return groups


def draw(run):
    scale = (WIDTH - LEFT - 130) / 100
    groups = read_rows(run)
    height = 50 + len(groups) * (len(COLOURS) * STEP + 14) + 20
    parts = []
    for percent in range(0, 101, 25):
        x = LEFT + percent * scale
        parts += [rect(x, 36, 1, height - 66, PALE), text(x, height - 14, percent, GREY, "middle")]
    for n, (name, colour) in enumerate(COLOURS.items()):
        parts += [rect(LEFT + n * 90, 12, 10, 10, colour), text(LEFT + n * 90 + 16, 21, name)]

    y = 50
    for (split, language), rows in groups.items():
        any_row = next(iter(rows.values()))
        parts.append(text(8, y + 4, f"{split.replace('_', ' ')}, {language}"))
        parts.append(text(8, y + 20, f"n = {any_row['n']}", GREY))
        for name, colour in COLOURS.items():
            value, low, high = (100 * rows[name][key] for key in ("accuracy", "low", "high"))
            points = [(LEFT + low * scale, y), (LEFT + high * scale, y)]
            parts += [line(points, colour, 3), rect(LEFT + value * scale - 3, y - 5, 6, 10, colour)]
            words = f"{value:.1f} ({low:.1f} – {high:.1f})"
            parts.append(text(LEFT + 100 * scale + 10, y + 4, words, colour))
            y += STEP
        y += 14
    return svg(WIDTH, height, parts)
