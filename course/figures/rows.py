"""Rows of the embedding table in two dimensions: words of three languages that mean the same."""

import torch
from torch.nn import functional as F

from checkpoint import load_model, load_tokenizer
from course.figures._shapes import BLUE, GREEN, GREY, ORANGE, line, rect, svg, text
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
    names = [each.rstrip().split(" = ") for each in read_lines([path])][:MEANINGS]
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
        text(
            10,
            20,
            "blue English, orange Korean, green Chinese; a line joins the dots of one meaning",
            GREY,
        )
    ]
    size = len(names[0])
    for i, words in enumerate(names):
        own = points[i * size : (i + 1) * size]
        parts.append(line([*own, own[0]], GREY, 1))
        x, y = own[0]
        for n, (word, (dot_x, dot_y), colour) in enumerate(zip(words, own, COLOURS)):
            parts.append(rect(dot_x - 3, dot_y - 3, 6, 6, colour, word))
            parts.append(text(x + 12, y - 8 + 13 * n, word, colour))
    return svg(WIDTH, HEIGHT, parts)
