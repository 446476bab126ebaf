"""Draws predicted classes over an image, with a legend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from scalekd.common.text import printable
from scalekd.transfer.palette import palette

from .pairs import IGNORED

SMALLEST = 256  # pixels: smaller pictures are enlarged by a whole factor until the long side has as many
LISTED = 20  # most classes in a legend
LINE, MARGIN = 18, 8  # pixels


def overlay(
    image: Image.Image,
    predicted: NDArray[np.integer],
    classes: Sequence[str],
    opacity: float = 0.5,
    without: Sequence[str] = (),
) -> Image.Image:
    """The image in grey with its classes in colour and outlined, and a legend of the classes by share; RGB.

    predicted: (H, W) classes of the image's size; `IGNORED` is not coloured. without: names of classes that are not
    coloured either, such as a background. Small images are enlarged without interpolation.
    """
    if predicted.shape != image.size[::-1]:
        raise ValueError(f"predicted has shape {predicted.shape}, the image {image.height}x{image.width} pixels")
    factor = max(1, -(-SMALLEST // max(image.size)))
    large = np.kron(predicted, np.ones((factor, factor), predicted.dtype))
    grey = np.asarray(image.convert("L").resize(large.shape[::-1], Image.Resampling.NEAREST), np.float32)
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    hidden = [c for c, name in enumerate(classes) if name in without]
    coloured = ~np.isin(large, [IGNORED, *hidden])
    colours = np.zeros((IGNORED + 1, 3), np.float32)
    colours[: len(classes)] = palette(len(classes))
    strength = np.where(class_edges(large), 1.0, opacity)[coloured][:, None]
    picture[coloured] = (1 - strength) * picture[coloured] + strength * colours[large[coloured]]
    return _with_legend(Image.fromarray(picture.round().astype(np.uint8)), predicted, classes, hidden)


def class_edges(predicted: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Pixels next to another class. Outlines separate regions of similar colours."""
    edges = np.zeros(predicted.shape, bool)
    down, right = predicted[1:] != predicted[:-1], predicted[:, 1:] != predicted[:, :-1]
    edges[1:] |= down
    edges[:-1] |= down
    edges[:, 1:] |= right
    edges[:, :-1] |= right
    return edges


def _with_legend(
    picture: Image.Image, predicted: NDArray[np.integer], classes: Sequence[str], hidden: Sequence[int]
) -> Image.Image:
    shares = np.bincount(predicted.ravel(), minlength=len(classes))[: len(classes)] / predicted.size
    order = [int(c) for c in np.argsort(-shares, kind="stable") if shares[c] and c not in hidden]
    rows = [(palette(len(classes))[c], f"{100 * shares[c]:.1f} %  {_short(classes[c])}") for c in order[:LISTED]]
    rest = f"and {len(order) - LISTED} more" if len(order) > LISTED else ""
    if not rows:
        rest = "none of the classes"
    font = ImageFont.load_default(13)
    width = max(font.getlength(text) for text in [*(text for _, text in rows), rest])
    height = (len(rows) + bool(rest)) * LINE + 2 * MARGIN
    size = (round(picture.width + width) + LINE + 3 * MARGIN, max(picture.height, height))
    canvas = Image.new("RGB", size, "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    x, y = picture.width + MARGIN, MARGIN
    for colour, text in rows:
        draw.rectangle((x, y + 2, x + LINE - 4, y + LINE - 4), fill=colour, outline="black")
        draw.text((x + LINE + MARGIN, y + 1), text, "black", font)
        y += LINE
    draw.text((x + LINE + MARGIN, y + 1), rest, "black", font)
    return canvas


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 28 else f"{name[:26]}..."
