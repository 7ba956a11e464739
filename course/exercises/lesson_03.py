"""Lesson 3, patches and the ViT: padding, normalising, cutting into patches, attention, blocks."""

import numpy as np
import torch
from torch.nn import functional as F

from course.exercise import Check, Exercise, expect

TITLE = "Patches and the ViT"


def near(what, found, expected, tolerance=1e-5):
    """An assertion on numbers, with the largest difference in its message."""
    expect(f"{what}: the shape", tuple(found.shape), tuple(expected.shape))
    gap = (found.double() - expected.double()).abs().max().item()
    assert gap <= tolerance, f"{what}: the largest difference is {gap:.3g}"


def small_vit(model_type="clip_vision_model", image_size=12):
    """A ViT with random weights: 4 × 4 pixels a patch, width 8, 2 heads, 3 layers."""
    from vision import VisionConfig, ViT

    torch.manual_seed(0)
    vit = ViT(VisionConfig(image_size, 4, 8, 16, 3, 2, "gelu", 1e-5, model_type))
    vit.init_weights()
    with torch.no_grad():  # so that no number is 0 or 1 by chance
        for weight in vit.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return vit


# ------------------------------------------------------------------------- pad_and_resize
def pad(image, size):
    from vision import pad_and_resize

    return pad_and_resize(image, size)


def noise(width, height):
    from PIL import Image

    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def test_a_square_is_resized():
    from PIL import Image

    found = pad(noise(20, 20), 8)
    expect("the size of a square of 20, padded to 8,", found.size, (8, 8))
    expected = noise(20, 20).resize((8, 8), Image.Resampling.BICUBIC)
    assert found.tobytes() == expected.tobytes(), "a square image should only be resized"


def test_nothing_is_stretched():
    found = np.asarray(pad(noise(30, 10), 30))
    image = np.asarray(noise(30, 10))
    assert np.array_equal(found[10:20], image), "30 × 10 to 30: the middle 10 rows are the image"


def test_the_border_has_the_mean_colour():
    from vision import MEAN_COLOUR

    for width, height in ((30, 10), (10, 30)):
        found = np.asarray(pad(noise(width, height), 30)).swapaxes(0, int(height > width))
        for rows in (found[:10], found[20:]):
            colours = {tuple(map(int, colour)) for colour in rows.reshape(-1, 3)}
            expect(f"colours around {width} × {height}", colours, {MEAN_COLOUR})


