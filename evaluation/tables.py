"""Tables of results. A command prints them as text, the report shows the same ones as HTML."""

import html
import math
import re
import textwrap
from collections import defaultdict
from functools import partial
from typing import NamedTuple

from evaluation.metrics import write_results
from vocabulary.command import text_width

MODELS = ("full", "blind", "chance")
MEASURES = ("R@1", "R@5", "MRR")  # of retrieval
LANGUAGE_NAMES = {
    **{"en": "English", "ko": "한국어", "zh": "中文", "all": "all languages"},
    **{"ar": "العربية", "sw": "Kiswahili", "tr": "Türkçe"},
}
BAR_WIDTH = 190
TERMINAL = 80  # columns of a terminal


class Table(NamedTuple):
    title: str
    head: list  # titles of the columns; those of intervals name them, "(95%)"
    lines: list  # (CSS class, cells as HTML)
    num_groups: int = 0  # leading columns that may become headings where a line is too long

    def as_html(self):
        rows = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in self.head) + "</tr>"]
        for style, cells in self.lines:
            row = "".join(f"<td>{LANGUAGE_NAMES.get(cell, cell)}</td>" for cell in cells)
            rows.append(f'<tr class="{style}">{row}</tr>')
        title = f"<h3>{self.title}</h3>" if self.title else ""
        return title + '<div class="scroll"><table>{}</table></div>'.format("\n".join(rows))

    def as_text(self):
        """Aligned columns without markup, on a terminal of 80 columns."""
        lines = [self.head]
        for style, (name, *cells) in self.lines:
            lines.append(["  " + name if style == "sub" else name, *cells])
        lines = [[html.unescape(re.sub("<.*?>", "", cell)) for cell in line] for line in lines]
        if not any(line[-1] for line in lines):  # a column of bars
            lines = [line[:-1] for line in lines]

        # Columns before the first interval are labels. Long ones are cut.
        num_labels = next((i for i, cell in enumerate(lines[0]) if "95%" in cell), 1)
        lines = [[*(cut(c, 30) for c in line[:num_labels]), *line[num_labels:]] for line in lines]

        # Too long: the first columns become headings of the lines that share them.
        num_groups = 0
        while num_groups < self.num_groups and total_width(lines, num_groups) > TERMINAL:
            num_groups += 1
        if total_width(lines, num_groups) > TERMINAL:
            lines = [[cell.replace(" – ", "–") for cell in line] for line in lines]
        groups = defaultdict(list)
        for line in lines[1:]:
            heading = ", ".join([html.unescape(self.title), *line[:num_groups]]).strip(", ")
            groups[heading].append(line[num_groups:])
        text = ""
        for heading, own in groups.items():
            text += f"{cut(heading, TERMINAL)}\n" if heading else ""
            text += aligned([lines[0][num_groups:], *own], num_labels - num_groups)
        return text


def total_width(lines, first=0):
    """The columns that aligned lines take, without their first cells."""
    widths = [max(map(text_width, column)) for column in zip(*lines)][first:]
    return sum(widths) + 2 * (len(widths) - 1)


def cut(text, width):
    """A text of at most `width` columns."""
    if text_width(text) <= width:
        return text
    while text_width(text) >= width:
        text = text[:-1]
    return text + "…"


def aligned(lines, num_labels):
    """Lines as text, the first column to the left. What does not fit beside the labels comes below
    them, with the labels again."""
    # One column of numbers stays beside the labels, however wide it is.
    num_cells = len(lines[0])
    while (
        num_cells > num_labels + 1 and total_width([line[:num_cells] for line in lines]) > TERMINAL
    ):
        num_cells -= 1
    widths = [max(map(text_width, column)) for column in zip(*lines)]
    text = ""
    for line in lines:
        pads = [" " * (width - text_width(cell)) for cell, width in zip(line, widths)]
        cells = [line[0] + pads[0], *map("".join, zip(pads[1:num_cells], line[1:num_cells]))]
        text += "  ".join(cells).rstrip() + "\n"
    if num_cells < len(lines[0]):
        text += aligned([line[:num_labels] + line[num_cells:] for line in lines], num_labels)
    return text


def escape(text):
    return html.escape(str(text))


def language_name(language):
    return LANGUAGE_NAMES.get(language, escape(language))


def plain_name(name):
    """A split or a skill with spaces for underscores."""
    return escape(name.replace("_", " "))


def labels(row, *keys):
    """Cells with these fields of a row."""
    row = row | {"n": f"{row['n']:,}", "split": row.get("split", "").replace("_", " ")}
    return [escape(row[key]) for key in keys]


def number(value, low, high, scale=100):
    """A number with its interval. scale 100: as a percentage."""
    if value is None:
        return "undefined"  # 0 / 0
    digits, interval = 1, "(too few images)"
    if None not in (low, high) and math.isfinite(high - low):
        # Perplexities and grades differ by orders of magnitude: about three digits each.
        if scale != 100 and not 10 <= value < 100:
            digits = 3 if value < 10 else 0
        interval = f"({scale * low:.{digits}f} – {scale * high:.{digits}f})"
    return f'{scale * value:.{digits}f} <span class="interval">{interval}</span>'


def row_number(row, key="accuracy", scale=100):
    return number(row[key], row["low"], row["high"], scale)


def accuracy_bar(rows):
    """Full, blind and chance as bars, and the interval of full as a line."""
    svg = ""
    for row, y, height in zip(rows, (2, 13, 18), (9, 4, 4)):
        size = f'width="{BAR_WIDTH * row["accuracy"]:.1f}" height="{height}"'
        svg += f'<rect class="{row["model"]}" y="{y}" {size} rx="2"/>'
    low, high = BAR_WIDTH * rows[0]["low"], BAR_WIDTH * rows[0]["high"]
    svg += f'<line x1="{low:.1f}" x2="{high:.1f}" y1="6.5" y2="6.5"/>'
    return f'<svg width="{BAR_WIDTH}" height="24">{svg}</svg>'


