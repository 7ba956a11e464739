"""What a reader sees of a streamed answer: each token decoded alone, and by StreamDecoder."""

from course.figures._shapes import GREEN, GREY, ORANGE, PALE, rect, svg, text

ENDING = ".svg"
TEXT = "로켓이에요 🚀"
ROW, COLUMNS = 22, (12, 150, 290, 430)


def stream(tokenizer):
    """[(piece, the token alone, what the decoder shows)] of TEXT."""
    from tokenizer import StreamDecoder

    decoder, rows = StreamDecoder(tokenizer), []
    for token in tokenizer.encode(TEXT):
        alone = tokenizer.decode([token])
        rows.append((tokenizer.readable(tokenizer.piece(token)), alone, decoder.push(token)))
    return [*rows, ("(end)", "", decoder.flush())]


def table(title, rows, y):
    """The rows as text, one below the other."""
    parts = [text(COLUMNS[0], y, title)]
    for x, head in zip(COLUMNS, ("token", "decoded alone", "shown", "so far")):
        parts.append(text(x, y + ROW, head, GREY))
    so_far = ""
    for n, (piece, alone, shown) in enumerate(rows, 2):
        so_far += shown
        level, colour = y + n * ROW, ORANGE if "\ufffd" in alone else GREEN
        if n % 2:
            parts.append(rect(0, level - 15, 600, ROW, PALE))
        cells = (piece, "black"), (alone, colour), (shown or "–", "black"), (so_far, GREEN)
        parts += [text(x, level, *cell) for x, cell in zip(COLUMNS, cells)]
    return parts


def draw(run):
    from checkpoint import load_tokenizer

    parts, y = [], 24
    for name in ("en.model", "tokenizer.model"):
        if not (run / name).is_file():
            raise ValueError(f"{run / name}: no such file; give --run a finished demo")
        rows = stream(load_tokenizer(run / name))
        parts += table(f"{name}: {len(rows) - 1} tokens", rows, y)
        y += (len(rows) + 4) * ROW
    return svg(600, y, parts)
