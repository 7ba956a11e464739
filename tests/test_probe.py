"""The linear probe: what it reads, that it is fitted to the end, what it finds in made images."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_helpers import command
from PIL import Image

from checkpoint import load_safetensors, write_model
from checkpoint.names import hf_name
from checkpoint.safetensors import save_safetensors
from evaluation import probe
from model import XLlava
from vision import VisionConfig, ViT

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}
ENCODER = VisionConfig(
    image_size=24,
    patch_size=4,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
)


@pytest.fixture(scope="module")
def scenes_file(tmp_path_factory):
    """Images of one or two squares in nine places. Nothing shows their "kind", drawn apart."""
    folder, rng = tmp_path_factory.mktemp("scenes"), random.Random(0)
    scenes = []
    for split, count in (("train", 150), ("test", 40)):
        (folder / split).mkdir()
        for i in range(count):
            image, things = Image.new("RGB", (24, 24), "white"), []
            for place in rng.sample(range(9), rng.choice((1, 2))):
                colour, size = rng.choice(list(COLOURS)), rng.choice(("big", "small"))
                row, column = divmod(place, 3)
                side = 8 if size == "big" else 4
                image.paste(
                    COLOURS[colour], (8 * column, 8 * row, 8 * column + side, 8 * row + side)
                )
                kind = rng.choice(("cat", "dog"))
                things.append({"kind": kind, "colour": colour, "size": size, "place": place})
            image.save(folder / split / f"{i}.png")
            scenes.append({"image": f"{split}/{i}.png", "things": things, "background": "day"})
    (folder / "scenes.json").write_text(json.dumps(scenes), encoding="utf-8")
    return folder / "scenes.json"


@pytest.fixture(scope="module")
def folders(config, tokenizer_file, tmp_path_factory):
    """The same encoder in a model folder and as a published CLIP."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(1)
    model = XLlava(replace(config, vision=ENCODER)).init_weights()
    write_model(model.config, model.state_dict().items(), tokenizer_file, root / "model")

    clip, saved = root / "clip", load_safetensors(root / "model" / "model.safetensors")
    clip.mkdir()
    text = (root / "model" / "config.json").read_text(encoding="utf-8")
    config = {"model_type": "clip", "vision_config": json.loads(text)["vision_config"]}
    (clip / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = [name for name in model.state_dict() if name.startswith("vision.")]
    tensors = {hf_name(name, "vision_model."): saved[hf_name(name)] for name in names}
    tensors["logit_scale"] = torch.ones(())
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_safetensors(specs, tensors.items(), clip)
    return root / "model", clip


def test_a_thing_is_read_from_the_patches_of_its_own_place():
    """The encoder is a stub that gives each of 12 × 12 patches its number. A place has 4 × 4
    patches, pooled to 2 × 2: by hand, the means of four numbers."""

    class Numbers:
        class_embed = pos_embed = torch.zeros(1)

        def __call__(self, pixels, layer):
            numbers = torch.arange(-1, 144.0)[None, :, None]  # the class token first
            return numbers.expand(len(pixels), -1, 1)

    scenes = probe.Scenes(["a", "b"], np.array([0, 0, 1]), {"place": [0, 5, 8]})
    pixels = torch.zeros(3, 24, 24, dtype=torch.uint8)
    got = probe.thing_features(Numbers(), -1, lambda path: pixels, scenes)
    # Of the place in row 0, column 0: patches 0, 1, 12, 13 -> 6.5; two to the right 8.5; two below
    # 30.5. The place in row 1, column 2 begins at patch 4 · 12 + 8 = 56.
    first = torch.tensor([6.5, 8.5, 30.5, 32.5])
    assert torch.equal(got, torch.stack([first, first + 56, first + 104]))


def test_the_fit_is_at_the_minimum_of_its_loss():
    """There the gradient is zero: written by hand in float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 5, generator=generator), torch.randint(3, (90,), generator=generator)
    weight, bias = probe.fit_linear(x, y, 3, decay=0.1)
    x, weight, bias = x.double(), weight.double(), bias.double()
    error = (x @ weight.T + bias).softmax(dim=1) - torch.eye(3, dtype=torch.double)[y]
    assert (error.T @ x / 90 + 0.1 * weight).abs().max() < 1e-4
    assert error.mean(dim=0).abs().max() < 1e-4


def test_what_the_pixels_show_is_found_and_what_nothing_shows_is_not(
    scenes_file, folders, tmp_path
):
    rows = {}
    for folder in folders:
        args = ("--model", folder, "--scenes", scenes_file, "--random", "-o", tmp_path / "p.json")
        text = command("probe", *args)
        assert "test" in text and "random % (95%)" in text and "train\n" not in text
        results = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
        rows[folder.name] = results["probe"]
    assert rows["model"] == rows["clip"], "the same weights, however they are published"
    assert {row["encoder"] for row in rows["clip"]} == {"probe", "random"}

    by_name = {row["property"]: row for row in rows["clip"] if row["encoder"] == "probe"}
    for name in ("colour", "size", "place"):
        assert by_name[name]["low"] > by_name[name]["chance"] and by_name[name]["accuracy"] > 0.9
    assert by_name["kind"]["low"] < 0.5 < by_name["kind"]["high"], "nothing shows it"
    things = json.loads(scenes_file.read_text(encoding="utf-8"))[150:]
    kinds = [thing["kind"] for scene in things for thing in scene["things"]]
    assert by_name["kind"]["n"] == len(kinds)
    assert by_name["kind"]["chance"] in (
        kinds.count("cat") / len(kinds),
        kinds.count("dog") / len(kinds),
    )


def test_random_weights_are_those_of_a_new_encoder(folders):
    encoder, layer, aspect_ratio = probe.load_encoder(folders[1], random_weights=True)
    torch.manual_seed(0)
    new = ViT(ENCODER)
    torch.manual_seed(0)
    new.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), new.parameters()))
    assert (layer, aspect_ratio) == (-2, "pad")


@pytest.mark.parametrize(
    "scenes, message",
    [
        ({}, "images must be in train/"),
        ([{"image": "train/0.png", "things": []}], "not in train"),
        ([{"image": "train/0.png", "things": [{"kind": "cat"}]}], "KeyError: 'colour'"),
        (["train/0.png"], "not the scenes.json of a demo world"),
    ],
)
def test_scenes_that_are_none_are_refused(tmp_path, scenes, message):
    (tmp_path / "scenes.json").write_text(json.dumps(scenes), encoding="utf-8")
    with pytest.raises(ValueError, match="scenes.json: .*" + message):
        probe.read_scenes(tmp_path / "scenes.json", 10)


def test_a_layer_that_the_encoder_lacks_is_refused(folders, scenes_file):
    with pytest.raises(ValueError, match="--layer: the vision feature layer is 3"):
        command("probe", "--model", folders[0], "--scenes", scenes_file, "--layer", 3)