def accuracy_line(style, name, rows):
    """A group of questions. rows: of full, blind and chance."""
    cells = [plain_name(name), *labels(rows[0], "n"), *map(row_number, rows), accuracy_bar(rows)]
    return style, cells


def accuracy_tables(rows):
    """A table per split."""
    splits = defaultdict(lambda: defaultdict(list))
    for row in rows:
        splits[row["split"]][row["language"], row["kind"]].append(row)

    head = ["", "n", *(f"{model} % (95%)" for model in MODELS), ""]
    tables = []
    for split, groups in splits.items():
        # Each language, all of them, each kind and its skills
        languages = sorted({language for language, _ in groups} - {"all"})
        lines = [accuracy_line("", name, groups[name, "all"]) for name in languages]
        lines.append(accuracy_line("sum", "all", groups["all", "all"]))
        for kind in sorted({kind for _, kind in groups} - {"all"}):
            _, dot, skill = kind.partition(".")
            lines.append(accuracy_line("sub" if dot else "", skill or kind, groups["all", kind]))
        tables.append(Table(plain_name(split), head, lines))
    return tables


def metric_tables(rows, scale=100):
    """A line per metric, split and language, a column per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (row["split"], row["metric"], row["language"])):
        groups[row["split"], row["metric"], row["language"]][row["model"]] = row

    lines = []
    for own in groups.values():
        # All models are on one line: they answered the same questions.
        cells = labels(next(iter(own.values())), "metric", "split", "language", "n")
        cells += [row_number(own[m], "value", scale) if m in own else "–" for m in models]
        lines.append(("", cells))
    titles = [f"{escape(model)} (95%)" for model in models]
    return [Table("", ["metric", "split", "language", "n", *titles], lines, 2)]


def retrieval_tables(rows):
    """A line per direction. Without the image only the likelihood itself ("raw") is a measure: all
    else is equal to chance, which is the same for every direction."""
    lines = []
    for row in rows:
        name, model = row["direction"], row["model"]
        if model == "blind" and name.endswith(", raw"):
            name = name.replace("raw", "blind")
        elif model != "full":
            continue
        cells = [number(*row[measure]) for measure in MEASURES]
        lines.append(("", [escape(name), *cells]))
    if chance := [row for row in rows if row["model"] == "chance"]:
        lines.append(("sub", ["by chance", *(number(*chance[0][name]) for name in MEASURES)]))
    title = "{} queries, {} candidates each".format(*labels(rows[0], "n", "pool"))
    titles = [f"{measure} % (95%)" for measure in MEASURES]
    return [Table(title, ["from → to", *titles], lines)]


def run_tables(models):
    """Compared accuracies: a table per split, a line per run, a column per language."""
    splits = defaultdict(lambda: defaultdict(list))
    for row in models:
        splits[row["split"]][row["model"]].append(row)

    tables = []
    for split, runs in splits.items():
        lines = []
        for name, rows in runs.items():
            # Baselines are indented below the runs.
            style = "sub" if name == "chance" or name.endswith(", blind") else ""
            seeds = ", ".join(f"{100 * seed:.1f}" for seed in rows[-1]["seeds"])
            lines.append((style, [escape(name), *map(row_number, rows), seeds]))
        titles = ["{} % (95%), n {}".format(*labels(row, "language", "n")) for row in rows]
        tables.append(Table(plain_name(split), ["", *titles, "all, each seed"], lines))
    return tables


def pair_tables(pairs):
    """Compared runs: a line per difference, in points."""
    lines = []
    for row in pairs:
        seeds = "one seed"
        if "seeds_low" in row:
            seeds = f"{100 * row['seeds_low']:.1f} – {100 * row['seeds_high']:.1f}"
        name = " against ".join(labels(row, "model", "against"))
        names = [name, *labels(row, "split", "language", "n"), row_number(row, "difference")]
        effect = "–" if row["effect"] in (None, math.inf, -math.inf) else f"{row['effect']:.2f}"
        lines.append(("", [*names, effect, f"{row['p_holm']:.4f}", seeds]))
    head = ["", "split", "language", "n", "points (95%)", "d_z", "p (Holm)", "over seeds (95%)"]
    return [Table("differences", head, lines, 2)]


def judge_tables(rows):
    lines = []
    for row in rows:
        lines.append(("", [*labels(row, "measure", "language", "n"), row_number(row, "value", 1)]))
    return [Table("", ["measure", "language", "n", "value (95%)"], lines, 1)]


TABLES = {  # keys of the commands' JSON files
    "rows": accuracy_tables,
    "scores": metric_tables,
    "likelihood": partial(metric_tables, scale=1),
    "retrieval": retrieval_tables,
    "models": run_tables,
    "pairs": pair_tables,
    "judge": judge_tables,
}


def result_tables(results):
    """{key: its tables} of a command's results."""
    return {key: make(results[key]) for key, make in TABLES.items() if results.get(key)}


def show_results(results, out):
    """Writes a command's results to the JSON file `out`, if given, then prints them."""
    # First to the disk: printing ends where its reader ends, such as `head`.
    if out:
        write_results(out, results)
    for tables in result_tables(results).values():
        print("\n".join(table.as_text() for table in tables))
    for sentence in results.get("conclusions", []):
        print(textwrap.fill(sentence, TERMINAL))
