"""Scenes of 64x64 pixels: an icon, moved, turned, sheared and recoloured at random, on a random background.

The difficulty was set so that the teacher names most test images and a small CNN that starts from random weights names
some of them after 300 steps. All numbers are constants here. Every random choice follows from the generator, so equal
icons and generators give equal pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64
SCALE = (0.8, 1.05)  # side of the icon's square, as a fraction of the scene
TURN, SHEAR = 15, 0.1  # degrees; and as a fraction, both ways
CUT = 0.08  # how much of the icon's square may lie outside the scene on a side
BRIGHTNESS, SATURATION, TINT = (0.85, 1.1), (0.8, 1.2), 0.04
CONTRAST = 70  # of a background, in grey levels both ways
BLUR, NOISE = 0.3, 4.0  # at most, in pixels and in grey levels


def scene(icon: Image.Image, random: np.random.Generator) -> Image.Image:
    """icon: RGBA, square. Returns an RGB image."""
    canvas = BACKGROUNDS[random.integers(len(BACKGROUNDS))](random)
    placed = place(recolour(icon, random), random)
    canvas.paste(placed, (0, 0), placed)
    canvas = canvas.filter(ImageFilter.GaussianBlur(random.uniform(0, BLUR)))
    noise = random.normal(0, random.uniform(0, NOISE), (SIZE, SIZE, 3))
    return _image(np.asarray(canvas, np.float64) + noise)


def place(icon: Image.Image, random: np.random.Generator) -> Image.Image:
    """The icon somewhere on a transparent scene."""
    if random.random() < 0.5:
        icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = random.uniform(*SCALE) * SIZE
    angle, shear = np.radians(random.uniform(-TURN, TURN)), random.uniform(-SHEAR, SHEAR)
    free = SIZE - side
    centre = random.uniform(min(-CUT * side, free / 2), max(free + CUT * side, free / 2), size=2) + side / 2
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    # from positions in the scene to those in the icon
    back = turn @ np.array([[1, shear], [0, 1]]) * (icon.width / side)
    offset = icon.width / 2 - back @ centre
    small = icon.filter(ImageFilter.GaussianBlur(0.4 * icon.width / side))  # the transform does not average pixels
    coefficients = (back[0, 0], back[0, 1], offset[0], back[1, 0], back[1, 1], offset[1])
    return small.transform((SIZE, SIZE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def recolour(icon: Image.Image, random: np.random.Generator) -> Image.Image:
    """Another brightness and saturation, and a tint; the transparency stays."""
    pixels = np.asarray(icon, np.float64)
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    grey = colour.mean(axis=2, keepdims=True)
    colour = grey + (colour - grey) * random.uniform(*SATURATION)
    colour = colour * random.uniform(*BRIGHTNESS) * random.uniform(1 - TINT, 1 + TINT, 3)
    whole = np.concatenate([colour, alpha], axis=2)
    return Image.fromarray(np.clip(whole, 0, 255).round().astype(np.uint8), "RGBA")


def gradient(random: np.random.Generator) -> Image.Image:
    """From one random colour to another, in a random direction."""
    angle = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
    share = np.clip(0.5 + x * np.cos(angle) + y * np.sin(angle), 0, 1)[..., None]
    first, second = _colours(random, 2)
    return _image(first * (1 - share) + second * share)


def texture(random: np.random.Generator) -> Image.Image:
    """Smooth noise at two sizes, between two random colours."""
    share = np.zeros((SIZE, SIZE))
    for cells, weight in ((4, 0.6), (16, 0.4)):
        noise = Image.fromarray(random.integers(0, 256, (cells, cells), dtype=np.uint8))
        share += weight * np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255
    first, second = _colours(random, 2)
    return _image(first * (1 - share[..., None]) + second * share[..., None])


def clutter(random: np.random.Generator) -> Image.Image:
    """Ellipses, rectangles and lines in random colours on a gradient."""
    image = gradient(random)
    draw = ImageDraw.Draw(image)
    for colour in _colours(random, int(random.integers(4, 9))).astype(int):
        x, y = random.integers(-8, SIZE, size=2).tolist()
        box = (x, y, x + int(random.integers(6, 30)), y + int(random.integers(6, 30)))
        fill = tuple(colour.tolist())
        kind = random.integers(3)
        if kind == 0:
            draw.ellipse(box, fill=fill)
        elif kind == 1:
            draw.rectangle(box, fill=fill)
        else:
            draw.line(box, fill=fill, width=int(random.integers(2, 6)))
    return image


BACKGROUNDS = (gradient, texture, clutter)


def _colours(random: np.random.Generator, count: int) -> np.ndarray:
    """(count, 3) colours from 0 to 255, not far from each other."""
    return np.clip(random.uniform(40, 215, 3) + random.uniform(-CONTRAST, CONTRAST, (count, 3)), 0, 255)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8), "RGB")
