"""Folders of images and masks: layouts, classes, and how each problem is handled."""

from __future__ import annotations

import numpy as np
import pytest
from mask_files import NAMES, opened, save_mask, write_pairs
from PIL import Image

from scalekd.common.errors import UserError
from scalekd.data.images import BadImage
from scalekd.transfer.segmentation.data import (
    Crops,
    SegmentationImages,
)
from scalekd.transfer.segmentation.pairs import IGNORED, Pairs, as_classes, open_segments, read_classes
from scalekd.transfer.synthetic_scenes import Options, make_scenes

PLAIN = Crops((32, 32), scale=(1, 1), flip=0, photometric=False)


# ---------------------------------------------------------------- folders


def test_ade20k_as_the_scenes_have_it(tmp_path):
    options = Options(size=40, items=(2, 3))
    make_scenes(tmp_path / "ade", "fashion-mnist:train", "fashion-mnist:test", 3, 2, options)
    train, val = open_segments(tmp_path / "ade", reduce_zero_label=True)
    assert (len(train), len(val), len(train.classes)) == (3, 2, 10)
    stored = np.asarray(Image.open(tmp_path / "ade/annotations/training/000001.png"))
    image, mask = train[1]
    assert image.size == (40, 40)
    assert np.array_equal(mask == IGNORED, stored == 0) and np.array_equal(mask[stored > 0], stored[stored > 0] - 1)
    background = tmp_path / "ade" / "classes-with-background.txt"
    train, _ = open_segments(tmp_path / "ade", classes=background)
    assert np.array_equal(train[1][1], stored) and train.classes[0] == "background"


@pytest.mark.parametrize(
    "layout",
    [
        ("images/train", "masks/train", "images/val", "masks/val"),
        ("train/images", "train/labels", "validation/images", "validation/labels"),
    ],
)
def test_other_layouts_with_parts(tmp_path, layout):
    write_pairs(tmp_path / "a", 3)
    write_pairs(tmp_path / "b", 2)
    for source, target in zip(("a/images", "a/masks", "b/images", "b/masks"), layout):
        (tmp_path / "set" / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).rename(tmp_path / "set" / target)
    (tmp_path / "a" / "classes.txt").rename(tmp_path / "set" / "classes.txt")
    train, val = open_segments(tmp_path / "set")
    assert (len(train), len(val)) == (3, 2)


def test_a_folder_without_parts_holds_some_out(tmp_path):
    write_pairs(tmp_path / "set", 10)
    train, val = open_segments(tmp_path / "set", val_fraction=0.3)
    assert (len(train), len(val)) == (7, 3)
    assert not set(train.images) & set(val.images) and len({*train.images, *val.images}) == 10
    assert all(i.stem == m.stem for pairs in (train, val) for i, m in zip(pairs.images, pairs.masks))
    assert open_segments(tmp_path / "set", val_fraction=0.3)[1] == val
    assert open_segments(tmp_path / "set", val_fraction=0.3, seed=1)[1] != val


def test_masks_are_found_by_name_below_too(folder):
    for kind in ("images", "masks"):
        (folder / kind / "sub").mkdir()
        (folder / kind / "2.png").rename(folder / kind / "sub" / "2.png")
    Image.open(folder / "images" / "0.png").save(folder / "images" / "0.bmp")
    (folder / "images" / "0.png").unlink()
    pairs = opened(folder)
    assert [p.name for p in pairs.images] == ["0.bmp", "1.png", "3.png", "2.png"]
    assert pairs.masks[3] == folder / "masks" / "sub" / "2.png"
    assert all(
        np.array_equal(np.asarray(image)[:, :, 0], 50 * mask) for image, mask in map(pairs.__getitem__, range(4))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "masks" / "1.png").unlink(), r"1 of 4 files in .*images have no masks .* such as 1.png"),
        (lambda f: (f / "images" / "3.png").unlink(), r"1 of 4 files in .*masks have no images .* such as 3.png"),
        (lambda f: [p.unlink() for p in (f / "images").iterdir()], "images contains no images"),
        (lambda f: (f / "masks" / "1.png").rename(f / "masks" / "1.jpg"), "does not preserve the values"),
        (lambda f: (f / "images" / "1.bmp").write_bytes(b""), "have the same name without extension"),
        (lambda f: (f / "masks").rename(f / "other"), "has no images with masks"),
        (lambda f: (f / "classes.txt").unlink(), "has no classes.txt"),
        (lambda f: (f / "classes.txt").write_text(""), "is empty"),
        (lambda f: (f / "classes.txt").write_text("a\n\nb\n"), "line 2 is empty"),
        (lambda f: (f / "classes.txt").write_text("a\nb\na\n"), "lists a twice"),
        (lambda f: (f / "classes.txt").write_bytes(b"\xff\xfe"), "cannot read the class names"),
        (lambda f: (f / "classes.txt").write_text("a\nb\n"), r"(?s)2 classes use 0 to 1.*4 of 4 sampled images"),
        (lambda f: (f / "classes.txt").write_text("\n".join(map(str, range(256)))), "8 bits, for at most 255 classes"),
    ],
)
def test_problems_of_a_folder_are_reported_when_it_is_opened(folder, change, message):
    open_segments(folder)
    change(folder)
    with pytest.raises(UserError, match=message):
        open_segments(folder)


