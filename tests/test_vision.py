"""Images and the ViT: against Pillow, hand-worked numbers, transformers' CLIP, and, where they are
at hand, odd files from the real world."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vision
from checkpoint.names import find_names
from vision import ViT, load_image, normalise, preprocess

DATA = os.environ.get("XLLAVA_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="XLLAVA_DATA is not set: no real images at hand")


def save(image, path):
    image.save(path)
    return path


def test_a_wide_image_is_padded_in_the_middle_with_the_mean_colour():
    image = Image.new("RGB", (40, 20), (200, 0, 0))
    pixels = preprocess(image, 40, "pad")
    assert pixels.shape == (3, 40, 40) and pixels.dtype == torch.uint8
    assert pixels[:, 0, 20].tolist() == [122, 116, 104]
    assert pixels[:, 39, 0].tolist() == [122, 116, 104]
    assert pixels[:, 20, 20].tolist() == [200, 0, 0]


def test_square_mode_keeps_the_centre():
    red_between_green = np.zeros((20, 40, 3), np.uint8)
    red_between_green[:, 10:30, 0] = 250
    red_between_green[:, :10, 1] = 250
    red_between_green[:, 30:, 1] = 250
    image = Image.fromarray(red_between_green)
    pixels = preprocess(image, 20, "square")
    assert (pixels[0] == 250).all() and (pixels[1] == 0).all()
    with pytest.raises(ValueError, match="image_aspect_ratio 'stretch'"):
        preprocess(image, 20, "stretch")


@pytest.mark.parametrize(
    "size, resized, corner", [((47, 20), (37, 16), (10, 0)), ((20, 53), (16, 42), (0, 13))]
)
def test_square_mode_cuts_fractions_and_crops_the_middle_of_both_sides(size, resized, corner):
    """By hand: 47·16/20 = 37.6 and 53·16/20 = 42.4, as transformers cuts them."""
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image, (left, top) = Image.fromarray(noise), corner
    want = image.resize(resized, Image.Resampling.BICUBIC)
    want = np.asarray(want.crop((left, top, left + 16, top + 16)))
    assert np.array_equal(preprocess(image, 16, "square").permute(1, 2, 0), want)


def test_normalise_is_clips_formula():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    want = [
        (0 / 255 - 0.48145466) / 0.26862954,
        (128 / 255 - 0.4578275) / 0.26130258,
        (255 / 255 - 0.40821073) / 0.27577711,
    ]
    assert normalise(pixels).flatten().tolist() == pytest.approx(want, rel=1e-6)
    # To the ViT, padding is zero up to one grey level.
    mean = torch.tensor(vision.MEAN_COLOUR, dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalise(mean).abs().max() < 1 / 255 / 0.26130258


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_grey_of_any_depth_is_as_bright_as_its_8_bit_original(tmp_path, bits):
    original = np.arange(256).reshape(16, 16)
    deep = Image.fromarray((original * (2**bits - 1) // 255).astype(np.uint16))
    grey = np.asarray(load_image(save(deep, tmp_path / "deep.png")))[..., 0].astype(int)
    assert abs(grey - original).max() <= 1, "two roundings down"


def test_float_grey_from_0_to_1_is_scaled_and_nan_is_black():
    grey = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    assert vision.to_8_bits(grey).tolist() == [[0, 128, 255, 0]]
    assert vision.to_8_bits(np.array([[0.0, 100.4, 255.0]], np.float32)).tolist() == [[0, 100, 255]]


def test_every_mode_of_image_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for mode in ("L", "P", "1", "CMYK", "RGBA", "LA"):
        suffix = "jpg" if mode == "CMYK" else "png"
        image = load_image(save(red.convert(mode), tmp_path / f"{mode}.{suffix}"))
        assert image.mode == "RGB" and image.size == (8, 8)
    clear = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    assert load_image(save(clear, tmp_path / "clear.png")).getpixel((0, 0)) == vision.MEAN_COLOUR
    table = red.convert("P")  # a palette, of which one colour is transparent
    table.save(tmp_path / "table.png", transparency=table.getpixel((0, 0)))
    assert load_image(tmp_path / "table.png").getpixel((0, 0)) == vision.MEAN_COLOUR
    deep = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    assert load_image(save(deep, tmp_path / "deep.png")).getpixel((0, 0)) == (100, 100, 100)
    frames = [Image.new("RGB", (8, 8), c) for c in ((10, 20, 30), (200, 200, 200))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((0, 0)) == (10, 20, 30)


def test_an_image_is_rotated_as_its_exif_says(tmp_path):
    image = Image.new("RGB", (16, 8), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90°
    image.save(tmp_path / "turned.jpg", exif=exif)
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
def test_what_is_no_image_is_named_in_one_line(tmp_path, content, reason):
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
def test_an_image_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, size, limit):
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
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    side = max(size)
    whole = Image.new("RGB", (side, side), vision.MEAN_COLOUR)
    whole.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    want = np.asarray(whole.resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (preprocess(image, 48, "pad").numpy() == want).all()


# Where load_image differs from `convert("RGB")` on purpose: transparent parts are laid on the mean
# colour, not dropped; 16 bits are scaled, not clipped; EXIF's rotation is applied.
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
    """transformers' own, as preprocessor_config.json asks for it, but without normalisation."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.LlavaImageProcessor if mode == "pad" else transformers.CLIPImageProcessor
    return kind(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_pad=mode == "pad",
        do_normalize=False,
    )


