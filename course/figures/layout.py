"""Which token attends to which: two records of one image, side by side, and packed end to end."""

import numpy as np
import torch

from course.figures._shapes import BLUE, GREEN, GREY, PALE, rect, svg, text

ENDING = ".svg"
CELL, LEFT, TOP = 14, 110, 130
SHOWN = 3  # of the image's patches: the first ones


def read_sample(run):
    """(a sample of two short records of one image, tokenizer, number of patches)."""
    from checkpoint import load_config, load_tokenizer
    from data import ConversationDataset, Sample

    file, model = run / "data" / "instruct-1.json", run / "instruct"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give --run a finished demo")
    tokenizer, config = load_tokenizer(model), load_config(model)
    dataset = ConversationDataset([file], tokenizer, config, 2048, records_per_sample=2)
    pairs = (i for i in range(len(dataset)) if len(dataset.locate(i)[1]) == 2)
    samples = [dataset.sample(next(pairs)) for _ in range(20)]
    sample = min(samples, key=lambda sample: len(sample.ids))
    return Sample(*sample[:2], [], sample.starts), tokenizer, config.vision.num_patches


def attends(sample):
    """bool (T, T): which query attends to which key, from the rows of data.side_by_side."""
    from data import side_by_side

    T = len(sample.ids) - 1
    prefixes, groups, merge = side_by_side([sample], np.array([0]), np.array([T]), T).split_index
    visible = []  # the keys of each query, in the order of the outputs
    for own, keys in ((prefixes, prefixes), *groups):
        earlier = keys.shape[1] - own.shape[1]
        for row in keys:
            visible += [row[: earlier + u + 1] for u in range(own.shape[1])]

    seen = torch.zeros(T, T, dtype=torch.bool)
    for t, place in enumerate(merge.tolist()):
        seen[t, visible[place]] = True
    return seen


def packed(lengths):
    """The same for documents end to end, from the key ranges of training/sampler.pack."""
    from data import Sample
    from training.sampler import pack

    samples = [Sample([1] * (n + 1), [0] + [1] * n, []) for n in lengths]
    start, end = pack(samples)["layout"].key_ranges
    keys = torch.arange(sum(lengths))
    return (keys >= start[0][:, None]) & (keys < end[0][:, None])


def grid(x, y, seen, targets):
    """Blue where a query attends to a key, green in rows that learn; white lines between cells."""
    n = len(seen)
    parts = [rect(x, y, n * CELL, n * CELL, PALE)]
    for i, row in enumerate(seen.tolist()):
        edges = [j for j in range(n + 1) if (j < n and row[j]) != (j > 0 and row[j - 1])]
        for start, end in zip(edges[::2], edges[1::2]):
            colour = GREEN if targets[i] else BLUE
            parts.append(rect(x + start * CELL, y + i * CELL, (end - start) * CELL, CELL, colour))
    for i in range(1, n):
        parts.append(rect(x, y + i * CELL - 1, n * CELL, 1, "white"))
        parts.append(rect(x + i * CELL - 1, y, 1, n * CELL, "white"))
    return parts


def draw(run):
    sample, tokenizer, num_patches = read_sample(run)
    seen, T = attends(sample), len(sample.ids) - 1

    # All patches attend alike: three of them are enough for the eye.
    first = sample.ids.index(tokenizer.image_id)
    kept = [t for t in range(T) if not first + SHOWN <= t < first + num_patches]
    targets = [sample.loss_mask[t + 1] for t in kept]
    names = [tokenizer.readable(tokenizer.piece(sample.ids[t])) for t in kept]

    parts = [
        text(LEFT, 18, "Two records of one image, side by side. Rows: queries, columns: keys.")
    ]
    for n, name in enumerate(names):
        middle = n * CELL + 11
        colour = GREEN if targets[n] else GREY
        parts.append(text(LEFT - 6, TOP + middle, name, colour, "end"))
        parts.append(text(LEFT + middle, TOP - 6, name, GREY, turn=-90))
    parts += grid(LEFT, TOP, seen[kept][:, kept], targets)

    # Three documents, end to end.
    lengths, x = (7, 3, 5), LEFT + (len(kept) + 3) * CELL
    parts.append(text(x, TOP - 24, "Packed: documents of 7, 3 and 5 tokens."))
    parts += grid(x, TOP, packed(lengths), [False] * sum(lengths))
    foot = TOP + (len(kept) + 2) * CELL
    note = f"green: the next token is a target · {SHOWN} of {num_patches} patches are shown"
    parts.append(text(LEFT, foot, note, GREY))
    return svg(x + sum(lengths) * CELL + 130, foot + 20, parts)
