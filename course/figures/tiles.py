"""Which tiles of queries × keys flash attention computes: causal, documents, a window, a prefix."""

from course.figures._shapes import BLUE, GREY, ORANGE, PALE, rect, svg, text

ENDING = ".svg"
SIZE, BLOCK, CELL, MARGIN = 32, 4, 6, 16  # tokens, tokens of a tile's side, pixels


def mask_ranges():
    """{name: (start, end) of each query's keys}."""
    queries = range(SIZE)
    documents = [(0, 12), (12, 20), (20, SIZE)]
    first = [next(a for a, b in documents if a <= i < b) for i in queries]
    return {
        "causal": ([0] * SIZE, [i + 1 for i in queries]),
        "three documents": (first, [i + 1 for i in queries]),
        "a window of 6": ([max(0, i - 5) for i in queries], [i + 1 for i in queries]),
        "an image, then text": ([0] * SIZE, [max(14, i + 1) for i in queries]),
    }


def tile_kind(start, end, i, j):
    """Of the tile at query i and key j: "skipped", "masked" or "plain"."""
    rows = range(i, i + BLOCK)
    visible = [start[row] <= key < end[row] for row in rows for key in range(j, j + BLOCK)]
    first, last = min(start[i : i + BLOCK]) // BLOCK * BLOCK, max(end[i : i + BLOCK])
    if not first <= j < last:
        return "skipped"
    return "plain" if all(visible) else "masked"


def draw(run):
    """The figure; it is the same for every run."""
    colours = {"skipped": PALE, "masked": ORANGE, "plain": BLUE}
    side, parts = SIZE * CELL, []
    for n, (name, (start, end)) in enumerate(mask_ranges().items()):
        x, y, counts = MARGIN + n * (side + MARGIN), 44, dict.fromkeys(colours, 0)
        for i in range(0, SIZE, BLOCK):
            for j in range(0, SIZE, BLOCK):
                kind = tile_kind(start, end, i, j)
                counts[kind] += 1
                size = BLOCK * CELL - 1
                parts.append(rect(x + j * CELL, y + i * CELL, size, size, colours[kind]))

        # What each query attends to.
        for i in range(SIZE):
            width = (end[i] - start[i]) * CELL
            parts.append(rect(x + start[i] * CELL, y + i * CELL + 2, width - 1, 1, "black"))
        parts.append(text(x, 34, name))
        done = counts["masked"] + counts["plain"]
        words = f"{done} of {sum(counts.values())} tiles, {counts['plain']} without a mask"
        parts.append(text(x, y + side + 16, words, GREY))
    width, below = MARGIN + 4 * (side + MARGIN), 44 + side + 42
    for n, (kind, colour) in enumerate(colours.items()):
        parts += [rect(MARGIN + n * 100, below - 10, 12, 12, colour)]
        parts.append(text(MARGIN + n * 100 + 18, below, kind))
    parts.append(text(MARGIN, 16, "Rows: queries. Columns: keys. Black: what a query attends to."))
    return svg(width, below + 12, parts)
