"""The loss of each stage, step by step, as log.jsonl has it."""

import json

from course.figures._shapes import BLUE, GREY, PALE, line, rect, svg, text

ENDING = ".svg"
STAGES = ("vision", "text", "align", "instruct-1", "instruct-2", "instruct-3", "instruct")
WIDTH, HEIGHT, MARGIN = 250, 150, 45


def read_losses(run, stage):
    """[(step, loss)] of the steps with an update."""
    path = run / stage / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give --run a finished demo")
    rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["loss"]) for row in rows if not row["skipped"]]


def smooth(losses, count=80):
    """At most `count` points: the mean of each stretch of steps."""
    size = -(-len(losses) // count)
    stretches = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [tuple(sum(column) / len(part) for column in zip(*part)) for part in stretches]


def curve(stage, losses, x, y):
    """One stage in a frame of its own, from zero to its largest loss."""
    points = smooth(losses)
    steps, top = losses[-1][0], max(loss for _, loss in points)
    parts = [rect(x, y, WIDTH, HEIGHT, PALE), text(x, y - 6, stage)]
    parts.append(
        line([(x + WIDTH * s / steps, y + HEIGHT * (1 - v / top)) for s, v in points], BLUE)
    )
    parts += [
        text(x - 4, y + 10, f"{top:.3g}", GREY, "end"),
        text(x - 4, y + HEIGHT, "0", GREY, "end"),
        text(x + WIDTH, y + HEIGHT + 14, f"{steps:,} steps", GREY, "end"),
    ]
    end = f"ends at {points[-1][1]:.3g}"
    return [*parts, text(x + WIDTH, y - 6, end, BLUE, "end")]


def draw(run):
    parts = []
    for n, stage in enumerate(STAGES):
        x = MARGIN + n % 3 * (WIDTH + MARGIN)
        y = 30 + n // 3 * (HEIGHT + 50)
        parts += curve(stage, read_losses(run, stage), x, y)
    rows = -(-len(STAGES) // 3)
    return svg(3 * (WIDTH + MARGIN) + 10, rows * (HEIGHT + 50) + 10, parts)