def test_one_part_alone_is_rejected(folder):
    for kind in ("images", "masks"):
        (folder / kind).rename(folder / "x")
        (folder / kind).mkdir()
        (folder / "x").rename(folder / kind / "train")
    with pytest.raises(UserError, match="images/validation"):
        open_segments(folder)
    with pytest.raises(UserError, match="is not a folder"):
        open_segments(folder / "nothing")


def test_too_few_to_hold_out(tmp_path):
    write_pairs(tmp_path / "set", 1)
    with pytest.raises(UserError, match="too few"):
        open_segments(tmp_path / "set")


def test_black_and_white_masks_are_not_taken_for_ignored_ones(tmp_path):
    write_pairs(tmp_path / "set", values=(0, 255))
    with pytest.raises(UserError, match="black-and-white"):
        opened(tmp_path / "set")
    write_pairs(tmp_path / "ignored", values=(255,))
    with pytest.raises(UserError, match="every pixel"):
        opened(tmp_path / "ignored")


def test_ade20ks_own_list_of_classes(tmp_path):
    file = tmp_path / "objectInfo150.txt"
    file.write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n22 \t0.1\t6\t1\tbuilding, edifice \n")
    assert read_classes(file) == ["wall", "building"]


# ---------------------------------------------------------------- masks


def rejected(pairs: Pairs, message: str) -> None:
    """The second pair is rejected with the names of its files; the others are not."""
    with pytest.raises(BadImage, match=message):
        pairs[1]
    error = SegmentationImages(pairs, PLAIN, seed=None)[(0, 1)]
    assert isinstance(error, UserError) and str(pairs.images[1]) in str(error) and str(pairs.masks[1]) in str(error)
    assert pairs[0] and pairs[2]


def test_a_mask_of_another_size(folder):
    rejected(save_mask(folder, np.zeros((30, 20), np.uint8)), "has 20x30 pixels, the image 30x20")


def test_values_beyond_the_class_list(folder):
    mask = np.zeros((20, 30), np.uint8)
    mask[0, :2] = 3, 99
    rejected(save_mask(folder, mask), "2 of 600 pixels have values beyond the class list, such as 3, 99: 3 classes")
    mask[0, 1] = 0
    rejected(save_mask(folder, mask), "set reduce_zero_label")  # one too high: perhaps they count from 1


def test_reduced_masks_ignore_zero():
    values = np.array([[0, 1, 3, 255]])
    assert as_classes(values, NAMES, True).tolist() == [[255, 0, 2, 255]]
    assert as_classes(np.array([[0, 1, 2, 255]]), NAMES, False).tolist() == [[0, 1, 2, 255]]
    with pytest.raises(BadImage, match="3 classes use 1 to 3"):
        as_classes(np.array([[4]]), NAMES, True)
    with pytest.raises(BadImage, match="such as -1"):
        as_classes(np.array([[-1]]), NAMES, True)


def test_masks_of_sixteen_bits_are_read_as_they_are(folder):
    mask = np.tile(np.array([0, 1, 65535], np.uint16), (20, 10))
    pairs = save_mask(folder, mask)
    assert np.array_equal(pairs[1][1], np.where(mask == 65535, IGNORED, mask))
    mask[0, 0] = 256  # not 0, which its lower 8 bits are
    rejected(save_mask(folder, mask), "such as 256")


def test_a_palette_s_indices_are_the_classes(folder):
    pairs = opened(folder)
    expected = pairs[1][1]
    image = Image.fromarray(expected)
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    assert image.mode == "P"
    image.save(folder / "masks" / "1.png")
    assert np.array_equal(pairs[1][1], expected)
    Image.fromarray(expected == 1).save(folder / "masks" / "1.png")  # 1 bit
    assert np.array_equal(pairs[1][1], expected == 1)


def test_colours_are_no_classes(folder):
    rejected(save_mask(folder, np.zeros((20, 30, 3), np.uint8)), "image of mode RGB; a mask has one channel")
    rejected(save_mask(folder, np.zeros((20, 30, 4), np.uint8)), "mode RGBA")


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("data", [b"", b"no image", None])
def test_files_that_cannot_be_read(folder, kind, data):
    pairs = opened(folder)
    file = folder / kind / "1.png"
    if data is None:  # cut off
        file.write_bytes(file.read_bytes()[:-200])
    else:
        file.write_bytes(data)
    with pytest.raises(BadImage):
        pairs[1]
    error = SegmentationImages(pairs, PLAIN, seed=0)[(0, 1)]
    assert isinstance(error, UserError) and str(file) in str(error)
    file.unlink()
    with pytest.raises(BadImage, match="No such file"):
        pairs[1]


def test_one_bad_mask_of_many_does_not_stop_the_opening(folder):
    save_mask(folder, np.zeros((20, 30, 3), np.uint8))
    assert len(opened(folder)) == 4
    for i in range(3):
        save_mask(folder, np.full((20, 30), 7, np.uint8), f"{i}.png") if i == 0 else Image.new("L", (3, 3)).save(
            folder / "masks" / f"{i}.png"
        )
    with pytest.raises(UserError, match="3 of 4 sampled images"):
        opened(folder)
