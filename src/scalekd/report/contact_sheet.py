"""A contact sheet: one picture with thumbnails of images and the class that a student predicts for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from scalekd.common.results import Prediction
from scalekd.common.text import printable

MOST = 120  # images on a sheet; evenly spaced ones of more
COLUMNS = 8
THUMBNAIL, GAP, EDGE, CAPTION, TITLE = 168, 16, 28, 58, 40  # pixels
PAPER, FRAME, INK, PALE, BAR, OTHER = "#ffffff", "#f1f2f4", "#16181d", "#6b7280", "#3f6fb5", "#c2543a"


class Cell(NamedTuple):
    """An image and what is said of it."""

    image: Image.Image
    title: str  # such as its class
    number: str  # at the right of the title
    share: float  # length of the bar, in [0, 1]
    name: str  # of the file
    colour: str = BAR


def predicted(image: Image.Image, prediction: Prediction, several: bool = False) -> Cell:
    """An image with its most probable class.

    several: the classes of a prediction are the labels of the image, of which the first is shown and the others counted.
    """
    name, share = next(zip(prediction.classes, prediction.probabilities), ("no label", 0.0))
    others = len(prediction.classes) - 1 if several else 0
    return Cell(image, name + f" + {others}" * (others > 0), f"{100 * share:.0f} %", share, prediction.image)


def chosen(images: int) -> list[int]:
    """Which of so many images are on the sheet: all, or `MOST` of them, evenly spaced."""
    return list(range(images)) if images <= MOST else [i * images // MOST for i in range(MOST)]


def contact_sheet(cells: Sequence[Cell], title: str, columns: int | None = None) -> Image.Image:
    """An RGB picture of all cells, from left to right: the image as a whole, its title and number, its name.

    columns: by default as many as rows, at most `COLUMNS`.
    """
    columns = columns or min(COLUMNS, max(2, math.ceil(math.sqrt(len(cells)))))
    rows = math.ceil(len(cells) / columns)
    width = 2 * EDGE + columns * THUMBNAIL + (columns - 1) * GAP
    height = 2 * EDGE + TITLE + rows * (THUMBNAIL + CAPTION) + (rows - 1) * GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((EDGE, EDGE - 4), title, INK, ImageFont.load_default(20))
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        left = EDGE + column * (THUMBNAIL + GAP)
        _draw_cell(sheet, draw, cell, left, EDGE + TITLE + row * (THUMBNAIL + CAPTION + GAP))
    return sheet


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    draw.rectangle((left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1), FRAME)
    small = _fitted(cell.image.convert("RGB"))
    sheet.paste(small, (left + (THUMBNAIL - small.width) // 2, top + (THUMBNAIL - small.height) // 2))
    line = top + THUMBNAIL
    draw.rectangle((left, line, left + THUMBNAIL - 1, line + 3), FRAME)
    draw.rectangle((left, line, left + max(1, round(cell.share * THUMBNAIL)) - 1, line + 3), cell.colour)
    font, small_font = ImageFont.load_default(15), ImageFont.load_default(12)
    room = THUMBNAIL - draw.textlength(cell.number, font) - 8
    draw.text((left, line + 10), _short(draw, printable(cell.title), font, room), INK, font)
    draw.text((left + THUMBNAIL, line + 10), cell.number, INK, font, anchor="ra")
    file = _short(draw, cell.name, small_font, THUMBNAIL, from_end=True)
    draw.text((left, line + 33), file, PALE, small_font)


def _fitted(image: Image.Image) -> Image.Image:
    """The whole image in the size of a thumbnail. A much smaller one keeps sharp pixels."""
    factor = THUMBNAIL / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    image = image if factor > 0.25 else image.reduce(max(1, int(0.5 / factor)))  # a photo has forty times the pixels
    return image.resize(size, Image.Resampling.NEAREST if factor >= 3 else Image.Resampling.LANCZOS)


def _short(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    room: float,
    from_end: bool = False,
) -> str:
    """`text` cut to `room` pixels; from_end: keep its end, as of a path."""
    if draw.textlength(text, font) <= room:
        return text
    text = text[-60:] if from_end else text[:60]
    while text and draw.textlength(f"...{text}", font) > room:
        text = text[1:] if from_end else text[:-1]
    return f"...{text}" if from_end else f"{text.rstrip()}..."
