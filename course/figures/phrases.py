"""Patch–phrase scores over an image: where words of three languages fit best."""

from PIL import Image

from checkpoint import load_model, load_tokenizer
from course.figures._shapes import picture, svg, text
from evaluation.heatmap import heat, paint, word_scores
from vision import load_image, preprocess

ENDING = ".svg"
WORDS = [["key", "열쇠", "钥匙"], ["rocket", "로켓", "火箭"], ["green", "초록색", "绿色"]]
SIDE = 144


def draw(run):
    model, tokenizer = load_model(run / "vision"), load_tokenizer(run / "vision")
    image = load_image(run / "data" / "images" / "unseen_images" / "00000.png")
    pixels = preprocess(image, model.config.vision.image_size)
    shown = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    parts = [picture(10, 30, shown), text(10, 20, "the image")]
    for row, words in enumerate(WORDS):
        scores = word_scores(model, tokenizer, pixels, words)
        for column, (word, weights, values) in enumerate(zip(words, heat(scores), scores)):
            x, y = 30 + (column + 1) * (SIDE + 10), 30 + row * (SIDE + 30)
            parts.append(text(x, y - 8, f"{word}: best {values.max():.2f}"))
            parts.append(picture(x, y, paint(shown, weights, Image.Resampling.NEAREST)))
    return svg(40 + 4 * (SIDE + 10), 20 + len(WORDS) * (SIDE + 30), parts)
