"""The eye: from a picture file to one vector a patch, and how those vectors learn what words mean.

Where it stands: `kernels → tokenizer → vision → model`. The ViT is CLIP's (Radford et al. 2021, arXiv 2103.00020), down
to the names of its parts, so that CLIP ViT-L/14-336 loads into it and what the demo trains opens in transformers' CLIPVisionModel:

    picture (3, S, S) ─ cut into S/P × S/P patches ─ one linear layer ─ + class token, + positions ─ pre_norm
        ─ L × [ x + attention(norm1(x)) ; x + mlp(norm2(x)) ]  ─ hidden states; LLaVA reads those of layer −2, class token dropped

From nothing, the demo teaches it to see by *fine-grained contrast* (`phrase_loss`): a caption is split into phrases, and a
phrase such as "a big red cat" scores a picture by its best-matching patch (late interaction, FILIP, arXiv 2111.07783) under a
sigmoid loss (SigLIP, arXiv 2303.15343). One vector for a whole picture (CLIP) tells captions apart without knowing
what is where; one vector a patch has to know.

    python vision.py PICTURE [PICTURE …] --size 336 -o seen.png      # what the model is given, after preprocessing

Letters for sizes: B pictures, S pixels a side, P pixels a patch, N patches, C width, H heads, D head width, F phrases.
"""

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F

from kernels import attention

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = (122, 116, 104)  # CLIP_MEAN in 8 bits: padding of this colour is (nearly) zero after normalisation
MAX_PIXELS, MAX_SIDE, MAX_RATIO = 50_000_000, 20_000, 100  # a picture that unpacks to more is refused, as a decompression bomb: none takes 1 GiB
Image.init()
FORMATS = [f for f in ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM") if f in Image.OPEN]  # none that starts another program, as EPS does


# ---------------------------------------------------------------------------------------------- pictures
def load_picture(path):
    """Opens `path` as an upright RGB picture. Raises ValueError with one line (what, where) for anything that isn't one."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such picture")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and of large pictures; we decide below
            with Image.open(path, formats=FORMATS) as picture:
                short, long = sorted(picture.size)
                if short * long > MAX_PIXELS or long > MAX_SIDE or long > short * MAX_RATIO:
                    raise ValueError(f"{picture.width}×{picture.height} pixels, the limit is {MAX_PIXELS:,}, {MAX_SIDE:,} a side, and {MAX_RATIO} times as long as wide")
                return to_rgb(picture)
    except Exception as error:  # Pillow raises a dozen kinds for broken files: SyntaxError, struct.error, EOFError …
        reason = f"not a picture that Pillow can read as {', '.join(FORMATS)}" if isinstance(error, Image.UnidentifiedImageError) else error or type(error).__name__
        raise ValueError(f"{path}: {str(reason).splitlines()[0]}") from None


def to_rgb(picture):
    """First frame, turned as its EXIF says, 16-bit greys scaled to 8, transparency laid on CLIP's mean colour; mode RGB."""
    picture.seek(0)
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):  # convert("RGB") would clip at 255
        grey = np.asarray(picture)
        grey = grey // 257 if grey.max() > 255 else grey  # 0 … 65,535, but some files keep 8 bits in 16
        picture = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        ground = Image.new("RGB", picture.size, MEAN_COLOUR)
        ground.paste(picture, mask=picture.getchannel("A"))
        return ground
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def preprocess(picture, size, mode="pad"):
    """An RGB picture as the ViT was trained to see it: uint8 (3, size, size), bicubic as Pillow does it.

    mode `pad` (LLaVA-1.5): the shorter side is padded with CLIP's mean colour to a square, nothing is lost;
    mode `square` (CLIP): the shorter side is resized to `size`, then the centre is cut out.
    Kept in 8 bits so that a batch travels to the GPU at a quarter of the bytes; `normalise` follows there.
    """
    width, height = picture.size
    if mode == "pad":
        # Pillow resizes rows first, then columns. So do we, by bands of rows: the padded square of a long picture never stands in memory.
        side = max(width, height)
        left, top, step = (side - width) // 2, (side - height) // 2, max(1, (1 << 22) // side)
        strip = Image.new("RGB", (size, side), MEAN_COLOUR)
        for y in range(0, height, step):
            rows = Image.new("RGB", (side, min(step, height - y)), MEAN_COLOUR)
            rows.paste(picture.crop((0, y, width, y + rows.height)), (left, 0))
            strip.paste(rows.resize((size, rows.height), Image.Resampling.BICUBIC), (0, top + y))
        picture = strip.resize((size, size), Image.Resampling.BICUBIC)
    elif mode == "square":
        short = min(width, height)
        new = (int(size * width / short), int(size * height / short))
        picture = picture.resize(new, Image.Resampling.BICUBIC)
        left, top = (new[0] - size) // 2, (new[1] - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    else:
        raise ValueError(f"picture mode {mode!r}: must be 'pad' or 'square'")
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())  # (S, S, 3) -> (3, S, S)


