from PIL import Image


def pad_and_resize(image, size):
    # Stretched to a square.
    return image.resize((size, size), Image.Resampling.BICUBIC)
