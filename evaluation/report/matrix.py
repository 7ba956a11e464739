"""Retrieval as one image: a square for each pair of image and languages, darker where more is
found."""

from evaluation.tables import escape, language_name

CELL, LABEL = (84, 46), 110  # width and height of a square; width of the row names


def retrieval_matrix(rows, measure="R@1"):
    """The rows of `retrieve` as SVG: from (rows) to (columns), the full model's share found."""
    found = {tuple(row["direction"].split(" → ")): row for row in rows if row["model"] == "full"}
    found = {pair: row for pair, row in found.items() if not pair[1].endswith(", raw")}
    names = sorted(
        {name for pair in found for name in pair}, key=lambda name: (name != "image", name)
    )
    (width, height), parts = CELL, []
    for n, name in enumerate(names):
        # The same names, in the same order, above and beside
        middle = LABEL + n * width + width / 2
        parts.append(svg_text(middle, height - 14, language_name(name), "middle"))
        parts.append(svg_text(LABEL - 10, (n + 1.6) * height, language_name(name), "end"))
        for m, source in enumerate(names):
            if row := found.get((source, name)):
                parts.append(square(LABEL + n * width, (m + 1) * height, row[measure]))
    size = f"{LABEL + len(names) * width} {(len(names) + 1) * height}"
    chance = f"by chance {1 / rows[0]['pool']:.0%}" if measure == "R@1" else ""
    title = f"{measure} in percent, with 95% intervals; from the row to the column; {chance}"
    return (
        f'<p class="soft">{escape(title)}</p>'
        f'<svg class="matrix" viewBox="0 0 {size}" role="img">{"".join(parts)}</svg>'
    )


def square(left, top, interval):
    """One share with its interval, on a ground that is darker the larger it is."""
    value, low, high = interval
    x, text = left + CELL[0] / 2, f"{100 * low:.0f} – {100 * high:.0f}"
    size = f'width="{CELL[0] - 3}" height="{CELL[1] - 3}"'
    ground = (
        f'<rect class="full" x="{left}" y="{top}" {size} rx="4" fill-opacity="{0.45 * value:.2f}"/>'
    )
    return (
        ground + svg_text(x, top + 20, f"{100 * value:.1f}") + svg_text(x, top + 36, text, "small")
    )


def svg_text(x, y, text, style="middle"):
    return f'<text class="{style}" x="{x:.0f}" y="{y:.0f}">{text}</text>'
