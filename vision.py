"""The vision encoder: from an image file to one feature vector per patch.

Reading order: tokenizer → **vision** → model → data → train → generate.
The ViT is CLIP's (Radford et al. 2021, arXiv 2103.00020), with the same parts: CLIP ViT-L/14-336
loads into it, and what the demo trains opens in transformers' CLIPVisionModel. SigLIP's and
SigLIP2's of a fixed resolution (2303.15343, 2502.14786) are the same without class token and
pre_norm.

    image (3, S, S) ─ cut into S/P × S/P patches ─ linear layer ─ + class token, + positions
        ─ pre_norm ─ L × [ x + attention(norm1(x)) ; x + mlp(norm2(x)) ] ─ hidden states

LLaVA-1.5 takes the hidden states of layer −2, without the class token.
How the demo trains it from random weights: training/objectives.py.

    python vision.py IMAGE [IMAGE …] --size 336 -o preprocessed.png     # what the model receives

Dimensions: B images, S image size, P patch size, N patches per image, T = 1 + N tokens with the
class token, C width, H heads, D head dim, L layers.
"""

import warnings
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F

from kernels import attention
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.files import write_atomically
from vocabulary.formats import file_version, find_file, shorten
from vocabulary.png import claim_png, save_png

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = (122, 116, 104)  # CLIP_MEAN in 8 bits: almost zero after normalisation
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
ASPECT_RATIOS = ("pad", "square", "resize", "resize-bilinear")  # see `preprocess`

# A larger image is refused: a small file may unpack to gigabytes (a decompression bomb).
MAX_PIXELS = 50_000_000
MAX_SIDE = 20_000
MAX_RATIO = 100  # long side ÷ short side

Image.init()
# Only formats that Pillow decodes by itself: EPS, for one, would start another program.
SAFE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM")
FORMATS = [name for name in SAFE_FORMATS if name in Image.OPEN]


# ---------------- images
def load_image(path):
    """Opens an image file, upright and in RGB. ValueError in one line if it can't be used."""
    name = shorten(path)
    try:
        path = find_file(path)
        if path.is_dir():
            raise ValueError(f"{name}: is a folder, must be an image")
        if not path.is_file():
            raise ValueError(f"{name}: no such image")
        if path.stat().st_size == 0:
            raise ValueError(f"{name}: the file is empty (0 bytes)")
    except OSError as error:  # the name is too long for the disk, the folder is locked …
        raise ValueError(f"{name}: {error.strerror}") from None

    return read_image(path, name)


def read_image(file, name):
    """The image in a file, given by path or open, upright and in RGB. `name` is for errors."""
    # Whatever is wrong with the file becomes one line with its name.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF is harmless; check_size refuses large images
            with Image.open(file, formats=FORMATS) as image:
                check_size(image)
                return to_rgb(image)
    except Image.UnidentifiedImageError:
        readable = ", ".join(FORMATS)
        raise ValueError(f"{name}: not an image that Pillow can read as {readable}") from None
    except Exception as error:  # broken files raise a dozen types: SyntaxError, struct.error …
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name}: {shorten(reason.splitlines()[0])}") from None


def check_size(image):
    """ValueError if the image would unpack to too many pixels."""
    short, long = sorted(image.size)
    if short * long > MAX_PIXELS or long > MAX_SIDE or long > short * MAX_RATIO:
        raise ValueError(
            f"{image.width}×{image.height} pixels, the limit is {MAX_PIXELS:,}, {MAX_SIDE:,} a "
            f"side, and {MAX_RATIO} times as long as wide"
        )


def to_rgb(image):
    """The first frame as RGB: rotated as EXIF says, deep grey scaled to 8 bits, and transparent
    parts on CLIP's mean colour."""
    # An animation's first frame. Cameras store the rotation in EXIF only.
    image.seek(0)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(to_8_bits(np.asarray(image)))  # convert("RGB") would clip at 255

    # Transparent pixels have a colour of their own, which nobody meant to show.
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, MEAN_COLOUR)
        background.paste(image, mask=image.getchannel("A"))
        return background
    return image.convert("RGB")