def test_the_pixels_of_pillow():
    from PIL import Image

    from vision import MEAN_COLOUR

    for width, height in ((37, 20), (20, 37), (200, 3), (23, 20), (20, 23)):
        side = max(width, height)
        square = Image.new("RGB", (side, side), MEAN_COLOUR)
        square.paste(noise(width, height), ((side - width) // 2, (side - height) // 2))
        expected = np.asarray(square.resize((16, 16), Image.Resampling.BICUBIC), int)
        gap = abs(np.asarray(pad(noise(width, height), 16), int) - expected).max()
        assert gap == 0, f"{width} × {height} to 16: a pixel differs by {gap}"


def test_a_long_image_needs_little_memory():
    from PIL import Image

    import vision

    real, largest = Image.new, []

    def new(mode, size, *rest):
        largest.append(size[0] * size[1])
        assert size[0] * size[1] <= 50_000_000, (
            f"a {size[0]:,} × {size[1]:,} image is made on the way: {3 * size[0] * size[1]:,} bytes"
        )
        return real(mode, size, *rest)

    image = noise(12_000, 100)
    Image.new = new
    try:
        found = vision.pad_and_resize(image, 24)
    finally:
        Image.new = real
    expect("the size of 12,000 × 100, padded to 24,", found.size, (24, 24))


PAD = Exercise(
    "pad_and_resize",
    "Pad an image to a square",
    "vision.py",
    ["pad_and_resize"],
    30,
    [
        Check(
            1,
            "a square is only resized, with the bicubic filter",
            "resize takes (width, height) and a filter, Image.Resampling.BICUBIC.",
            test_a_square_is_resized,
        ),
        Check(
            1,
            "nothing is stretched, the image is in the middle",
            "How much is missing to a square? Half of it goes to each side.",
            test_nothing_is_stretched,
        ),
        Check(
            1,
            "the border has CLIP's mean colour",
            "Image.new takes a colour: MEAN_COLOUR.",
            test_the_border_has_the_mean_colour,
        ),
        Check(
            1,
            "the same pixels as padding, then resizing",
            "Pad first. Of 3 pixels 1 goes to the left. Pillow resizes along x, then along y.",
            test_the_pixels_of_pillow,
        ),
        Check(
            2,
            "a long image: the whole square is never in memory",
            "Resize along x in bands of rows, into a narrow image. Then along y.",
            test_a_long_image_needs_little_memory,
        ),
    ],
    {"03_pad_a.py": 1, "03_pad_b.py": 4, "03_pad_c.py": 1, "03_pad_d.py": 3},
)


# ------------------------------------------------------------------------- normalise
def normalised(pixels, *options):
    from vision import normalise

    return normalise(pixels, *options)


def test_black_and_white():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 2, 2)
    half = (0.5, 0.5, 0.5)
    found = normalised(pixels, half, half)
    expect("the type", found.dtype, torch.float32)
    expect("black and white with mean 0.5 and deviation 0.5", found[0, 1, 0].tolist(), [-1.0, 1.0])


def test_each_channel_has_its_own_numbers():
    pixels = torch.full((2, 3, 4, 5), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    found = normalised(pixels, (0.2, 0.1, 0.0), (1.0, 0.5, 0.1))
    expected = torch.tensor([0.0, 0.2, 2.0]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    near("51 with means 0.2, 0.1, 0 and deviations 1, 0.5, 0.1", found, expected)


def test_three_pixels_wide():
    pixels = torch.randint(0, 256, (3, 3, 3, 3), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    channels = [(pixels[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)]
    near("images of 3 × 3 pixels", normalised(pixels, mean, std), torch.stack(channels, dim=1))


def test_clips_numbers():
    # By hand: (1 − 0.48145466) / 0.26862954 and so on.
    found = normalised(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    near("white, with CLIP's numbers", found, torch.tensor([1.930336, 2.074878, 2.145897]), 1e-4)


NORMALISE = Exercise(
    "normalise",
    "From bytes to numbers around zero",
    "vision.py",
    ["normalise"],
    15,
    [
        Check(
            1,
            "black and white become −1 and 1",
            "Bytes first become floats from 0 to 1. Does each number meet its channel?",
            test_black_and_white,
        ),
        Check(
            1,
            "each channel has its own mean and deviation",
            "The channels are dimension 1 of (B, 3, S, S).",
            test_each_channel_has_its_own_numbers,
        ),
        Check(
            1,
            "images of three pixels a side, too",
            "Three numbers fit the last dimension as well, if that is 3. Give them a shape.",
            test_three_pixels_wide,
        ),
        Check(1, "CLIP's numbers are the default", "CLIP_MEAN, CLIP_STD.", test_clips_numbers),
    ],
    {"03_normalise_a.py": 2, "03_normalise_b.py": 1},
)


# ------------------------------------------------------------------------- embed_patches
def test_the_shape_of_patches():
    found = small_vit().embed_patches(torch.randn(2, 3, 12, 12))
    expect("two images of 3 × 3 patches", tuple(found.shape), (2, 9, 8))


def test_a_grey_image_has_equal_patches():
    vit = small_vit()
    found = vit.embed_patches(torch.full((1, 3, 12, 12), 0.5))
    expected = 0.5 * vit.patch_embed.weight.sum(dim=(1, 2, 3)).expand(1, 9, 8)
    near("a grey image", found, expected)


def test_patches_are_counted_along_rows():
    pixels = torch.zeros(1, 3, 12, 12)
    pixels[:, :, 0:4, 8:12] = 1.0  # first row of patches, third column
    found = small_vit().embed_patches(pixels).abs().sum(dim=2)[0]
    bright = found.nonzero().flatten().tolist()
    expect("top right is bright: the patches that are not 0", bright, [2])


def test_as_a_convolution():
    vit, pixels = small_vit(), torch.randn(3, 3, 12, 12)
    expected = F.conv2d(pixels, vit.patch_embed.weight, stride=4).flatten(2).transpose(1, 2)
    near("random images, against torch's convolution", vit.embed_patches(pixels), expected)


def test_siglip_has_a_bias_and_drops_pixels():
    vit, pixels = small_vit("siglip_vision_model", 14), torch.randn(2, 3, 14, 14)
    expected = F.conv2d(pixels, vit.patch_embed.weight, vit.patch_embed.bias, stride=4)
    near("SigLIP, 14 pixels", vit.embed_patches(pixels), expected.flatten(2).transpose(1, 2))


PATCHES = Exercise(
    "embed_patches",
    "Cut an image into patches",
    "vision.py",
    ["ViT.embed_patches"],
    20,
    [
        Check(
            1,
            "(B, 3, S, S) becomes (B, N, C)",
            "S / P patches in a row.",
            test_the_shape_of_patches,
        ),
        Check(
            1,
            "all patches of a grey image are equal",
            "The weight is that of a convolution: (C, 3, P, P). Flatten it.",
            test_a_grey_image_has_equal_patches,
        ),
        Check(
            1,
            "patches are counted along rows, from the top left",
            "Split both sides into (patch, offset). Then permute.",
            test_patches_are_counted_along_rows,
        ),
        Check(
            2,
            "random images: the same as a convolution",
            "A patch's numbers must have the weight's order: channel, row, column.",
            test_as_a_convolution,
        ),
        Check(
            1,
            "SigLIP: a bias, and pixels that are not enough for a patch",
            "14 pixels are three patches of 4. CLIP's bias is None.",
            test_siglip_has_a_bias_and_drops_pixels,
        ),
    ],
    {"03_patches_a.py": 2, "03_patches_b.py": 3},
)


# ------------------------------------------------------------------------- VisionAttention.forward
def attention_and_library():
    """Our module, and torch.nn.MultiheadAttention with the same weights."""
    module = small_vit().layers[0].attn
    library = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    with torch.no_grad():
        library.in_proj_weight.copy_(torch.cat([each.weight for each in projections]))
        library.in_proj_bias.copy_(torch.cat([each.bias for each in projections]))
    library.out_proj = module.out_proj
    return module, library


def test_attention_keeps_the_shape():
    module, _ = attention_and_library()
    expect("(2, 5, 8)", tuple(module(torch.randn(2, 5, 8)).shape), (2, 5, 8))


def test_one_patch_attends_to_itself():
    module, _ = attention_and_library()
    x = torch.randn(3, 1, 8)
    near("one patch alone: out_proj(v_proj(x))", module(x), module.out_proj(module.v_proj(x)))


def test_order_does_not_matter():
    module, _ = attention_and_library()
    x, order = torch.randn(2, 6, 8), torch.randperm(6)
    near("patches in another order", module(x[:, order]), module(x)[:, order])


def test_attention_as_the_library():
    module, library = attention_and_library()
    x = torch.randn(2, 6, 8)
    near("against torch.nn.MultiheadAttention", module(x), library(x, x, x)[0])


ATTENTION = Exercise(
    "vision_attention",
    "Attention between patches",
    "vision.py",
    ["VisionAttention.forward"],
    20,
    [
        Check(1, "(B, T, C) stays", "Heads go in, heads come out.", test_attention_keeps_the_shape),
        Check(
            1,
            "one patch alone attends to itself",
            "The values, then the output projection.",
            test_one_patch_attends_to_itself,
        ),
        Check(
            1,
            "in another order the patches have the same results",
            "No causal mask. (B, T, C) splits into (B, T, H, D); nothing else moves.",
            test_order_does_not_matter,
        ),
        Check(
            2,
            "the same as torch's attention",
            "`attention` scales by itself. What does it take, and give?",
            test_attention_as_the_library,
        ),
    ],
    {"03_attention_a.py": 2, "03_attention_b.py": 2},
)


# ------------------------------------------------------------------------- the ViT
def images(size=12, count=2):
    torch.manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def test_the_shape_of_hidden_states():
    expect("CLIP: 1 + 9 tokens", tuple(small_vit()(images()).shape), (2, 10, 8))


def test_the_input_of_the_first_block():
    from vision import CLIP_MEAN, CLIP_STD

    vit, pixels = small_vit(), images()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    patches = F.conv2d((pixels / 255 - mean) / std, vit.patch_embed.weight, stride=4)
    patches = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat([vit.class_embed.expand(2, 1, 8), patches], dim=1) + vit.pos_embed
    expected = F.layer_norm(tokens, (8,), vit.pre_norm.weight, vit.pre_norm.bias)
    near("layer 0: class token, patches, positions, pre_norm", vit(pixels, layer=0), expected)


def test_a_block_as_the_library():
    block = small_vit().layers[1]
    module, library = attention_and_library()
    layer = torch.nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    block.attn, layer.self_attn = module, library
    layer.norm1, layer.norm2, layer.linear1, layer.linear2 = (
        block.norm1,
        block.norm2,
        block.fc1,
        block.fc2,
    )
    x = torch.randn(2, 5, 8)
    near("a block, against torch.nn.TransformerEncoderLayer", block(x), layer.train()(x))


def test_layers_count_from_both_ends():
    vit, pixels = small_vit(), images()
    states = [vit(pixels, layer=0)]
    for block in vit.layers:
        states.append(block(states[-1]))
    for layer in (-1, 3, -2, 2, -4, 0):
        near(f"layer {layer} of 3", vit(pixels, layer=layer), states[layer])
    near("no layer named: the last", vit(pixels), states[-1])


def test_siglip_has_no_class_token():
    vit, pixels = small_vit("siglip_vision_model"), images()
    patches = F.conv2d(pixels / 127.5 - 1, vit.patch_embed.weight, vit.patch_embed.bias, stride=4)
    expected = patches.flatten(2).transpose(1, 2) + vit.pos_embed
    near("SigLIP, layer 0: pixels from −1 to 1, positions", vit(pixels, layer=0), expected)


VIT = Exercise(
    "vit",
    "The whole ViT",
    "vision.py",
    ["ViT.forward", "VisionBlock.forward"],
    60,
    [
        Check(
            1,
            "a class token, and N patches",
            "torch.cat along dimension 1.",
            test_the_shape_of_hidden_states,
        ),
        Check(
            1,
            "what goes into the first block",
            "The order: normalise, patches, class token in front, positions, pre_norm.",
            test_the_input_of_the_first_block,
        ),
        Check(
            1,
            "a block is the same as torch's",
            "Each half is x + f(norm(x)).",
            test_a_block_as_the_library,
        ),
        Check(
            1,
            "layer counts from both ends",
            "With L blocks there are L + 1 states. What is −1 % (L + 1)?",
            test_layers_count_from_both_ends,
        ),
        Check(
            1,
            "SigLIP: other numbers, no class token",
            "config.mean_and_std; class_embed is None.",
            test_siglip_has_no_class_token,
        ),
    ],
    {"03_vit_a.py": 3, "03_vit_b.py": 2, "03_vit_c.py": 1},
)

EXERCISES = [NORMALISE, PATCHES, ATTENTION, PAD, VIT]
