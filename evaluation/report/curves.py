"""Loss curves of a stage, as SVG."""

import json
import math

import numpy as np

from evaluation.tables import escape

WIDTH, HEIGHT, MAX_POINTS = 560, 250, 500
LEFT, RIGHT, TOP, BOTTOM = 52, WIDTH - 24, 14, HEIGHT - 30  # of the plot


def read_log(path):
    """The rows of log.jsonl, without skipped steps. Of a repeated step the later row counts."""
    by_step = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            by_step[row["step"]] = row
        except (json.JSONDecodeError, KeyError):
            continue  # cut off by a crash
    return [by_step[step] for step in sorted(by_step) if by_step[step]["loss"] is not None]


def round_ticks(low, high, about=4):
    """Multiples of 1, 2 or 5 times a power of ten from low to high."""
    power = 10 ** math.floor(math.log10((high - low) / about))
    step = next(n * power for n in (1, 2, 5, 10) if n * power * about >= 0.7 * (high - low))
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def running_mean(values):
    """The mean of the last twentieth of the run, at each step."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([[0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def loss_curve(title, rows):
    """A card with the loss of every step, and its running mean."""
    steps = np.array([row["step"] for row in rows])
    loss = np.array([row["loss"] for row in rows], float)
    mean = running_mean(loss)
    # The first steps would squeeze the rest: the highest half percent is cut off.
    low, high = float(loss.min()), float(np.quantile(loss, 0.995))
    high = high if high > low else low + 1

    def x_of(step):
        return LEFT + (RIGHT - LEFT) * (step - steps[0]) / max(1, steps[-1] - steps[0])

    def y_of(value):
        return BOTTOM - (BOTTOM - TOP) * (min(value, high) - low) / (high - low)

    # Axes: a line and a number per tick of the loss, a number per tick of the steps.
    svg = ""
    for value in round_ticks(low, high):
        y = y_of(value)
        svg += f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        svg += f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    for step in round_ticks(steps[0], max(steps[-1], steps[0] + 1)):
        place = f'x="{x_of(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle"'
        svg += f"<text {place}>{step:,.0f}</text>"

    # A long run has more steps than the image has pixels.
    shown = np.unique(np.linspace(0, len(loss) - 1, min(MAX_POINTS, len(loss))).astype(int))
    for style, values in (("", loss), ("mean", mean)):
        points = " ".join(f"{x_of(steps[i]):.1f},{y_of(values[i]):.1f}" for i in shown)
        svg += f'<polyline class="{style}" points="{points}"/>'

    seconds = sum(row.get("seconds", 0) for row in rows)
    summary = f"loss {mean[-1]:.3f} at the end · {steps[-1]:,} steps · {seconds:,.0f} s"
    head = f'<h3>{escape(title)} <span class="soft small">{summary}</span></h3>'
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss of {escape(title)}"'
    return f'<div class="card">{head}<svg {box}>{svg}</svg></div>\n'
