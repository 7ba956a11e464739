"""PNG files that name their maker. So a command replaces only images that it wrote.

Pipeline: below everything. vision.py, demo/write.py and evaluation/heatmap.py write through these.
"""

from PIL import Image, PngImagePlugin

from vocabulary.files import claim_output, write_atomically


def claim_png(path, maker, inputs=()):
    """ValueError if writing `path` would replace a file that `maker` did not write."""

    def is_ours(path):
        with Image.open(path) as image:
            return image.info.get("Software") == maker

    claim_output(path, is_ours, inputs)


def save_png(image, path, maker):
    """Saves an image, whole or not at all; the file names its maker."""
    marked = PngImagePlugin.PngInfo()
    marked.add_text("Software", maker)
    write_atomically(path, lambda file: image.save(file, "PNG", pnginfo=marked))
