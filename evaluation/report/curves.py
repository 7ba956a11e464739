"""The loss of a stage, and its validations while it trained, as SVG."""

import json
import math
from typing import NamedTuple

import numpy as np

from evaluation.tables import escape, plain_name

WIDTH, HEIGHT, MAX_POINTS = 420, 250, 300
LEFT, RIGHT, TOP, BOTTOM = 46, WIDTH - 14, 26, HEIGHT - 40  # of the plot


def read_log(path):
    """(rows of steps, rows of validations) of log.jsonl, without skipped steps. Of a repeated step
    the later row counts."""
    steps, validations = {}, {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            if "validation" in row:
                validations[row["step"]] = row["validation"]
            elif row["loss"] is not None:
                steps[row["step"]] = row
        except (json.JSONDecodeError, KeyError):
            continue  # cut off by a crash
    return [steps[step] for step in sorted(steps)], dict(sorted(validations.items()))


def round_ticks(low, high, about=4):
    """Multiples of 1, 2 or 5 times a power of ten from low to high."""
    power = 10 ** math.floor(math.log10((high - low) / about))
    step = next(n * power for n in (1, 2, 5, 10) if n * power * about >= 0.7 * (high - low))
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def log_ticks(low, high):
    """Powers of ten from low to high, and as few multiples between them as make four ticks."""
    powers = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [power * factor for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks


def running_mean(values, weights=None):
    """At each step the mean of the last fifth of the steps so far, at most a twentieth of all."""
    n = np.arange(1, len(values) + 1)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    starts = n - np.minimum(-(-n // 5), max(1, len(values) // 20))
    sums = np.cumsum(np.concatenate([[0], np.asarray(values) * weights]))
    totals = np.cumsum(np.concatenate([[0], weights]))
    return (sums[n] - sums[starts]) / (totals[n] - totals[starts])


class Axis(NamedTuple):
    """Values from low to high on pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value):
        low, high, value = self.low, self.high, np.clip(value, self.low, self.high)
        if self.is_log:
            low, high, value = math.log(low), math.log(high), np.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self):
        return log_ticks(self.low, self.high) if self.is_log else round_ticks(self.low, self.high)


def draw_axes(x, y, x_name, y_name, format_y):
    """A line and a number per tick of y, a number per tick of x, and both names."""
    svg = f'<text x="{LEFT - 38}" y="14">{y_name}</text>'
    svg += f'<text x="{RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{x_name}</text>'
    for value in y.ticks():
        at = y.place(value)
        svg += f'<line x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        svg += f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{format_y(value)}</text>'
    for value in x.ticks():
        place = f'x="{x.place(value):.1f}" y="{BOTTOM + 17}" text-anchor="middle"'
        svg += f"<text {place}>{value:,.0f}</text>"
    return svg


def polyline(style, x, y, steps, values):
    points = zip(x.place(steps), y.place(values))
    text = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
    return f'<polyline class="{style}" points="{text}"/>'


def svg_box(style, label, content):
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}"'
    return f'<svg class="{style}" {box}>{content}</svg>'


def loss_plot(title, rows, x):
    """The loss of every step, and its running mean. The warm-up is shaded. x: the axis of steps; if
    it is logarithmic, so is the other."""
    steps = np.array([row["step"] for row in rows])
    loss = np.array([row["loss"] for row in rows], float)
    mean = running_mean(loss, [max(row.get("targets", 1), 1) for row in rows])

    # Outliers leave a linear plot: at its edge they are still seen.
    low, high = loss.min(), np.quantile(loss, 0.995)
    if x.is_log:
        low, high = max(low, 1e-4), loss.max()
    y = Axis(low, high if high > low else low + 1, BOTTOM, TOP, x.is_log)

    svg = ""
    rates = [row.get("lr", 0) for row in rows]
    warmup = x.place(steps[int(np.argmax(rates))])
    if warmup > LEFT:
        svg = f'<rect class="warmup" x="{LEFT}" y="{TOP}" width="{warmup - LEFT:.1f}"'
        svg += f' height="{BOTTOM - TOP}"><title>warm-up: the learning rate rises</title></rect>'
    svg += draw_axes(x, y, "step", "loss per target", "{:.3g}".format)

    # As many points as can be seen, evenly on the axis.
    space = np.geomspace if x.is_log else np.linspace
    shown = np.unique(np.searchsorted(steps, space(x.low, x.high, MAX_POINTS)))
    shown = shown[shown < len(steps)]
    for style, values in (("", loss), ("mean", mean)):
        svg += polyline(style, x, y, steps[shown], values[shown])
    return svg_box("log" if x.is_log else "linear", f"loss of {title}", svg)


def validation_plot(title, validations, x):
    """Right answers in percent: all, blind, and each skill as a faint line. x: of the loss."""
    steps, y = list(validations), Axis(0, 100, BOTTOM, TOP)
    name = "right answers, %: all, blind (grey), each skill (faint)"
    svg = draw_axes(x, y, "step", name, "{:.0f}".format)

    skills = [skill for skill in validations[steps[-1]]["n"] if skill != "all"]
    lines = [("skill", "full", skill) for skill in skills]
    for style, model, skill in (*lines, ("blind", "blind", "all"), ("mean", "full", "all")):
        values = [100 * validations[step][model].get(skill, 0) for step in steps]
        name = f"{plain_name(skill)}, {model}: {values[-1]:.0f}% at the end"
        line = polyline(style, x, y, steps, values)
        svg += line.replace("/>", f"><title>{name}</title></polyline>")
    return svg_box("log" if x.is_log else "linear", f"validation of {title}", svg)


def stage_card(title, rows, validations):
    """A card with the curves of a stage, on both kinds of axes."""
    mean = running_mean([row["loss"] for row in rows], [max(r.get("targets", 1), 1) for r in rows])
    seconds = sum(row.get("seconds", 0) for row in rows)
    summary = f"loss {mean[-1]:.3f} at the end · {rows[-1]['step']:,} steps · {seconds:,.0f} s"
    text = f'<h3>{escape(title)} <span class="soft small">{summary}</span></h3>'
    first, last = rows[0]["step"], rows[-1]["step"]
    for is_log in (True, False):
        x = Axis(first, max(last, first + 1), LEFT, RIGHT, is_log)
        text += loss_plot(title, rows, x)
        text += validation_plot(title, validations, x) if validations else ""

    if validations:
        step, last = list(validations.items())[-1]
        skills = sorted(last["n"].keys() - {"all"}, key=lambda skill: last["full"][skill])
        parts = ", ".join(f"{plain_name(s)} {last['full'][s]:.0%}" for s in skills)
        line = f"step {step:,}: {last['full']['all']:.1%} of {last['n']['all']:,} right, blind "
        line += f"{last['blind']['all']:.1%}. By skill: {parts}"
        text += f'<p class="soft small">{line}</p>'
    return f'<div class="card">{text}</div>\n'
