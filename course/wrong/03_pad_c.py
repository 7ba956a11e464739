from PIL import Image

from vision import MEAN_COLOUR


def pad_and_resize(image, size):
    # All padding at the right and at the bottom.
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, (0, 0))
    return square.resize((size, size), Image.Resampling.BICUBIC)
