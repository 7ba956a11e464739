"""Draws a scene: its background, then each thing as a coloured silhouette."""

from PIL import Image, ImageFilter

from demo.atlas import sprites
from demo.backgrounds import SIDE, draw_background
from demo.world import COLOURS, SIZES

CELL = SIDE // 3  # pixels of one of the 3 × 3 places
JITTER = {"big": 3, "small": 9}  # pixels that a thing may lie beside the centre of its place


def draw_scene(scene, rng):
    """An RGB image, SIDE × SIDE pixels. `rng` decides what the scene leaves open."""
    image = draw_background(scene.background, rng)
    for thing in scene.things:
        draw_thing(image, thing, rng)
    return image


def draw_thing(image, thing, rng):
    """Pastes a thing's sprite, scaled, turned and coloured, in a thin halo."""
    size = round(SIZES[thing.size] * rng.uniform(0.95, 1.05))
    full = round(size * 1.25)  # with the sprite's margin of an eighth on every side

    # Put it near the centre of its place, with the halo inside the image.
    row, column = divmod(thing.place, 3)
    jitter = JITTER[thing.size]
    centre = [(n + 0.5) * CELL + rng.uniform(-jitter, jitter) for n in (column, row)]
    edge = 3 - full // 10
    corner = tuple(max(edge, min(SIDE - full - edge, round(c - full / 2))) for c in centre)

    angle, filters = rng.uniform(-10, 10), Image.Resampling
    turned = [c.rotate(angle, filters.BILINEAR) for c in sprites(thing.size)[thing.kind]]
    shade, alpha = (channel.resize((full, full), filters.LANCZOS) for channel in turned)
    halo = alpha.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.BoxBlur(0.6))
    halo = halo.point([min(255, 2 * a) for a in range(256)])
    halo_colour = (70, 74, 92) if thing.colour in ("white", "yellow") else (255, 255, 255)
    image.paste(halo_colour, corner, halo)
    image.paste(_colour_in(shade, thing.colour, rng), corner, alpha)


def _colour_in(shade, colour, rng):
    """A sprite's shade in colour: dark shades darken it, light ones lighten it."""
    light = rng.uniform(0.94, 1.06)
    base = [max(0, min(255, value * light + rng.uniform(-7, 7))) for value in COLOURS[colour]]
    if colour in ("white", "black"):
        base = [sum(base) / 3] * 3

    # how far the darkest and the lightest shade are from the plain colour
    depth = 0.38 if colour == "white" else 0.6
    shine = 0.3 if colour in ("black", "white", "yellow") else 0.4

    def level(value, v):
        """One channel of the colour at shade v: 128 is the plain colour."""
        if v < 128:
            return value * (1 - depth * (1 - v / 128) ** 1.4)
        return value + (255 - value) * shine * ((v - 128) / 127) ** 2

    channels = [shade.point([round(level(value, v)) for v in range(256)]) for value in base]
    return Image.merge("RGB", channels)