def to_8_bits(grey):
    """Grey values of any type -> uint8. The largest value tells how many bits (8, 10, 12, 16) the
    file used, or that it has floats 0 … 1."""
    grey = np.nan_to_num(grey)
    largest = grey.max()
    if grey.dtype.kind == "f" and largest <= 1:
        return (np.clip(grey, 0, 1) * 255).round().astype(np.uint8)
    bits = next((bits for bits in (8, 10, 12) if largest < 2**bits), 16)
    grey = grey.astype(np.int64) * 255 // (2**bits - 1)
    return np.clip(grey, 0, 255).astype(np.uint8)


def preprocess(image, size, image_aspect_ratio="pad"):
    """An RGB image -> uint8 (3, size, size), resized bicubically as the ViT was trained.

    "pad" (LLaVA-1.5): pad the short side with CLIP's mean colour to a square; nothing is lost.
    "square" (CLIP): resize the short side to `size`, then crop the centre.
    "resize" (SigLIP), "resize-bilinear" (SigLIP2): resize both sides; shapes are distorted.
    The result stays in 8 bits, a quarter of the bytes to move; `normalise` follows on the GPU."""
    if image_aspect_ratio == "pad":
        image = pad_and_resize(image, size)
    elif image_aspect_ratio == "square":
        image = resize_and_crop(image, size)
    elif image_aspect_ratio == "resize":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif image_aspect_ratio == "resize-bilinear":
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    else:
        choices = ", ".join(ASPECT_RATIOS)
        raise ValueError(f"image_aspect_ratio {image_aspect_ratio!r}: must be one of {choices}")
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # (S, S, 3) -> (3, S, S)


def pad_and_resize(image, size):
    """Pads to a square and resizes. An odd pixel of padding goes to the right or to the bottom.
    Pillow resizes along x, then along y. The first pass runs in bands of rows: the same pixels, and
    the padded square of a long image is never in memory."""
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    band_height = max(1, (1 << 22) // side)

    narrow = Image.new("RGB", (size, side), MEAN_COLOUR)  # x resized, y not yet
    for y in range(0, height, band_height):
        band = Image.new("RGB", (side, min(band_height, height - y)), MEAN_COLOUR)
        band.paste(image.crop((0, y, width, y + band.height)), (left, 0))
        narrow.paste(band.resize((size, band.height), Image.Resampling.BICUBIC), (0, top + y))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def resize_and_crop(image, size):
    """CLIP's own preprocessing: short side to `size`, then the centre."""
    # As transformers rounds: the long side is cut to a whole number.
    width, height = image.size
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)

    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageCache:
    """Loads images as uint8 (3, size, size), and keeps those that fit into 64 MiB. With a folder it
    begins with those that an earlier run saved there."""

    def __init__(self, size, image_aspect_ratio, folder=None):
        self.size, self.image_aspect_ratio = size, image_aspect_ratio
        self.images, self.max_images = {}, (1 << 26) // (3 * size * size)
        self.saved, self.used, self.file = {}, {}, None  # pixels by the version of their file
        if folder:
            self.file = Path(folder) / f"pixels-{size}-{image_aspect_ratio}.npz"
        if folder and self.file.exists():
            try:
                with np.load(self.file) as arrays:
                    keys, pixels = arrays["keys"].tolist(), torch.from_numpy(arrays["pixels"])
            except (ValueError, OSError, LookupError, zipfile.BadZipFile):
                raise ValueError(f"{self.file}: damaged; delete it, it is made again") from None
            self.saved = dict(zip(keys, pixels))

    def __call__(self, path):
        key = str(path)
        if key in self.images:
            return self.images[key]
        pixels = self.load(path)
        if len(self.images) < self.max_images:
            self.images[key] = pixels
        return pixels

    def load(self, path):
        """The pixels of an image that is not in memory yet."""
        version = None
        if self.file and find_file(path).exists():
            version = repr(file_version(path))
        pixels = self.saved.get(version)
        if pixels is None:
            pixels = preprocess(load_image(path), self.size, self.image_aspect_ratio)
        if version and len(self.used) < self.max_images:
            self.used[version] = pixels
        return pixels

    def save(self):
        """Writes the images of this run into the folder, if there is one and it lacks some, and
        those of earlier runs while there is room. What DataLoader workers loaded is in other
        processes, and not among them."""
        if self.used.keys() <= self.saved.keys():
            return
        everything = self.used | self.saved
        keys = list(everything)[: self.max_images]
        self.saved = {key: everything[key] for key in keys}
        arrays = {"keys": keys, "pixels": torch.stack(list(self.saved.values()))}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, lambda file: np.savez(file, **arrays))