def normalise(pixels):
    """uint8 (B, 3, S, S) -> float32 of the same shape: (x / 255 − mean) / std, by channel, with CLIP's figures."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


# ---------------------------------------------------------------------------------------------- the ViT
@dataclass(frozen=True)
class VisionConfig:
    """Shape of the ViT; field names are those of transformers' CLIPVisionConfig."""

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (proj(x).view(B, T, self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, C) -> (B, T, H, D)
        out = attention(q, k, v, causal=False)
        return self.out_proj(out.reshape(B, T, C))  # (B, T, H, D) -> (B, T, C)


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.norm1, self.attn = nn.LayerNorm(C, config.layer_norm_eps), VisionAttention(config)
        self.norm2 = nn.LayerNorm(C, config.layer_norm_eps)
        self.fc1, self.fc2 = nn.Linear(C, config.intermediate_size), nn.Linear(config.intermediate_size, C)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """CLIP's vision tower (transformers: CLIPVisionTransformer). `post_norm` is kept for its file format; LLaVA never calls it."""

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.hidden_size
        self.class_embed = nn.Parameter(torch.zeros(C))
        self.patch_embed = nn.Conv2d(3, C, config.patch_size, config.patch_size, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(config.num_patches + 1, C))
        self.pre_norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(C, config.layer_norm_eps)

    def init_weights(self):
        """Random weights by fan-in; residual branches start small, as many as there are."""
        for name, p in self.named_parameters():
            if p.dim() >= 2 and "embed" not in name:
                depth = (2 * len(self.layers)) ** -0.5 if name.endswith(("out_proj.weight", "fc2.weight")) else 1
                nn.init.normal_(p, std=depth * p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.normal_(self.patch_embed.weight, std=self.patch_embed.weight[0].numel() ** -0.5)
        nn.init.normal_(self.class_embed, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, pixels, layer=-1):
        """pixels uint8 (B, 3, S, S) -> hidden states (B, 1 + N, C) after the block that `layer` counts from the end:
        −1 is the last, −2 the one before (LLaVA-1.5), 0 what stands before the first block."""
        L, P = len(self.layers), self.config.patch_size
        blocks = layer % (L + 1)  # hidden_states has L + 1 entries, as in transformers
        x = normalise(pixels).to(self.patch_embed.weight.dtype)
        B, _, S, _ = x.shape
        x = x.view(B, 3, S // P, P, S // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 3 * P * P)  # (B, 3, S, S) -> (B, N, 3·P·P)
        x = F.linear(x, self.patch_embed.weight.flatten(1))  # the convolution of CLIP, whose windows don't overlap: a matrix product
        x = torch.cat([self.class_embed.expand(B, 1, -1).to(x.dtype), x], dim=1) + self.pos_embed.to(x.dtype)  # (B, 1 + N, C)
        x = self.pre_norm(x)
        for block in self.layers[:blocks]:
            x = block(x)
        return x


# ---------------------------------------------------------------------------------------------- learning to see
class PhraseScore(nn.Module):
    """Says how well phrases fit pictures, from the patches as the projector gives them and the words' rows of the embedding table.

    CLIP has a text tower of its own and throws it away. Here patches are compared with the very rows that the decoder reads words
    from: what the stage learns stays, and a patch that shows a big red cat ends up near "big" + "red" + "cat". A decoder that has learnt
    from text to find the word that a question names then finds the patch in the same way.

    A phrase is a *bag* of tokens, the sum of their rows. Word order adds nothing to "a big red cat", and a sum makes the score linear
    in the words, so that a patch has to carry kind, colour, size and place side by side.
    """

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # exp(2.3) ≈ 10 and −10 are SigLIP's start: every pair looks like a miss
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, patches, rows, ids, offsets, gather=lambda image: image):
        """patches (B, N, C), rows (V, C), phrases as flat ids with the offset where each starts -> logits (F, B) that a phrase is true of a picture.
        gather: adds the other processes' pictures, (B, N, C) -> (B of all, N, C)."""
        text = self.bags(rows, ids, offsets)
        image = gather(F.normalize(patches.float(), dim=-1))
        B, N, C = image.shape
        best = (text @ image.view(B * N, C).T).view(-1, B, N).amax(dim=2)  # (F, B·N) -> (F, B): the best patch of each picture
        return best * self.log_scale.exp() + self.bias

    def words(self, rows, ids, offsets):
        """The same between words: logits (F, F) that two mean the same. With a dictionary a thing that pictures name in one language is found by its name in
        another, too (AltCLIP, arXiv 2211.06679, teaches a text tower new languages from translations alone)."""
        text = self.bags(rows, ids, offsets)
        return text @ text.T * self.log_scale.exp() + self.bias

    @staticmethod
    def bags(rows, ids, offsets):
        """Phrases -> (F, C) of length 1."""
        return F.normalize(F.embedding_bag(ids, rows, offsets, mode="sum").float(), dim=-1)


def phrase_loss(logits, is_true, is_known):
    """Sigmoid loss over every phrase × every picture (SigLIP eq. 1), with as many positives as there are, and only where the truth is known.

    logits, is_true and is_known (bool): (F, B). The sum over all of them; a scalar."""
    return F.binary_cross_entropy_with_logits(logits, is_true.to(logits.dtype), is_known.to(logits.dtype), reduction="sum")


# ---------------------------------------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--size", type=int, default=336, help="pixels a side")
    parser.add_argument("--mode", choices=["pad", "square"], default="pad")
    parser.add_argument("-o", "--out", default="seen.png")
    args = parser.parse_args()
    seen = [preprocess(load_picture(p), args.size, args.mode).permute(1, 2, 0).numpy() for p in args.pictures]
    Image.fromarray(np.concatenate(seen, axis=1)).save(args.out)
    print(f"{args.out}: {len(seen)} picture(s) of {args.size}×{args.size}, side by side, as the model is given them")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"vision.py: {error}")
