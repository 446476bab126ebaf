"""Draws a detector's objects on the image: boxes, masks, names and scores."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_segmentation_masks

from scalekd.common.text import printable
from scalekd.transfer.palette import palette

SMALLEST = 512  # pixels: smaller pictures are enlarged to make names readable
LONGEST = 24  # letters of a name that are shown
Box = tuple[float, float, float, float]  # left, top, right, bottom


def picture(
    image: Image.Image, prediction: dict[str, Tensor], classes: Sequence[str], threshold: float = 0.5
) -> Image.Image:
    """An RGB picture of the objects with a score of at least `threshold`, the best on top, one colour per class.

    prediction: of `Detector.forward` for this image, or a target, which has no scores.
    classes: the names of the labels 1, 2, ...
    """
    scores = prediction.get("scores")
    count = len(prediction["labels"])
    kept = [i for i in range(count) if scores is None or scores[i] >= threshold]
    order = sorted(kept, key=lambda i: float(scores[i]) if scores is not None else 0.0)  # the best is drawn last
    factor = max(1, -(-SMALLEST // max(image.size)))
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    colours = palette(len(classes))
    object_colours = [colours[int(prediction["labels"][i]) - 1] for i in order]
    if order and "masks" in prediction:
        canvas = _with_masks(canvas, prediction["masks"][order], object_colours, factor)

    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(14, max(canvas.size) // 50))
    boxes: list[Box] = [tuple(factor * float(v) for v in prediction["boxes"][i]) for i in order]  # type: ignore[misc]
    for box, colour in zip(boxes, object_colours):
        draw.rectangle(box, outline=colour, width=max(2, max(canvas.size) // 300))
    taken: list[Box] = []
    for i, box, colour in reversed(list(zip(order, boxes, object_colours))):  # the best choose their position first
        score = f" {100 * float(scores[i]):.0f} %" if scores is not None else ""
        text = _short(classes[int(prediction["labels"][i]) - 1]) + score
        taken.append(draw_label(draw, text, box, colour, font, taken, canvas.size))
    return canvas


def _with_masks(
    canvas: Image.Image, masks: Tensor, colours: Sequence[tuple[int, int, int]], factor: int
) -> Image.Image:
    masks = masks.reshape(len(colours), *masks.shape[-2:]).float().cpu() >= 0.5
    masks = masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    # one by one: drawn together, overlapping masks would mix their colours
    pixels = TF.pil_to_tensor(canvas)
    for mask, colour in zip(masks, colours):
        pixels = draw_segmentation_masks(pixels, mask, alpha=0.5, colors=colour)
    return TF.to_pil_image(pixels)


def draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: Box,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    taken: Sequence[Box],
    size: tuple[int, int],
) -> Box:
    """Draws text on a plate above the box, or lower if that is outside the picture or overlaps the plates in `taken`.

    size: (width, height) of the picture. Returns the plate.
    """
    width, height = (v + 6 for v in draw.textbbox((0, 0), text, font=font)[2:])
    left = min(max(box[0], 0), max(0, size[0] - width))
    top = max(box[1] - height, 0)
    while top + 2 * height <= size[1] and any(_overlap((left, top, left + width, top + height), t) for t in taken):
        top += height
    plate = (left, top, left + width, top + height)
    draw.rectangle(plate, fill=colour)
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140  # ITU-R BT.601
    draw.text((left + 3, top + 2), text, fill="black" if dark else "white", font=font)
    return plate


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(name: str) -> str:
    return printable(name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}...")
