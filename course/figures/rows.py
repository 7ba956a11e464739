"""Rows of the embedding table in two dimensions: words of three languages that mean the same."""

import torch
from torch.nn import functional as F

from checkpoint import load_model, load_tokenizer
from course.figures._shapes import BLUE, GREEN, GREY, ORANGE, line, svg, text
from training.phrases import read_dictionary
from vocabulary.files import read_lines

ENDING = ".svg"
MEANINGS = 12
COLOURS = (BLUE, ORANGE, GREEN)
WIDTH, HEIGHT, EDGE = 640, 480, 50


def draw(run):
    path = run / "data" / "text" / "dictionary.txt"
    model, tokenizer = load_model(run / "vision"), load_tokenizer(run / "vision")
    table = model.decoder.embed_tokens.weight.detach().float()
    ids = read_dictionary(path, tokenizer)[:MEANINGS]
    names = [line.rstrip().split(" = ") for line in read_lines([path])][:MEANINGS]
    rows = torch.stack([table[word].sum(dim=0) for meaning in ids for word in meaning])

    # The two directions along which the unit vectors differ most.
    rows = F.normalize(rows, dim=1)
    rows = rows - rows.mean(dim=0)
    axes = torch.linalg.svd(rows, full_matrices=False).Vh[:2]
    flat = rows @ axes.T
    flat = (flat - flat.amin(dim=0)) / (flat.amax(dim=0) - flat.amin(dim=0))
    points = [
        (EDGE + (WIDTH - 2 * EDGE) * x, EDGE + (HEIGHT - 2 * EDGE) * y) for x, y in flat.tolist()
    ]

    parts = [
        text(10, 20, "blue English, orange Korean, green Chinese; lines join one meaning", GREY)
    ]
    size = len(names[0])
    for i, words in enumerate(names):
        own = points[i * size : (i + 1) * size]
        parts.append(line([*own, own[0]], "#ccc", 1))
        for word, (x, y), colour in zip(words, own, COLOURS):
            parts.append(text(x, y, word, colour, "middle"))
    return svg(WIDTH, HEIGHT, parts)