def normalise(pixels, mean=CLIP_MEAN, std=CLIP_STD):
    """uint8 (B, 3, S, S) -> float32 (B, 3, S, S): (x / 255 − mean) / std, per colour channel."""
    mean, std = (channel_values(tuple(values), pixels.device) for values in (mean, std))
    return (pixels.float() / 255 - mean) / std


@cache
def channel_values(values, device):
    """A number for each colour channel, (3, 1, 1). Cached: a tensor made on a GPU makes it wait."""
    return torch.tensor(values, device=device).view(3, 1, 1)


# ---------------- the ViT
def quick_gelu(x):
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x):
    """SigLIP's approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": gelu_tanh}


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the ViT. The fields have the names of transformers' CLIPVisionConfig.

    model_type: CLIP's has a class token and a norm before the blocks. SigLIP's has neither of them,
    but a bias of the patches, and pixels from −1 to 1."""

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    model_type: str = "clip_vision_model"  # or "siglip_vision_model"

    def __post_init__(self):
        S, P, C, H = self.image_size, self.patch_size, self.hidden_size, self.num_attention_heads
        if self.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise ValueError(f"model_type {self.model_type!r}: must be CLIP's or SigLIP's")
        if S % P and self.is_clip:
            raise ValueError(f"image_size {S} is not a multiple of patch_size {P}")
        if C % H:
            raise ValueError(f"hidden_size {C} is not a multiple of num_attention_heads {H}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}"
            )

    @property
    def is_clip(self):
        return self.model_type == "clip_vision_model"

    @property
    def mean_and_std(self):
        """Of each colour channel, in the pixels that the ViT was trained on."""
        return (CLIP_MEAN, CLIP_STD) if self.is_clip else (SIGLIP_MEAN, SIGLIP_STD)

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


