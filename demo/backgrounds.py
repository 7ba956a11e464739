"""The backgrounds of the demo world: one function each.

It takes a random generator, the y of the ground and the x of the sun or moon, and returns an image
of S × S pixels, twice the final size: halving it smooths the edges.
"""

from PIL import Image, ImageDraw

SIDE = 192  # pixels of a finished image
S = 2 * SIDE


def draw_background(name, rng):
    """A background as an RGB image, SIDE × SIDE pixels."""
    ground = rng.randint(int(0.66 * S), int(0.8 * S))
    x = rng.choice((rng.randint(30, S // 2 - 60), rng.randint(S // 2 + 60, S - 30)))
    return BACKGROUND[name](rng, ground, x).reduce(2)


def _vary(rng, colour, by=10):
    return tuple(max(0, min(255, value + rng.randint(-by, by))) for value in colour)


def _sky(rng, *colours, by=(10,) * 5):
    """A sky that runs through about these colours, from top to bottom, and a pen for it."""
    strip = Image.new("RGB", (1, len(colours)))
    strip.putdata([_vary(rng, *pair) for pair in zip(colours, by)])
    box = (0, 0.5, 1, len(colours) - 0.5)
    image = strip.resize((S, S), Image.Resampling.BILINEAR, box=box)
    return image, ImageDraw.Draw(image)


def _ellipse(pen, x, y, a, b, colour):
    """An ellipse around (x, y), 2a wide and 2b high."""
    pen.ellipse((x - a, y - b, x + a, y + b), fill=colour)


def _hill(pen, rng, colour, top, half_width, by=10):
    colour, x = _vary(rng, colour, by), rng.randint(-S // 4, S + S // 4)
    _ellipse(pen, x, top + S, half_width, S, colour)


def _cloud(pen, x, y, r, colour):
    """A cloud of five puffs; r is the radius of the largest."""
    puffs = ((-1.1, 0.2, 0.7), (0, -0.2, 1), (1.1, 0.15, 0.75), (0.2, 0.35, 0.8), (-0.5, 0.3, 0.7))
    for dx, dy, k in puffs:
        left, right = x + (dx - k) * r, x + (dx + k) * r
        top, bottom = y + (dy - k * 0.75) * r, y + (dy + k * 0.75) * r
        pen.ellipse((left, top, right, bottom), fill=colour)


def draw_day(rng, ground, x):
    image, pen = _sky(rng, (104, 178, 238), (168, 214, 246), (220, 240, 248))

    # the sun in its halo, and clouds
    y, r = rng.randint(30, 90), rng.randint(26, 34)
    _ellipse(pen, x, y, 1.5 * r, 1.5 * r, (214, 232, 228))
    _ellipse(pen, x, y, r, r, (255, 240, 150))
    for _ in range(rng.randint(1, 3)):
        left, top = rng.randint(0, S), rng.randint(30, S // 2)
        _cloud(pen, left, top, rng.randint(16, 30), (240, 247, 252))

    # hills, and flowers on them
    _hill(pen, rng, (168, 214, 128), ground - 30, S)
    _hill(pen, rng, (142, 200, 104), ground + 10, 2 * S)
    for _ in range(rng.randint(8, 16)):
        left, top = rng.randint(0, S), rng.randint(ground + 50, S)
        flower = rng.choice(((255, 255, 240), (255, 226, 150), (246, 196, 214)))
        _ellipse(pen, left, top, 4, 4, flower)
    return image


def draw_night(rng, ground, x):
    image, pen = _sky(rng, (14, 18, 52), (30, 38, 92), (62, 66, 128), by=(6, 8, 8))

    # stars with four rays
    for _ in range(rng.randint(24, 40)):
        left, top, r = rng.randint(0, S), rng.randint(0, ground), rng.choice((2, 2, 3, 4))
        half = r // 2
        rays = [(left, top - 2 * r), (left + half, top), (left, top + 2 * r), (left - half, top)]
        pen.polygon(rays, fill=(240, 236, 200))
        _ellipse(pen, left, top, r, r, (240, 236, 200))

    # The moon is a disc from which a second disc cuts the crescent.
    y, r = rng.randint(40, 100), rng.randint(26, 34)
    moon = Image.new("L", (2 * r, 2 * r))
    moon_pen = ImageDraw.Draw(moon)
    moon_pen.ellipse((0, 0, 2 * r, 2 * r), fill=255)
    moon_pen.ellipse((r * 0.7, -r * 0.25, r * 2.5, r * 1.6), fill=0)
    image.paste((250, 240, 190), (x - r, y - r), moon)

    _hill(pen, rng, (26, 34, 66), ground - 10, S, by=5)
    _hill(pen, rng, (18, 24, 50), ground + 40, 2 * S, by=4)
    return image


def draw_sunset(rng, ground, x):
    low = ((252, 160, 100), (255, 212, 138), (255, 220, 150))
    image, pen = _sky(rng, (92, 62, 138), (206, 98, 130), *low)

    # the sun in two halos
    r = rng.randint(48, 66)
    for scale, colour in ((1.45, (255, 202, 124)), (1.2, (255, 216, 130)), (1, (255, 240, 176))):
        _ellipse(pen, x, ground, scale * r, scale * r, colour)
    for _ in range(rng.randint(2, 4)):
        left, top = rng.randint(0, S), rng.randint(30, ground - 90)
        _ellipse(pen, left, top, rng.randint(50, 110), 7, (236, 150, 140))

    # The bars of light on the sea get shorter towards the viewer.
    sea, _ = _sky(rng, (196, 104, 128), (104, 66, 128))
    image.paste(sea.crop((0, 0, S, S - ground)), (0, ground))
    for n in range(7):
        half, top = r * (1 - n / 9) * rng.uniform(0.5, 1), ground + 8 + 14 * n
        pen.rounded_rectangle((x - half, top, x + half, top + 5), 3, fill=(250, 196, 140))
    return image


def draw_snow(rng, ground, x):
    image, pen = _sky(rng, (166, 188, 214), (204, 219, 234), (226, 235, 243))
    _hill(pen, rng, (222, 231, 241), ground - 40, S, by=4)
    _hill(pen, rng, (236, 242, 248), ground, 2 * S, by=4)
    for _ in range(rng.randint(36, 56)):
        left, top, r = rng.randint(0, S), rng.randint(0, S), rng.choice((3, 4, 4, 6))
        _ellipse(pen, left, top, r, r, (253, 254, 255))
    return image


def draw_rain(rng, ground, x):
    image, pen = _sky(rng, (98, 108, 124), (132, 142, 156), (160, 168, 178))
    _hill(pen, rng, (108, 124, 120), ground + 10, 2 * S, by=6)
    for _ in range(3):
        left, top = rng.randint(0, S), rng.randint(ground + 60, S)
        _ellipse(pen, left, top, rng.randint(24, 50), 7, (142, 156, 168))

    # slanting drops, then the clouds that hide where they begin
    for _ in range(rng.randint(50, 70)):
        left, top, length = rng.randint(0, S + 40), rng.randint(30, S), rng.randint(16, 28)
        drop = (left, top, left - length * 0.35, top + length)
        pen.line(drop, fill=(190, 204, 220), width=2)
    for n in range(5):
        left, top = S * n // 4 + rng.randint(-20, 20), rng.randint(4, 24)
        _cloud(pen, left, top, rng.randint(34, 48), _vary(rng, (82, 90, 106), 5))
    return image


BACKGROUND = {
    "day": draw_day,
    "night": draw_night,
    "sunset": draw_sunset,
    "snow": draw_snow,
    "rain": draw_rain,
}
