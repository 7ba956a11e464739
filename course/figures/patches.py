"""What the ViT is given: a wide image, padded and resized, then cut into numbered patches."""

import torch
from PIL import Image

from checkpoint import load_config
from course.figures._shapes import picture, svg, text
from vision import load_image, preprocess

ENDING = ".svg"
SIDE, GAP = 216, 4


def draw(run):
    vision = load_config(run / "vision").vision
    S, P = vision.image_size, vision.patch_size
    image = load_image(run / "data" / "images" / "unseen_images" / "00000.png")
    wide = image.crop((0, 0, image.width, image.height * 2 // 3))
    pixels = preprocess(wide, S)
    n, scale = S // P, SIDE // S
    parts = [
        picture(10, 40, wide.resize((SIDE, SIDE * wide.height // wide.width))),
        picture(SIDE + 40, 40, enlarge(to_image(pixels), scale)),
        text(10, 25, f"the file: {wide.width} × {wide.height}"),
        text(SIDE + 40, 25, f"padded and resized: {S} × {S}"),
        text(2 * SIDE + 70, 25, f"{n * n} patches of {P} × {P}: {3 * P * P} numbers each"),
    ]

    # The patches apart, numbered along rows.
    for i, patch in enumerate(cut(pixels, P)):
        row, column = divmod(i, n)
        x = 2 * SIDE + 70 + column * (P * scale + GAP)
        y = 40 + row * (P * scale + GAP)
        parts.append(picture(x, y, enlarge(to_image(patch), scale)))
        colour = "black" if patch.float().mean() > 110 else "white"
        parts.append(text(x + 2, y + P * scale - 2, i, colour))
    return svg(3 * SIDE + 90 + n * GAP, 60 + SIDE + n * GAP, parts)


def cut(pixels, size):
    """(3, S, S) -> the patches (N, 3, P, P), along rows."""
    patches = pixels.unfold(1, size, size).unfold(2, size, size)  # (3, n, n, P, P)
    return patches.permute(1, 2, 0, 3, 4).flatten(0, 1)


def to_image(pixels: torch.Tensor):
    """uint8 (3, H, W) -> an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def enlarge(image, scale):
    size = image.width * scale, image.height * scale
    return image.resize(size, Image.Resampling.NEAREST)
