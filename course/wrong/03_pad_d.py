from PIL import Image

from vision import MEAN_COLOUR


def pad_and_resize(image, size):
    # Python rounds a half to the even number: 1.5 to 2, 2.5 to 2.
    side = max(image.size)
    left, top = round((side - image.width) / 2), round((side - image.height) / 2)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, (left, top))
    return square.resize((size, size), Image.Resampling.BICUBIC)
