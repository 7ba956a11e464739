"""Pictures and the ViT: against Pillow, hand-worked numbers, transformers' CLIP, and the real odd files where they are at hand."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vision
from training.objectives import PhraseScore, phrase_loss
from vision import ViT, load_image, normalise, preprocess

DATA = os.environ.get("XLLAVA_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="XLLAVA_DATA is not set: no real pictures at hand")


def save(picture, path, **options):
    picture.save(path, **options)
    return path


def test_a_wide_picture_is_padded_in_the_middle_with_the_mean_colour():
    picture = Image.new("RGB", (40, 20), (200, 0, 0))
    seen = preprocess(picture, 40, "pad")
    assert seen.shape == (3, 40, 40) and seen.dtype == torch.uint8
    assert (
        seen[:, 0, 20].tolist() == [122, 116, 104]
        and seen[:, 39, 0].tolist() == [122, 116, 104]
        and seen[:, 20, 20].tolist() == [200, 0, 0]
    )


def test_square_mode_keeps_the_centre():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30, 0], pixels[:, :10, 1], pixels[:, 30:, 1] = 250, 250, 250
    seen = preprocess(Image.fromarray(pixels), 20, "square")
    assert (seen[0] == 250).all() and (seen[1] == 0).all()
    with pytest.raises(ValueError, match="image_aspect_ratio 'stretch'"):
        preprocess(Image.fromarray(pixels), 20, "stretch")


def test_normalise_is_clips_formula():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    want = [
        (0 / 255 - 0.48145466) / 0.26862954,
        (128 / 255 - 0.4578275) / 0.26130258,
        (255 / 255 - 0.40821073) / 0.27577711,
    ]
    assert normalise(pixels).flatten().tolist() == pytest.approx(want, rel=1e-6)
    mean = torch.tensor(vision.MEAN_COLOUR, dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalise(mean).abs().max() < 1 / 255 / 0.26130258, (
        "padding is nothing to the ViT, but for a grey level"
    )


def test_every_mode_of_picture_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for mode, name in (
        ("L", "l.png"),
        ("P", "p.png"),
        ("1", "1.png"),
        ("CMYK", "c.jpg"),
        ("RGBA", "a.png"),
        ("LA", "la.png"),
    ):
        picture = load_image(save(red.convert(mode), tmp_path / name))
        assert picture.mode == "RGB" and picture.size == (8, 8)
    clear = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    assert load_image(save(clear, tmp_path / "clear.png")).getpixel((0, 0)) == vision.MEAN_COLOUR
    deep = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    assert load_image(save(deep, tmp_path / "deep.png")).getpixel((0, 0)) == (100, 100, 100)
    frames = [Image.new("RGB", (8, 8), c) for c in ((10, 20, 30), (200, 200, 200))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((0, 0)) == (10, 20, 30)


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    picture = Image.new("RGB", (16, 8), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to see it upright
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (8, 16)


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no such image"),
        (b"", r"the file is empty \(0 bytes\)"),
        (b"hello", "not an image that Pillow can read"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "x.png: "),
    ],
)
def test_what_is_no_picture_is_named_in_one_line(tmp_path, content, reason):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        load_image(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "size, limit",
    [((8, 8), ("MAX_PIXELS", 50)), ((5, 90), ("MAX_SIDE", 80)), ((1, 101), ("MAX_RATIO", 100))],
)
def test_a_picture_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, size, limit):
    monkeypatch.setattr(vision, *limit)
    with pytest.raises(ValueError, match=f"{size[0]}×{size[1]} pixels, the limit is"):
        load_image(save(Image.new("RGB", size), tmp_path / "big.png"))


def test_a_drawing_that_would_start_another_program_is_not_opened(tmp_path):
    (tmp_path / "x.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(ValueError, match="not an image that Pillow can read as JPEG"):
        load_image(tmp_path / "x.eps")


@pytest.mark.parametrize(
    "size", [(30, 5000), (5000, 30), (97, 64), (64, 97), (48, 48), (48, 20), (7, 7)]
)
def test_padding_by_bands_of_rows_is_what_pillow_makes_of_the_whole_square(size):
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    )
    side = max(size)
    whole = Image.new("RGB", (side, side), vision.MEAN_COLOUR)
    whole.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    want = np.asarray(whole.resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (preprocess(picture, 48, "pad").numpy() == want).all()


# Where load_image and `convert("RGB")` part on purpose: transparency (laid on the mean colour, not dropped), 16 bits (scaled, not clipped), EXIF (turned)
ODD = {
    "16bit.cropped.tif",
    "12in16bit.tif",
    "i_trns.png",
    "p_trns_single.png",
    "1_trns.png",
    "uncompressed_la.png",
    "pil123p.png",
    "transparent.gif",
    "transparent.png",
    "blend_op_over.png",
    "mode_palette_alpha.png",
    "blend_transparency.png",
    "iss634.webp",
    "rgb_trns_ycbc.j2k",
    "hopper_orientation_2.jpg",
    "hopper_orientation_5.jpg",
    "hopper_orientation_6.jpg",
    "empty_gps_ifd.jpg",
}


def clip_processor(mode, size):
    """transformers' own, as checkpoint.processor_files asks for it; pixels before normalisation, 0 … 1."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.LlavaImageProcessor if mode == "pad" else transformers.CLIPImageProcessor
    return kind(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_pad=mode == "pad",
        do_normalize=False,
    )


