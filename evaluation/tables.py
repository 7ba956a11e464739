"""Tables of results. A command prints them as text, the report shows the same ones as HTML."""

import html
import re
from collections import defaultdict
from functools import partial
from typing import NamedTuple

MODELS = ("full", "blind", "chance")
MEASURES = ("R@1", "R@5", "MRR")  # of retrieval
LANGUAGE_NAMES = {"en": "English", "ko": "한국어", "zh": "中文", "all": "all languages"}
BAR_WIDTH = 190


class Table(NamedTuple):
    title: str
    head: list  # the titles of the columns
    lines: list  # (CSS class or "", cells as HTML)

    def as_html(self):
        rows = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in self.head) + "</tr>"]
        for style, cells in self.lines:
            row = "".join(f"<td>{LANGUAGE_NAMES.get(cell, cell)}</td>" for cell in cells)
            rows.append(f'<tr class="{style}">{row}</tr>')
        title = f"<h3>{self.title}</h3>" if self.title else ""
        return title + '<div class="scroll"><table>{}</table></div>'.format("\n".join(rows))

    def as_text(self):
        lines = [[self.head[0] or self.title, *self.head[1:]]]
        for style, (name, *cells) in self.lines:
            lines.append(["  " + name if style == "sub" else name, *cells])

        # Without markup, in aligned columns
        lines = [[html.unescape(re.sub("<.*?>", "", str(cell))) for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines)]
        rows = []
        for first, *others in lines:
            columns = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
            rows.append("  ".join([first.ljust(widths[0]), *columns]).rstrip())
        return "\n".join(rows) + "\n"


def escape(text):
    return html.escape(str(text))


def language_name(language):
    return LANGUAGE_NAMES.get(language, escape(language))


def plain_name(name):
    """The name of a split or a skill with spaces for its underscores."""
    return escape(name.replace("_", " "))


def number(value, low, high, scale=100):
    """A number with its interval. scale 100: as a percentage."""
    if value is None:
        return "undefined"  # 0 / 0
    digits, interval = 1, "(too few images)"
    if low is not None and high is not None:
        if scale != 100 and not 10 <= value < 100:
            digits = 3 if value < 10 else 0
        interval = f"({scale * low:.{digits}f} – {scale * high:.{digits}f})"
    return f'{scale * value:.{digits}f} <span class="interval">{interval}</span>'


def row_number(row, key="accuracy", scale=100):
    return number(row[key], row["low"], row["high"], scale)


def accuracy_bar(rows):
    """Full, blind and chance as bars from 0 to 100%, and the interval of full as a line."""
    bars = []
    for row, y, height in zip(rows, (2, 13, 18), (9, 4, 4)):
        size = f'width="{BAR_WIDTH * row["accuracy"]:.1f}" height="{height}"'
        bars.append(f'<rect class="{row["model"]}" y="{y}" {size} rx="2"/>')
    low, high = BAR_WIDTH * rows[0]["low"], BAR_WIDTH * rows[0]["high"]
    line = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="6.5" y2="6.5"/>'
    return f'<svg width="{BAR_WIDTH}" height="24">{"".join(bars)}{line}</svg>'


def accuracy_tables(rows):
    """A table per split: its languages, all of them, its kinds with their skills."""
    cells = {(row["model"], row["split"], row["language"], row["kind"]): row for row in rows}
    tables = []
    for split in dict.fromkeys(row["split"] for row in rows):
        # A line is a group of questions: its style and name, its language and kind.
        own = [row for row in rows if row["split"] == split]
        languages = sorted({row["language"] for row in own} - {"all"})
        groups = [("", language, language, "all") for language in languages]
        groups.append(("sum", "all", "all", "all"))
        for kind in sorted({row["kind"] for row in own} - {"all"}):
            _, dot, skill = kind.partition(".")
            groups.append(("sub" if dot else "", skill or kind, "all", kind))

        lines = []
        for style, name, language, kind in groups:
            line = [cells[model, split, language, kind] for model in MODELS]
            numbers = [f"{line[0]['n']:,}", *map(row_number, line)]
            lines.append((style, [plain_name(name), *numbers, accuracy_bar(line)]))
        head = ["", "n", *(f"{model} % (95%)" for model in MODELS), ""]
        tables.append(Table(plain_name(split), head, lines))
    return tables


