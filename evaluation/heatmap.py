"""A word on the image: how well it fits each patch, in any language.

    python -m evaluation heatmap --model out/demo/vision --image photo.png rocket 로켓 火箭 cat

The stage `vision` draws a patch's features towards the sum of the embeddings of the words that
describe it (training/objectives.py, PhraseScore). So their cosine says where a word is: also a word
that no image came with, if the dictionary ties it to one. A phrase is the sum of its tokens.

The PNG has the image, then a copy for each word, in their order: orange where the word fits best,
pale where it fits no better than at its median patch. A word whose best patch is hardly better than
the median (by less than 0.2) stays pale. The terminal shows the numbers.

Dimensions: N = G · G patches, C width, W words.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import vision
from generate import load_for_inference
from kernels.device import DEVICES
from training.objectives import embed_phrases
from vocabulary import flags
from vocabulary.png import claim_png, save_png

ORANGE = (255, 80, 0)
SIDE, MARGIN = 336, 8  # pixels of an image in the PNG, and between two
LEAST_CONTRAST = 0.2  # a difference of cosines: a word that fits nowhere stays pale
LARGEST_GRID = 16  # patches per side that are printed as numbers


@torch.inference_mode()
def word_scores(model, tokenizer, pixels, words):
    """The cosines of all words and patches: float32 (W, N). pixels: uint8 (3, S, S)."""
    patches = model.encode_images(pixels[None].to(model.device))[0]  # (1, N, C) -> (N, C)
    rows = []
    for word in words:
        ids = torch.tensor(tokenizer.encode(word), device=model.device)
        start = torch.zeros(1, dtype=torch.long, device=model.device)
        rows.append(embed_phrases(model.decoder.embed_tokens.weight, ids, start))
    return (torch.cat(rows) @ F.normalize(patches.float(), dim=-1).T).cpu().numpy()


def heat(scores):
    """Scores (W, N) -> 0 … 1, each word for itself: 0 at its median patch, 1 at its best one."""
    above = np.maximum(scores - np.median(scores, axis=1, keepdims=True), 0)
    return above / np.maximum(above.max(axis=1, keepdims=True), LEAST_CONTRAST)


def paint(image, weights, resample=Image.Resampling.BICUBIC):
    """The image in pale grey, orange where the weights (N,), 0 … 1, are large."""
    side = round(len(weights) ** 0.5)
    mask = Image.fromarray((255 * weights.reshape(side, side)).astype(np.uint8))
    mask = mask.resize(image.size, resample)

    grey = image.convert("L").convert("RGB")
    pale = Image.blend(grey, Image.new("RGB", image.size, "white"), 0.6)
    glow = Image.blend(image, Image.new("RGB", image.size, ORANGE), 0.65)
    return Image.composite(glow, pale, mask)


def describe(word, scores, num_tokens):
    """A word's numbers as text. scores: (N,)."""
    side = round(len(scores) ** 0.5)
    row, column = divmod(int(scores.argmax()), side)
    numbers = f"best {scores.max():.2f} in row {row + 1}, column {column + 1}"
    text = f"{word}: {num_tokens} token(s), {numbers} of {side}; median {np.median(scores):.2f}"
    if side <= LARGEST_GRID:
        for line in scores.reshape(side, side):
            text += "\n  " + "".join(f"{100 * score:4.0f}" for score in line)
    return text


def add_arguments(parser):
    add = parser.add_argument
    add(
        "words",
        nargs="+",
        type=flags.text,
        metavar="WORD",
        help='a word, or a phrase in quotes: "a red cat"',
    )
    about = "the model's; after the stage `vision` it is clearest"
    add("--model", type=flags.folder, metavar="FOLDER", required=True, help=about)
    add("--image", type=flags.file, metavar="FILE", required=True, help="what to look at")
    about = "the PNG to write"
    add("-o", "--out", type=flags.text, metavar="FILE", default="heatmap.png", help=about)
    add("--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU if there is one")


def run(args):
    claim_png(args.out, "evaluation heatmap", [args.image])
    image = vision.load_image(args.image)
    model, tokenizer = load_for_inference(args.model, args.device)
    if empty := [word for word in args.words if not tokenizer.encode(word)]:
        raise ValueError(f"{empty[0]!r}: an empty word has no place")
    config = model.config
    pixels = vision.preprocess(image, config.vision.image_size, config.image_aspect_ratio)
    scores = word_scores(model, tokenizer, pixels, args.words)

    # As the model gets the image, but larger.
    shown = vision.preprocess(image, SIDE, config.image_aspect_ratio)
    shown = Image.fromarray(shown.permute(1, 2, 0).numpy())
    images = [shown, *(paint(shown, weights) for weights in heat(scores))]
    sheet = Image.new("RGB", (len(images) * (SIDE + MARGIN) - MARGIN, SIDE), "white")
    for i, each in enumerate(images):
        sheet.paste(each, (i * (SIDE + MARGIN), 0))

    save_png(sheet, args.out, "evaluation heatmap")
    for word, row in zip(args.words, scores):
        print(describe(word, row, len(tokenizer.encode(word))))
    print(f"{args.out}: the image, {', '.join(args.words)}")
