"""The silhouettes of the kinds, in one image: assets/atlas.png.

One tile a kind, in the order of `world.KINDS`. It holds the shade and the alpha of an emoji.
"""

import math
from functools import cache
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from demo.world import KINDS, SIZES

ATLAS = Path(__file__).parent.parent / "assets" / "atlas.png"
TILE, COLUMNS = 128, 4  # pixels of a tile; tiles in a row
FONT_SIZE = 109  # the one size that the bitmaps of Noto Color Emoji have


def tile_box(number):
    left, top = number % COLUMNS * TILE, number // COLUMNS * TILE
    return left, top, left + TILE, top + TILE


def make_atlas(font_path, path=ATLAS):
    """Renders each kind's emoji from Noto Color Emoji into one PNG."""
    font = ImageFont.truetype(str(font_path), FONT_SIZE)
    atlas = Image.new("LA", (COLUMNS * TILE, math.ceil(len(KINDS) / COLUMNS) * TILE))
    for number, kind in enumerate(KINDS.values()):
        tile = _render_tile(kind, font)
        left, top, _, _ = tile_box(number)
        atlas.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
    path.parent.mkdir(exist_ok=True)
    atlas.save(path, optimize=True)


def _render_tile(kind, font):
    glyph = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(glyph).text((8, 8), kind.emoji, font=font, embedded_color=True)
    if kind.centre_only:
        alpha = glyph.getchannel("A")
        connected = alpha.point(lambda a: 255 * (a > 100))
        ImageDraw.floodfill(connected, (80, 70), 128)
        connected = connected.point(lambda v: 255 * (v == 128)).filter(ImageFilter.MaxFilter(3))
        glyph.putalpha(ImageChops.darker(alpha, connected))

    # The silhouette fills the longer side.
    glyph = glyph.crop(glyph.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox())
    glyph = ImageOps.contain(glyph, (TILE, TILE), Image.Resampling.LANCZOS)
    shade, alpha = glyph.convert("RGB").convert("L"), glyph.getchannel("A")

    # Equalise the shades in part, so that details stay visible even in an emoji of one brightness.
    histogram = shade.histogram(alpha.point(lambda a: 255 * (a > 128)))
    equalised, darker = [], 0
    for level, count in enumerate(histogram):
        rank = 255 * (darker + count / 2) / sum(histogram)
        equalised.append(round(rank * 0.6 + level * 0.4))
        darker += count
    return Image.merge("LA", (shade.point(equalised), alpha))


def read_atlas():
    """{kind: tile}. Raises ValueError if a kind has no tile or an empty one."""
    with Image.open(ATLAS) as image:
        atlas = image.convert("LA")
    tiles = {name: atlas.crop(tile_box(number)) for number, name in enumerate(KINDS)}
    for name, tile in tiles.items():
        if not tile.getchannel("A").getbbox():
            problem = f"assets/{ATLAS.name} has no tile for the kind {name}"
            raise ValueError(f"{problem}: remake it with python -m demo.write --atlas FONT")
    return tiles


@cache
def sprites(size):
    """{kind: (shade, alpha)} at up to twice the size of drawing, in a margin to turn it in."""
    side = round(1.25 * min(TILE, 2 * SIZES[size]))
    found = {}
    for name, tile in read_atlas().items():
        channels = ImageOps.expand(tile, TILE // 8, (0, 0)).split()
        found[name] = [c.resize((side, side), Image.Resampling.LANCZOS) for c in channels]
    return found
