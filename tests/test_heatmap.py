"""A word on the image: its scores, the picture of them, and the command."""

import numpy as np
import pytest
import torch
from evaluation_helpers import command
from PIL import Image

from evaluation import heatmap
from generate import load_for_inference
from vision import load_image, preprocess


def test_a_words_score_is_the_cosine_of_its_summed_tokens_and_a_patch(
    saved_model, world, tokenizer
):
    model, folder = saved_model
    pixels = preprocess(load_image(world / "0.png"), 16)
    words = ["cat", "빨간색", "the blue dog"]
    got = heatmap.word_scores(load_for_inference(folder, "cpu")[0], tokenizer, pixels, words)

    # By hand in float64.
    table = model.decoder.embed_tokens.weight.detach().double().numpy()
    with torch.no_grad():
        patches = model.encode_images(pixels[None])[0].double().numpy()
    for word, row in zip(words, got):
        phrase = sum(table[token] for token in tokenizer.encode(word))
        lengths = np.linalg.norm(phrase) * np.linalg.norm(patches, axis=1)
        assert row == pytest.approx(patches @ phrase / lengths, abs=1e-5)


def test_a_word_that_fits_nowhere_stays_pale():
    scores = np.array([[0.25, 0.25, 0.75, 0.25], [0.5, 0.5, 0.6, 0.4]])
    assert heatmap.heat(scores) == pytest.approx(np.array([[0, 0, 1, 0], [0, 0, 0.5, 0]]))


def test_the_picture_is_grey_where_a_word_does_not_fit_and_orange_where_it_does():
    image = Image.new("RGB", (40, 40), (0, 0, 200))
    painted = heatmap.paint(image, np.array([0, 0, 0, 1.0]), Image.Resampling.NEAREST)
    red, green, blue = painted.getpixel((5, 5))
    assert red == green == blue > 128
    red, green, blue = painted.getpixel((35, 35))
    assert red > 150 > green and painted.getpixel((35, 5)) == painted.getpixel((5, 35))


def test_the_command_draws_a_picture_per_word_and_prints_the_numbers(saved_model, world, tmp_path):
    model, folder = saved_model
    args = ("heatmap", "--model", folder, "--image", world / "0.png", "-o")
    text = command(*args, tmp_path / "h.png", "cat", "빨간색")
    with Image.open(tmp_path / "h.png") as sheet:
        assert sheet.size == (3 * 336 + 2 * 8, 336)
    lines = text.splitlines()
    assert lines[0].startswith("cat: ") and "column" in lines[0] and " of 2; median " in lines[0]
    assert [len(line.split()) for line in lines[1:3]] == [2, 2], "2 × 2 patches"
    assert lines[3].startswith("빨간색: ") and lines[-1].endswith("the image, cat, 빨간색")

    # Again over its own file; never over another one.
    command(*args, tmp_path / "h.png", "cat")
    with pytest.raises(ValueError, match="is an input of this command"):
        command(*args, world / "0.png", "cat")
    Image.new("RGB", (9, 9)).save(tmp_path / "mine.png")
    with pytest.raises(ValueError, match="was not written by this command"):
        command(*args, tmp_path / "mine.png", "cat")


@pytest.mark.parametrize(
    "image, word, message", [("no.png", "cat", "no.png: no such file"), ("0.png", "", "is empty")]
)
def test_what_can_not_be_drawn_is_refused(
    saved_model, world, tmp_path, capsys, image, word, message
):
    args = ("--model", saved_model[1], "--image", world / image, "-o", tmp_path / "h.png")
    with pytest.raises(SystemExit):
        command("heatmap", *args, word)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "h.png").exists()
