"""Pictures and the ViT: against Pillow, hand-worked numbers, transformers' CLIP, and the real odd files where they are at hand."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vision
from vision import PhraseScore, ViT, load_picture, normalise, phrase_loss, preprocess

DATA = os.environ.get("XLLAVA_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="XLLAVA_DATA is not set: no real pictures at hand")


def save(picture, path, **options):
    picture.save(path, **options)
    return path


def test_a_wide_picture_is_padded_in_the_middle_with_the_mean_colour():
    picture = Image.new("RGB", (40, 20), (200, 0, 0))
    seen = preprocess(picture, 40, "pad")
    assert seen.shape == (3, 40, 40) and seen.dtype == torch.uint8
    assert seen[:, 0, 20].tolist() == [122, 116, 104] and seen[:, 39, 0].tolist() == [122, 116, 104] and seen[:, 20, 20].tolist() == [200, 0, 0]


def test_square_mode_keeps_the_centre():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30, 0], pixels[:, :10, 1], pixels[:, 30:, 1] = 250, 250, 250
    seen = preprocess(Image.fromarray(pixels), 20, "square")
    assert (seen[0] == 250).all() and (seen[1] == 0).all()
    with pytest.raises(ValueError, match="picture mode 'stretch'"):
        preprocess(Image.fromarray(pixels), 20, "stretch")


def test_normalise_is_clips_formula():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    want = [(0 / 255 - 0.48145466) / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258, (255 / 255 - 0.40821073) / 0.27577711]
    assert normalise(pixels).flatten().tolist() == pytest.approx(want, rel=1e-6)
    mean = torch.tensor(vision.MEAN_COLOUR, dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalise(mean).abs().max() < 1 / 255 / 0.26130258, "padding is nothing to the ViT, but for a grey level"


def test_every_mode_of_picture_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for mode, name in (("L", "l.png"), ("P", "p.png"), ("1", "1.png"), ("CMYK", "c.jpg"), ("RGBA", "a.png"), ("LA", "la.png")):
        picture = load_picture(save(red.convert(mode), tmp_path / name))
        assert picture.mode == "RGB" and picture.size == (8, 8)
    clear = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    assert load_picture(save(clear, tmp_path / "clear.png")).getpixel((0, 0)) == vision.MEAN_COLOUR
    deep = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    assert load_picture(save(deep, tmp_path / "deep.png")).getpixel((0, 0)) == (100, 100, 100)
    frames = [Image.new("RGB", (8, 8), c) for c in ((10, 20, 30), (200, 200, 200))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_picture(tmp_path / "moving.gif").getpixel((0, 0)) == (10, 20, 30)


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    picture = Image.new("RGB", (16, 8), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to see it upright
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_picture(tmp_path / "turned.jpg").size == (8, 16)


@pytest.mark.parametrize("content, reason", [(None, "no such picture"), (b"", r"the file is empty \(0 bytes\)"), (b"hello", "not a picture that Pillow can read"), (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "x.png: ")])
def test_what_is_no_picture_is_named_in_one_line(tmp_path, content, reason):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        load_picture(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_picture_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "MAX_PIXELS", 50)
    with pytest.raises(ValueError, match="8×8 pixels, the limit is 50"):
        load_picture(save(Image.new("RGB", (8, 8)), tmp_path / "big.png"))


@needs_data
def test_each_odd_file_gives_a_picture_or_one_line():
    folder, opened = Path(DATA) / "robust", 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".json", ".txt")):
        try:
            assert preprocess(load_picture(path), 48).shape == (3, 48, 48)
            opened += 1
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    assert opened > 25


@needs_data
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_real_photographs_are_preprocessed_as_clips_image_processor_does(mode):
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336, do_normalize=False)
    for path in sorted((Path(DATA) / "coco33").glob("*.jpg"))[:8]:
        picture = load_picture(path)
        given = picture
        if mode == "pad":
            given = Image.new("RGB", (max(picture.size),) * 2, vision.MEAN_COLOUR)
            given.paste(picture, ((max(picture.size) - picture.width) // 2, (max(picture.size) - picture.height) // 2))
        theirs = torch.tensor(np.array(processor(given)["pixel_values"][0])) * 255
        assert (preprocess(picture, 336, mode) - theirs).abs().max() <= 1.01


def test_the_vit_equals_transformers_clip(config):
    transformers = pytest.importorskip("transformers")
    import checkpoint

    torch.manual_seed(0)
    ours = ViT(config.vision)
    ours.init_weights()
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**dataclasses.asdict(config.vision), attn_implementation="eager"))
    family = "CLIP" if any(n.startswith("vision_model.") for n in theirs.state_dict()) else "CLIP's vision tower, transformers 5"
    theirs.load_state_dict({checkpoint.rename("vision." + n, family): t for n, t in ours.state_dict().items()}, strict=False)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    hidden = theirs(normalise(pixels), output_hidden_states=True).hidden_states
    for layer in (-1, -2, 0):
        got, want = ours(pixels, layer), hidden[layer]
        assert (got - want).norm() / want.norm() < 1e-5


def test_a_phrase_scores_a_picture_by_its_best_patch():
    torch.manual_seed(0)
    score, rows = PhraseScore(), torch.randn(20, 8)
    patches, ids, offsets = torch.randn(3, 5, 8), torch.tensor([1, 2, 3, 7]), torch.tensor([0, 3])
    logits = score(patches, rows, ids, offsets)
    for f, words in enumerate(([1, 2, 3], [7])):
        text = sum(rows[w] for w in words)
        for b in range(3):
            best = max(torch.cosine_similarity(text, patches[b, n], dim=0) for n in range(5))
            assert logits[f, b].item() == pytest.approx((best * score.log_scale.exp() + score.bias).item(), rel=1e-4)


def test_the_phrase_loss_is_the_sigmoid_loss_by_hand_where_the_truth_is_known():
    logits, truth, known = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([[True, False], [False, True]]), torch.tensor([[True, True], [False, True]])
    want = -sum(torch.tensor(x).sigmoid().log() for x in (2.0, 1.0, 0.0))
    assert phrase_loss(logits, truth, known).item() == pytest.approx(want.item(), rel=1e-6)


def test_a_contradictory_shape_is_refused():
    with pytest.raises(ValueError, match="image_size 50 is not a multiple of patch_size 8"):
        vision.VisionConfig(image_size=50, patch_size=8)
