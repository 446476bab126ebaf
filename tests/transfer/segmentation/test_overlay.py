"""Colours that can be told apart, at the pixels where they belong, with the legend that names them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from scalekd.transfer.palette import FIRST, palette
from scalekd.transfer.segmentation.overlay import LISTED, class_edges, overlay


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_colours_differ_and_do_not_depend_on_their_number():
    colours = np.array(palette(150))
    assert len(np.unique(colours, axis=0)) == 150 and palette(12) == palette(150)[:12]
    apart = np.linalg.norm(colours[:20, None] - colours[None, :20], axis=2) + 1000 * np.eye(20)
    assert apart.min() > 40
    assert colours.min() >= 0 and colours.max() <= 255 and palette(2) == FIRST[:2]


def test_every_pixel_has_the_colour_of_its_class():
    image = Image.fromarray(np.full((300, 400, 3), 100, np.uint8))
    predicted = np.zeros((300, 400), np.uint8)
    predicted[:, 200:] = 1
    predicted[:50] = 255
    out = pixels(overlay(image, predicted, ["a", "b"], opacity=0.5))
    assert out.shape[0] == 300 and out.shape[1] > 400
    for column, c in ((100, 0), (300, 1)):
        assert np.abs(out[150, column] - (50 + np.array(FIRST[c]) / 2)).max() <= 1
        assert (out[20, column] == 100).all()  # ignored: as it was
        assert (out[150, 199 + c] == FIRST[c]).all()  # the outline is the colour itself
    hidden = pixels(overlay(image, predicted, ["a", "b"], without=["a"]))
    assert (hidden[150, 100] == 100).all() and (hidden[150, 300] == out[150, 300]).all()


def legend_squares(picture: Image.Image, width: int) -> list[tuple[int, ...]]:
    """The colours of the legend's squares, from above: what stands 6 pixels inside of it, not white."""
    column = pixels(picture)[:, width + 14]
    runs = [tuple(column[0])]
    for colour in map(tuple, column):
        if colour != runs[-1]:
            runs.append(colour)
    return [tuple(int(v) for v in c) for c in runs if c not in ((255, 255, 255), (0, 0, 0))]


def test_the_legend_lists_classes_by_their_share():
    predicted = np.repeat(np.array([2, 0, 0, 0, 1, 1], np.uint8), 50)[:, None].repeat(300, 1)
    picture = overlay(Image.new("RGB", (300, 300)), predicted, ["a", "b", "c", "never"])
    assert legend_squares(picture, 300) == [FIRST[0], FIRST[1], FIRST[2]]
    assert legend_squares(overlay(Image.new("RGB", (300, 300)), predicted, list("abcd"), without=["b"]), 300) == [
        FIRST[0],
        FIRST[2],
    ]


def test_a_long_legend_is_cut_and_an_empty_one_says_so():
    predicted = np.arange(300 * 300).reshape(300, 300) % 40
    long = overlay(Image.new("RGB", (300, 300)), predicted, [f"class {i}" for i in range(40)])
    assert len(legend_squares(long, 300)) == LISTED and long.height > 300
    none = overlay(Image.new("RGB", (300, 300), "white"), np.full((300, 300), 255), ["a"])
    assert (pixels(none)[:, 300:] < 128).any()  # it says something
    wide = overlay(Image.new("RGB", (300, 300)), predicted, ["\x1b[31m" + "long " * 50] + ["x"] * 39)
    assert wide.width < 700


def test_small_images_are_enlarged_and_grey_ones_are_fine():
    predicted = np.zeros((28, 20), np.uint8)
    predicted[:14] = 1
    picture = overlay(Image.new("L", (20, 28), 100), predicted, ["a", "b"])
    assert picture.height == 280  # ten times: 256 or more
    assert (pixels(picture)[139, :200] == FIRST[1]).all() and (pixels(picture)[140, :200] == FIRST[0]).all()


def test_edges_by_hand():
    edges = class_edges(np.array([[0, 0, 1], [0, 0, 0]]))
    assert edges.tolist() == [[False, True, True], [False, False, True]]


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="28"):
        overlay(Image.new("L", (20, 28)), np.zeros((20, 28), np.uint8), ["a"])