class VisionAttention(nn.Module):
    """Full self-attention over all patches and the class token, if there is one."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(C, C)
        self.k_proj = nn.Linear(C, C)
        self.v_proj = nn.Linear(C, C)
        self.out_proj = nn.Linear(C, C)

    def forward(self, x):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.heads, -1)  # (B, T, C) -> (B, T, H, D)
        k = self.k_proj(x).view(B, T, self.heads, -1)
        v = self.v_proj(x).view(B, T, self.heads, -1)

        # No causal mask: every patch attends to every other.
        out = attention(q, k, v, causal=False)
        return self.out_proj(out.reshape(B, T, C))  # (B, T, H, D) -> (B, T, C)


class VisionBlock(nn.Module):
    """One layer of the ViT: attention and MLP, each behind a LayerNorm and a residual."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.norm1 = nn.LayerNorm(C, config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(C, config.layer_norm_eps)
        self.fc1 = nn.Linear(C, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, C)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """CLIP's or SigLIP's vision encoder (transformers: CLIPVisionModel, SiglipVisionModel).

    LLaVA never calls `final_norm`; it is there because the published weights have it. SigLIP's
    pooling head, which LLaVA does not call either, is left out."""

    def __init__(self, config):
        super().__init__()
        C, P = config.hidden_size, config.patch_size
        self.config = config
        self.class_embed = nn.Parameter(torch.zeros(C)) if config.is_clip else None
        self.patch_embed = nn.Conv2d(3, C, P, P, bias=not config.is_clip)
        self.pos_embed = nn.Parameter(torch.zeros(config.num_patches + config.is_clip, C))
        self.pre_norm = nn.LayerNorm(C, config.layer_norm_eps) if config.is_clip else nn.Identity()
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(C, config.layer_norm_eps)

    def init_weights(self):
        """Random weights by fan-in. Residual branches start smaller, by depth (GPT-2, §2.3)."""
        for name, weight in self.named_parameters():
            if weight.dim() >= 2 and "embed" not in name:
                std = weight.shape[1] ** -0.5
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    std *= (2 * len(self.layers)) ** -0.5
                nn.init.normal_(weight, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

        # A patch has 3 · P · P inputs. Class token and positions start as small noise.
        nn.init.normal_(self.patch_embed.weight, std=self.patch_embed.weight[0].numel() ** -0.5)
        if self.class_embed is not None:
            nn.init.normal_(self.class_embed, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, pixels, layer=-1):
        """pixels uint8 (B, 3, S, S) -> hidden states (B, 1 + N, C), the class token first; SigLIP's
        (B, N, C).

        layer counts as in transformers' hidden_states: −1 is the output of the last block, −2 of
        the one before (LLaVA-1.5), 0 the input of the first block."""
        x = normalise(pixels, *self.config.mean_and_std).to(self.patch_embed.weight.dtype)
        x = self.embed_patches(x)  # (B, N, C)
        if self.class_embed is not None:
            class_token = self.class_embed.expand(len(x), 1, -1).to(x.dtype)
            x = torch.cat([class_token, x], dim=1)  # (B, 1 + N, C)

        x = self.pre_norm(x + self.pos_embed.to(x.dtype))
        # −1 % (L + 1) = L: all blocks. −2: all but the last. 0: none.
        for block in self.layers[: layer % (len(self.layers) + 1)]:
            x = block(x)
        return x

    def embed_patches(self, x):
        """x (B, 3, S, S) -> (B, N, C). CLIP's convolution as a matrix product: its windows do not
        overlap."""
        B, _, S, _ = x.shape
        P = self.config.patch_size
        n = S // P  # patches in a row; SigLIP drops pixels that are not enough for a patch
        # Split both sides of the image into (patch, offset), and gather the offsets of a patch.
        x = x[:, :, : n * P, : n * P].reshape(B, 3, n, P, n, P)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 3 * P * P)  # (B, 3, S, S) -> (B, N, 3·P·P)
        return F.linear(x, self.patch_embed.weight.flatten(1), self.patch_embed.bias)


# ---------------- command line
def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=flags.file, metavar="IMAGE", help="any that Pillow reads")
    add("--size", type=flags.at_least(1, most=4096), default=336, help="pixels per side")
    about = "pad to a square (LLaVA-1.5), crop the centre (CLIP), or resize (SigLIP)"
    add("--image-aspect-ratio", choices=ASPECT_RATIOS, default="pad", help=about)
    add("-o", "--out", type=flags.text, default="preprocessed.png", help="the PNG to write")
    args = parser.parse_args()
    claim_png(args.out, "vision.py", args.images)

    # All images next to each other in one file.
    columns = [
        preprocess(load_image(path), args.size, args.image_aspect_ratio).permute(1, 2, 0).numpy()
        for path in args.images
    ]
    save_png(Image.fromarray(np.concatenate(columns, axis=1)), args.out, "vision.py")
    print(f"{args.out}: {len(columns)} image(s) of {args.size}×{args.size}, as the model gets them")


if __name__ == "__main__":
    run_main(main, "vision.py")
