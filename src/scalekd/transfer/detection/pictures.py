"""What a detector found, drawn on the image: boxes, masks, names and scores."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_segmentation_masks

from scalekd.common.text import printable
from scalekd.transfer.palette import palette

SMALLEST = 512  # pixels: a smaller picture is enlarged, so that names can be read in it
LONGEST = 24  # letters of a name
Box = tuple[float, float, float, float]  # left, top, right, bottom


def picture(
    image: Image.Image, prediction: dict[str, Tensor], classes: Sequence[str], threshold: float = 0.5
) -> Image.Image:
    """An RGB picture of the objects whose score is at least `threshold`, the best on top, a colour for each class.

    prediction: `Detector.forward`'s for this image, or a target, whose objects have no scores.
    classes: the names of label 1, 2, ...
    """
    scores = prediction.get("scores")
    count = len(prediction["labels"])
    kept = [i for i in range(count) if scores is None or scores[i] >= threshold]
    order = sorted(kept, key=lambda i: float(scores[i]) if scores is not None else 0.0)  # the best last, on top
    factor = max(1, -(-SMALLEST // max(image.size)))
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    colours = palette(len(classes))
    own = [colours[int(prediction["labels"][i]) - 1] for i in order]
    if order and "masks" in prediction:
        canvas = _with_masks(canvas, prediction["masks"][order], own, factor)

    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(14, max(canvas.size) // 50))
    boxes: list[Box] = [tuple(factor * float(v) for v in prediction["boxes"][i]) for i in order]  # type: ignore[misc]
    for box, colour in zip(boxes, own):
        draw.rectangle(box, outline=colour, width=max(2, max(canvas.size) // 300))
    taken: list[Box] = []
    for i, box, colour in reversed(list(zip(order, boxes, own))):  # the best get the best places
        score = f" {100 * float(scores[i]):.0f} %" if scores is not None else ""
        text = _short(classes[int(prediction["labels"][i]) - 1]) + score
        taken.append(_label(draw, text, box, colour, font, taken, canvas.size))
    return canvas


def _with_masks(
    canvas: Image.Image, masks: Tensor, colours: Sequence[tuple[int, int, int]], factor: int
) -> Image.Image:
    masks = masks.reshape(len(colours), *masks.shape[-2:]).float().cpu() >= 0.5
    masks = masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    # one by one: together, overlapping masks would mix and none would be seen as it is
    pixels = TF.pil_to_tensor(canvas)
    for mask, colour in zip(masks, colours):
        pixels = draw_segmentation_masks(pixels, mask, alpha=0.5, colors=colour)
    return TF.to_pil_image(pixels)


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: Box,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    taken: Sequence[Box],
    size: tuple[int, int],
) -> Box:
    """Writes on a plate above the box, or lower where that is outside the picture or taken; returns the plate."""
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
