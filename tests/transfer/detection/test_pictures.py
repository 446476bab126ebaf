"""What a detector found, drawn: looked at pixel by pixel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from scalekd.transfer.detection.pictures import draw_label, picture
from scalekd.transfer.palette import palette

CLASSES = ["bag", "tie", "a name that is much too long to be written"]


def prediction(*objects) -> dict[str, torch.Tensor]:
    """Of (left, top, right, bottom), label, score; the mask is the left half of the box."""
    masks = torch.zeros(len(objects), 1, 80, 100)
    for mask, ((left, top, right, bottom), _, _) in zip(masks, objects):
        mask[0, top:bottom, left : (left + right) // 2] = 0.8
    return {
        "boxes": torch.tensor([box for box, _, _ in objects], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in objects]),
        "masks": masks,
    }


def test_boxes_masks_and_names_are_where_they_belong():
    grey = Image.new("L", (100, 80), 100)
    drawn = np.asarray(picture(grey, prediction(((20, 30, 60, 70), 2, 0.9)), CLASSES))
    assert drawn.shape == (480, 600, 3)  # 6 times as large
    colour = palette(3)[1]
    assert tuple(drawn[300, 120]) == tuple(drawn[300, 359]) == tuple(drawn[419, 300]) == colour  # the box
    blended = [round((100 + c) / 2) for c in colour]
    np.testing.assert_allclose(drawn[300, 180], blended, atol=1)  # the mask
    assert tuple(drawn[300, 300]) == tuple(drawn[450, 500]) == (100, 100, 100)  # neither
    plate = drawn[180 - 18 : 180 - 2, 122:180].reshape(-1, 3)  # above the box
    assert (plate == colour).all(1).mean() > 0.5 and (plate.sum(1) < 120).any()  # dark letters on the colour


def test_what_is_unsure_is_left_out():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8))
    plain = image.resize((600, 480), Image.Resampling.NEAREST)
    unsure = prediction(((20, 30, 60, 70), 1, 0.3))
    assert np.array_equal(picture(image, unsure, CLASSES), plain)
    assert np.array_equal(picture(image, prediction(), CLASSES), plain)
    assert not np.array_equal(picture(image, unsure, CLASSES, threshold=0.3), plain)


def test_a_target_is_drawn_without_scores_and_a_large_image_keeps_its_size():
    target = {"boxes": torch.tensor([[10.0, 10, 200, 300]]), "labels": torch.tensor([3])}
    drawn = picture(Image.new("RGB", (640, 512)), target, CLASSES)
    assert drawn.size == (640, 512)
    assert drawn.getpixel((10, 200)) == palette(3)[2]


@pytest.mark.parametrize("box", [(0, 0, 50, 50), (560, 2, 600, 40), (590, 470, 600, 480), (-5, -5, 610, 490)])
def test_plates_stay_in_the_picture_and_apart(box):
    canvas = Image.new("RGB", (600, 480))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    taken: list = []
    for _ in range(3):
        taken.append(draw_label(draw, "tie 90 %", box, (255, 255, 0), font, taken, canvas.size))
    for left, top, right, bottom in taken:
        assert left >= 0 and top >= 0 and right <= 600 and bottom <= 480
    if box[1] < 400:
        tops = sorted(plate[1] for plate in taken)
        assert all(b - a >= taken[0][3] - taken[0][1] for a, b in itertools.pairwise(tops))