def metric_tables(rows, scale=100):
    """F1, chrF, perplexity …: a line per metric, split and language, a column per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (row["split"], row["metric"], row["language"])):
        groups[row["metric"], row["split"], row["language"]][row["model"]] = row

    lines = []
    for (metric, split, language), cells in groups.items():
        names = [escape(metric), plain_name(split), escape(language)]
        numbers = [row_number(cells[m], "value", scale) if m in cells else "–" for m in models]
        lines.append(("", [*names, f"{next(iter(cells.values()))['n']:,}", *numbers]))

    titles = [f"{escape(model)} (95%)" for model in models]
    return [Table("", ["metric", "split", "language", "n", *titles], lines)]


def retrieval_tables(rows):
    lines = []
    for row in rows:
        names = [escape(row["direction"]), escape(row["model"]), f"{row['n']:,}", row["pool"]]
        numbers = [number(*row[measure]) for measure in MEASURES]
        lines.append(("sum" if row["model"] == "full" else "sub", names + numbers))

    titles = [f"{measure} % (95%)" for measure in MEASURES]
    return [Table("", ["from → to", "model", "queries", "candidates", *titles], lines)]


def run_tables(models):
    """Compared accuracies: a table per split, a line per run, a column per language."""
    splits = defaultdict(lambda: defaultdict(dict))
    for row in models:
        splits[row["split"]][row["model"]][row["language"]] = row

    tables = []
    for split, runs in splits.items():
        lines = []
        for name, cells in runs.items():
            style = "sub" if name == "chance" or name.endswith(", blind") else ""
            seeds = ", ".join(f"{100 * seed:.1f}" for seed in cells["all"]["seeds"])
            lines.append((style, [escape(name), *map(row_number, cells.values()), seeds]))

        titles = [f"{escape(name)} % (95%), n {row['n']:,}" for name, row in cells.items()]
        tables.append(Table(plain_name(split), ["", *titles, "all, each seed"], lines))
    return tables


def pair_tables(pairs):
    """Compared runs: a line per difference, in points."""
    lines = []
    for row in pairs:
        seeds = "one seed"
        if "seeds_low" in row:
            seeds = f"{100 * row['seeds_low']:.1f} – {100 * row['seeds_high']:.1f}"
        names = [
            f"{escape(row['model'])} against {escape(row['against'])}",
            plain_name(row["split"]),
            escape(row["language"]),
        ]
        numbers = [f"{row['effect']:.2f}", f"{row['p_holm']:.4f}", seeds]
        lines.append(("", [*names, f"{row['n']:,}", row_number(row, "difference"), *numbers]))

    head = ["", "split", "language", "n", "points (95%)", "d_z", "p (Holm)", "over seeds (95%)"]
    return [Table("differences", head, lines)]


def judge_tables(rows):
    lines = []
    for row in rows:
        names = [escape(row["measure"]), escape(row["language"]), f"{row['n']:,}"]
        lines.append(("", [*names, row_number(row, "value", 1)]))
    return [Table("", ["measure", "language", "n", "value (95%)"], lines)]


def result_tables(results):
    """{key: its tables} of a command's results, with the keys of its JSON file."""
    makers = {
        "rows": accuracy_tables,
        "scores": metric_tables,
        "likelihood": partial(metric_tables, scale=1),
        "retrieval": retrieval_tables,
        "models": run_tables,
        "pairs": pair_tables,
        "judge": judge_tables,
    }
    return {key: make(results[key]) for key, make in makers.items() if results.get(key)}


def print_results(results):
    for tables in result_tables(results).values():
        print("\n".join(table.as_text() for table in tables))