@needs_data
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_each_odd_file_is_a_picture_like_clips_processor_makes_or_one_line(mode):
    processor, read, refused = clip_processor(mode, 64), [], []
    for path in sorted(
        p
        for p in (Path(DATA) / "robust").rglob("*")
        if p.is_file() and p.suffix not in (".json", ".txt")
    ):
        try:
            pixels = preprocess(load_image(path), 64, mode)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused.append(path.name)
            continue
        assert pixels.shape == (3, 64, 64)
        read.append(path.name)
        if path.name not in ODD:
            with Image.open(path) as picture:
                theirs = (
                    torch.tensor(
                        np.array(
                            processor(picture.convert("RGB"), input_data_format="channels_last")[
                                "pixel_values"
                            ][0]
                        )
                    )
                    * 255
                )
            assert (pixels - theirs).abs().max() <= 1.001, path.name
    assert sorted(refused) == sorted(
        [
            "broken.png",
            "decompression_bomb.gif",
            "reallybig.bmp",
            "shortfile.bmp",
            "truncated_end_chunk.png",
            "truncated_image.png",
            "truncated_jpeg.jpg",
        ]
    ) and ODD < set(read)


@needs_data
def test_a_turned_photograph_stands_upright():
    upright = preprocess(load_image(Path(DATA) / "robust" / "hopper.jpg"), 64).float()
    for n in (2, 5, 6):
        turned = preprocess(
            load_image(Path(DATA) / "robust" / f"hopper_orientation_{n}.jpg"), 64
        ).float()
        assert (turned - upright).abs().mean() < 8
        assert all(
            (wrong - upright).abs().mean() > 20
            for wrong in (turned.flip(2), turned.flip(1), turned.transpose(1, 2))
        )


@needs_data
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_real_pictures_are_preprocessed_as_clips_image_processor_does(mode):
    processor = clip_processor(mode, 336)
    for path in [
        *sorted((Path(DATA) / "coco33").glob("*.jpg"))[:8],
        *sorted((Path(DATA) / "asp" / "medium").rglob("*.jpg"))[:4],
        *sorted((Path(DATA) / "nlvr").rglob("*.png"))[:2],
    ]:
        picture = load_image(path)
        theirs = torch.tensor(np.array(processor(picture)["pixel_values"][0])) * 255
        assert (preprocess(picture, 336, mode) - theirs).abs().max() <= 1.001, path


def test_the_vit_equals_transformers_clip(config):
    transformers = pytest.importorskip("transformers")
    import checkpoint

    torch.manual_seed(0)
    ours = ViT(config.vision)
    ours.init_weights()
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            **dataclasses.asdict(config.vision), attn_implementation="eager"
        )
    )
    family = (
        "CLIP"
        if any(n.startswith("vision_model.") for n in theirs.state_dict())
        else "CLIP's vision tower, transformers 5"
    )
    theirs.load_state_dict(
        {checkpoint.rename("vision." + n, family): t for n, t in ours.state_dict().items()},
        strict=False,
    )
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    hidden = theirs(normalise(pixels), output_hidden_states=True).hidden_states
    for layer in (-1, -2, 0):
        got, want = ours(pixels, layer), hidden[layer]
        assert (got - want).norm() / want.norm() < 1e-5


def test_a_phrase_scores_a_picture_by_its_best_patch_and_another_phrase_as_it_is():
    torch.manual_seed(0)
    score, rows = PhraseScore(), torch.randn(20, 8)
    patches, ids, offsets = torch.randn(3, 5, 8), torch.tensor([1, 2, 3, 7]), torch.tensor([0, 3])
    logits = score(patches, rows, ids, offsets)
    for f, words in enumerate(([1, 2, 3], [7])):
        text = sum(rows[w] for w in words)
        for b in range(3):
            best = max(torch.cosine_similarity(text, patches[b, n], dim=0) for n in range(5))
            assert logits[f, b].item() == pytest.approx(
                (best * score.log_scale.exp() + score.bias).item(), rel=1e-4
            )
    between = (
        torch.cosine_similarity(rows[1] + rows[2] + rows[3], rows[7], dim=0) * score.log_scale.exp()
        + score.bias
    )
    assert torch.allclose(score.words(rows, ids, offsets)[[0, 1], [1, 0]], between, rtol=1e-4)


def test_the_phrase_loss_is_the_sigmoid_loss_by_hand_where_the_truth_is_known():
    logits, truth, known = (
        torch.tensor([[2.0, -1.0], [0.5, 0.0]]),
        torch.tensor([[True, False], [False, True]]),
        torch.tensor([[True, True], [False, True]]),
    )
    want = -sum(torch.tensor(x).sigmoid().log() for x in (2.0, 1.0, 0.0))
    assert phrase_loss(logits, truth, known).item() == pytest.approx(want.item(), rel=1e-6)


def test_a_contradictory_shape_is_refused():
    with pytest.raises(ValueError, match="image_size 50 is not a multiple of patch_size 8"):
        vision.VisionConfig(image_size=50, patch_size=8)