def test_images_of_an_earlier_run_are_decoded_again_only_where_the_file_has_changed(
    tmp_path, monkeypatch
):
    paths = [save(Image.new("RGB", (9, 9), (n, 0, 0)), tmp_path / f"{n}.png") for n in range(3)]
    first = vision.ImageCache(6, "pad", tmp_path / "cache")
    for path in paths[:2]:
        first(path)
    first.save()
    save(Image.new("RGB", (9, 9), (77, 0, 0)), paths[1])
    os.utime(paths[1], (1, 1))

    opened, loader = [], vision.load_image
    monkeypatch.setattr(vision, "load_image", lambda path: opened.append(path) or loader(path))
    second = vision.ImageCache(6, "pad", tmp_path / "cache")
    assert [int(second(path)[0, 0, 0]) for path in paths] == [0, 77, 2] and opened == paths[1:]
    # Another size, or another way to make a square, is another image.
    assert vision.ImageCache(8, "pad", tmp_path / "cache")(paths[0]).shape == (3, 8, 8)
    assert opened == [*paths[1:], paths[0]]

    # Where nothing is new, nothing is written.
    file = tmp_path / "cache" / "pixels-6-pad.npz"
    file.write_bytes(b"half a file")
    first.save()
    with pytest.raises(ValueError, match="pixels-6-pad.npz: damaged; delete it"):
        vision.ImageCache(6, "pad", tmp_path / "cache")


def test_a_full_cache_keeps_the_images_of_the_last_run(tmp_path):
    paths = [save(Image.new("RGB", (9, 9), (n, 0, 0)), tmp_path / f"{n}.png") for n in range(4)]
    for used in ((0, 1), (2,), (3, 2), (3, 2, 1, 0)):
        images = vision.ImageCache(6, "pad", tmp_path / "cache")
        images.max_images = 2
        for n in used:
            images(paths[n])
        assert len(images.images) == len(images.used) == min(2, len(used)), "what fits into memory"
        images.save()
        used = used[:2]
        kept = vision.ImageCache(6, "pad", tmp_path / "cache").saved.values()
        found = {int(pixels[0, 0, 0]) for pixels in kept}
        assert {*used} <= found and len(found) == 2


@needs_data
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_each_odd_file_is_an_image_like_clips_processor_makes_or_one_line(mode):
    processor, read, refused = clip_processor(mode, 64), [], []
    files = [path for path in sorted((Path(DATA) / "robust").rglob("*")) if path.is_file()]
    for path in files:
        if path.suffix in (".json", ".txt"):
            continue
        try:
            pixels = preprocess(load_image(path), 64, mode)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused.append(path.name)
            continue
        assert pixels.shape == (3, 64, 64)
        read.append(path.name)
        if path.name not in ODD:
            with Image.open(path) as image:
                theirs = processor(image.convert("RGB"), input_data_format="channels_last")
            theirs = torch.tensor(np.array(theirs["pixel_values"][0])) * 255
            assert (pixels - theirs).abs().max() <= 1.001, path.name
    assert ODD < set(read)
    assert sorted(refused) == [
        "broken.png",
        "decompression_bomb.gif",
        "reallybig.bmp",
        "shortfile.bmp",
        "truncated_end_chunk.png",
        "truncated_image.png",
        "truncated_jpeg.jpg",
    ]


@needs_data
def test_a_rotated_photograph_is_loaded_upright():
    def load(name):
        return preprocess(load_image(Path(DATA) / "robust" / name), 64).float()

    upright = load("hopper.jpg")
    for n in (2, 5, 6):
        rotated = load(f"hopper_orientation_{n}.jpg")
        assert (rotated - upright).abs().mean() < 8
        for wrong in (rotated.flip(2), rotated.flip(1), rotated.transpose(1, 2)):
            assert (wrong - upright).abs().mean() > 20


@needs_data
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_real_images_are_preprocessed_as_clips_image_processor_does(mode):
    processor = clip_processor(mode, 336)
    for path in [
        *sorted((Path(DATA) / "coco33").glob("*.jpg"))[:8],
        *sorted((Path(DATA) / "asp" / "medium").rglob("*.jpg"))[:4],
        *sorted((Path(DATA) / "nlvr").rglob("*.png"))[:2],
    ]:
        image = load_image(path)
        theirs = torch.tensor(np.array(processor(image)["pixel_values"][0])) * 255
        assert (preprocess(image, 336, mode) - theirs).abs().max() <= 1.001, path


def test_the_vit_equals_transformers_clip(config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = ViT(config.vision)
    ours.init_weights()
    sizes = dataclasses.asdict(config.vision)
    their_config = transformers.CLIPVisionConfig(**sizes, attn_implementation="eager")
    theirs = transformers.CLIPVisionModel(their_config)
    state = {f"vision.{name}": tensor for name, tensor in ours.state_dict().items()}
    names = find_names(state, theirs.state_dict())
    theirs.load_state_dict({names[name]: state[name] for name in state}, strict=False)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    hidden = theirs(normalise(pixels), output_hidden_states=True).hidden_states
    for layer in (-1, -2, 0):
        got, want = ours(pixels, layer), hidden[layer]
        assert (got - want).norm() / want.norm() < 1e-5


def test_a_contradictory_shape_is_refused():
    with pytest.raises(ValueError, match="image_size 50 is not a multiple of patch_size 8"):
        vision.VisionConfig(image_size=50, patch_size=8)
