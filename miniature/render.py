"""Pictures of scenes and garments: 64 x 64 RGB, drawn large and averaged down, each a little different by its seed."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from miniature.garments import Garment
from miniature.scenes import Scene, Shape


IMAGE_SIZE = 64
SCALE = 3  # drawn at three times the size, then averaged
RGB = {
    "red": (214, 40, 40),
    "orange": (240, 135, 20),
    "yellow": (245, 215, 50),
    "green": (40, 150, 60),
    "cyan": (60, 200, 215),
    "blue": (45, 85, 215),
    "purple": (130, 50, 160),
    "pink": (245, 130, 180),
    "brown": (125, 75, 35),
    "white": (245, 245, 245),
    "black": (20, 20, 22),
    "grey": (128, 128, 130),
    "navy": (18, 28, 80),
    "beige": (225, 205, 165),
    "mint": (170, 225, 190),
    "lilac": (195, 175, 225),
}
CENTRES = {"left": (13, 32), "right": (51, 32), "top": (32, 13), "bottom": (32, 51), "middle": (32, 32)}
RADII = {"small": 7.5, "large": 12.5}


def jittered(rgb: tuple[int, int, int], rng: random.Random, amount: int = 9) -> tuple[int, ...]:
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in rgb)


def polygon(points, centre, radius, angle) -> list[tuple[float, float]]:
    """Unit-circle `points` turned by `angle` radians, scaled and moved."""
    cos, sin = math.cos(angle), math.sin(angle)
    return [(centre[0] + radius * (x * cos - y * sin), centre[1] + radius * (x * sin + y * cos)) for x, y in points]


def regular(corners: int, start: float = -math.pi / 2) -> list[tuple[float, float]]:
    return [
        (math.cos(start + 2 * math.pi * i / corners), math.sin(start + 2 * math.pi * i / corners))
        for i in range(corners)
    ]


STAR = [
    ((1.12 if i % 2 == 0 else 0.48) * x, (1.12 if i % 2 == 0 else 0.48) * y) for i, (x, y) in enumerate(regular(10))
]
_ARM = 0.36
CROSS = [
    (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
    (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
]  # fmt: skip
HEART = [
    (0.062 * 16 * math.sin(t) ** 3, -0.062 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)))
    for t in (2 * math.pi * i / 40 for i in range(40))
]
POLYGONS = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -1.05), (1.0, 0.78), (-1.0, 0.78)],
    "star": STAR,
    "cross": CROSS,
    "heart": HEART,
    "diamond": [(0, -1.15), (0.72, 0), (0, 1.15), (-0.72, 0)],
    "hexagon": regular(6, 0.0),
}


def shape_mask(shape: Shape, centre, radius, angle, size: int) -> Image.Image:
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    x, y = centre

    def disc(cx, cy, r, fill):
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)

    if shape.shape in POLYGONS:
        draw.polygon(polygon(POLYGONS[shape.shape], centre, radius, angle), fill=255)
    else:
        disc(x, y, radius, 255)
        if shape.shape == "ring":
            disc(x, y, radius * 0.5, 0)
        elif shape.shape == "crescent":
            disc(x + radius * 0.5 * math.cos(angle), y + radius * 0.5 * math.sin(angle), radius * 0.8, 0)
    return mask


def textured(texture: str, rgb, other_rgb, size: int, rng: random.Random) -> Image.Image:
    """A square of colour with stripes, dots or checks in the second colour."""
    picture = Image.new("RGB", (size, size), rgb)
    draw = ImageDraw.Draw(picture)
    period = 5 * SCALE
    start = rng.randrange(period)
    if texture == "striped":
        for y in range(start - period, size, period):
            draw.rectangle((0, y, size, y + period * 2 // 5), fill=other_rgb)
    elif texture == "dotted":
        radius = period * 0.25
        for i, y in enumerate(range(start - period, size + period, period)):
            for x in range(start - period + (i % 2) * period // 2, size + period, period):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=other_rgb)
    elif texture == "checked":
        for y in range(start - period, size, period):
            draw.rectangle((0, y, size, y + SCALE), fill=other_rgb)
        for x in range(start - period, size, period):
            draw.rectangle((x, 0, x + SCALE, size), fill=other_rgb)
    return picture


def contrast(rgb) -> tuple[int, int, int]:
    return (25, 25, 25) if sum(rgb) > 330 else (245, 245, 245)


def background(rgb, size: int, rng: random.Random) -> Image.Image:
    return Image.new("RGB", (size, size), jittered(rgb, rng, 7))


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    size = IMAGE_SIZE * SCALE
    picture = background(RGB[scene.background], size, rng)
    for shape in scene.shapes:
        radius = RADII[shape.size] * SCALE * rng.uniform(0.94, 1.06)
        cx, cy = CENTRES[shape.position]
        centre = ((cx + rng.uniform(-2, 2)) * SCALE, (cy + rng.uniform(-2, 2)) * SCALE)
        rgb = jittered(RGB[shape.colour], rng)
        fill = textured(shape.texture, rgb, contrast(rgb), size, rng)
        picture.paste(fill, mask=shape_mask(shape, centre, radius, rng.uniform(-0.2, 0.2), size))
    return picture.reduce(SCALE)


def draw_garment(garment: Garment, rng: random.Random) -> Image.Image:
    size = IMAGE_SIZE * SCALE
    ground = jittered((232, 232, 235), rng, 7)
    picture = background(ground, size, rng)
    rgb = jittered(RGB[garment.colour], rng)
    second = jittered(RGB[garment.pattern_colour], rng) if garment.pattern_colour else rgb
    fill = textured(garment.pattern, rgb, second, size, rng)
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    middle, top = 32 + rng.uniform(-1.5, 1.5), 10 + rng.uniform(-1.5, 1.5)
    wide = rng.uniform(0.95, 1.05)

    def at(*points):
        return [((middle + x * wide) * SCALE, (top + y) * SCALE) for x, y in points]

    long = garment.length == "long"
    hem = {"dress": 48 if long else 36, "shirt": 38 if long else 27, "top": 38 if long else 27}[garment.category]
    flare = {"dress": 20 if long else 17, "shirt": 12, "top": 11}[garment.category]
    waist = 8 if garment.category == "dress" else 10.5
    draw.polygon(at((-11, 0), (11, 0), (waist, 20), (flare, hem), (-flare, hem), (-waist, 20)), fill=255)
    reach = {"no": None, "short": 9, "long": 26}[garment.sleeves]
    if reach:
        for side in (-1, 1):
            cuff, slant = 10 + reach * 0.25, 15 + reach * 0.25
            sleeve = (side * 9, 0), (side * 12, 0.5), (side * slant, reach), (side * cuff, reach + 1.5), (side * 9, 8)
            draw.polygon(at(*sleeve), fill=255)
    picture.paste(fill, mask=mask)
    draw = ImageDraw.Draw(picture)
    if garment.neckline == "round":
        x, y = (middle * SCALE, top * SCALE)
        draw.ellipse((x - 6 * SCALE, y - 6 * SCALE, x + 6 * SCALE, y + 6 * SCALE), fill=ground)
    elif garment.neckline == "v":
        draw.polygon(at((-6, -1), (6, -1), (0, 12)), fill=ground)
    else:
        draw.polygon(at((-6, -1), (6, -1), (6, 6), (-6, 6)), fill=ground)
    if garment.category == "shirt":  # a row of buttons and a collar tell it from a top
        dark = contrast(rgb)
        draw.line(at((0, 12), (0, hem)), fill=dark, width=SCALE)
        draw.line(at((-8, 0), (-8, 7)), fill=dark, width=SCALE)
        draw.line(at((8, 0), (8, 7)), fill=dark, width=SCALE)
    return picture.reduce(SCALE)


def render(thing: Scene | Garment, seed: str) -> np.ndarray:
    """The picture of a scene or a garment, uint8 [64, 64, 3]; the same for the same `seed`."""
    rng = random.Random(seed)
    picture = draw_scene(thing, rng) if isinstance(thing, Scene) else draw_garment(thing, rng)
    return np.asarray(picture)
