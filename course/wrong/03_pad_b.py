from PIL import Image

from vision import MEAN_COLOUR


def pad_and_resize(image, size):
    # Right, but the padded square of a long image is large.
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)
