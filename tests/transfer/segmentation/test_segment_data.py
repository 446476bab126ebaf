"""Images with masks: what bad ones become, random crops, and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.data.images import BadImage, BadImages
from scalekd.data.samplers import TrainSampler
from scalekd.transfer.scenes import Options, make_scenes
from scalekd.transfer.segmentation import data as segment_data
from scalekd.transfer.segmentation.data import (
    Crops,
    SegmentationImages,
    batches_of,
    eval_batches,
    training_crop,
    whole_image,
)
from scalekd.transfer.segmentation.pairs import IGNORED, Pairs, as_classes, open_pairs, open_segments, read_classes

NAMES = ["wall", "floor", "sky"]
PLAIN = Crops((32, 32), scale=(1, 1), flip=0, photometric=False)


def write_pairs(root: Path, count: int = 4, values: tuple[int, ...] = (0, 1, 2), size: tuple[int, int] = (20, 30)):
    """images/ and masks/: pixel and class of a place belong together, the grey level is 50 times the class."""
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        mask = random.choice(values, size).astype(np.uint8)
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
        Image.fromarray(np.repeat(50 * mask[:, :, None], 3, 2)).save(root / "images" / f"{i}.png")
    (root / "classes.txt").write_text("".join(f"{n}\n" for n in NAMES))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "set")
    return tmp_path / "set"


def opened(folder: Path) -> Pairs:
    return open_pairs(folder / "images", folder / "masks", NAMES)


def save_mask(folder: Path, values: np.ndarray, name: str = "1.png", **options: object) -> Pairs:
    """The pairs of `folder` with another mask in the place of its second."""
    pairs = opened(folder)
    Image.fromarray(values, **options).save(folder / "masks" / name)
    return pairs


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


# ---------------------------------------------------------------- crops


def pair(height: int = 20, width: int = 30) -> tuple[Image.Image, np.ndarray]:
    mask = np.random.default_rng(0).integers(0, 4, (height, width), dtype=np.uint8)
    return Image.fromarray(np.repeat(60 * mask[:, :, None], 3, 2)), mask


def test_a_crop_keeps_pixels_and_classes_together():
    image, mask = pair(60, 90)
    crops = Crops((40, 24), scale=(5 / 2, 5 / 2), photometric=False)  # 60x90: as it is
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, classes = training_crop(image, mask, crops)
        assert pixels.dtype == classes.dtype == torch.uint8 and pixels.shape == (3, 40, 24)
        assert torch.equal(pixels, 60 * classes.expand(3, -1, -1))
        places = [
            (y, x, flip)
            for y in range(21)
            for x in range(67)
            for flip in (False, True)
            if np.array_equal(mask[y : y + 40, x : x + 24][:, :: -1 if flip else 1], classes.numpy())
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 15 and {flip for *_, flip in seen} == {False, True}


def test_sizes_are_those_of_the_recipe(monkeypatch):
    # short side 512 times 0.5 to 2, long side at most four times that; what a 512 crop then lacks is padded
    sizes = [
        segment_data.evaluation_size(h, w, (512, 512), s) for h, w, s in ((683, 512, 1), (512, 683, 2), (64, 640, 1))
    ]
    assert sizes == [(683, 512), (1024, 1366), (205, 2048)]
    drawn = []
    monkeypatch.setattr(segment_data, "resized", lambda pixels, size: drawn.append(size) or pixels)
    for seed in range(200):
        torch.manual_seed(seed)
        training_crop(*pair(32, 32), Crops((32, 32), photometric=False, flip=0))
    shorts = [h for h, _ in drawn]
    assert min(shorts) in (16, 17) and max(shorts) in (63, 64) and abs(np.mean(shorts) - 40) < 2


def test_small_images_are_padded_with_the_mean_and_ignored():
    image, mask = pair(20, 30)
    torch.manual_seed(0)
    pixels, classes = training_crop(image, mask, Crops((20, 40), scale=(1, 1), flip=0, photometric=False))
    assert torch.equal(classes[:, :30], torch.from_numpy(mask)) and (classes[:, 30:] == IGNORED).all()
    assert pixels[:, :, 30:].unique(dim=2).shape[2] == 1 and pixels[:, 5, 35].tolist() == [124, 116, 104]


def test_resized_masks_stay_in_place():
    # stripes of two classes: their borders move with those of the pixels, and neither to the left nor to the right
    stripes = [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    mask = np.repeat([stripes], 15, 0).astype(np.uint8)
    crops = Crops((20, 20), scale=(1, 1), most=1.1, flip=0, photometric=False)
    seen = []
    for turned in (mask, np.ascontiguousarray(mask[:, ::-1])):
        pixels, classes = training_crop(Image.fromarray(np.repeat(200 * turned[:, :, None], 3, 2)), turned, crops)
        assert ((pixels[0] > 100) == (classes == 1)).float().mean() > 0.95
        seen.append(classes)
    assert torch.equal(seen[0], seen[1].flip(-1)) and len(seen[0].unique()) == 2


def test_no_class_fills_a_crop_if_that_can_be():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 56:] = 1  # most crops of 16 see one class
    image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))

    def share_of_mixed(most: float) -> float:
        crops = Crops((16, 16), scale=(4, 4), most=most, flip=0, photometric=False)
        mixed = 0
        for seed in range(100):
            torch.manual_seed(seed)
            counts = torch.bincount(training_crop(image, mask, crops)[1].flatten().long(), minlength=2)
            mixed += bool(counts.max() < 0.75 * counts.sum())
        return mixed / 100

    # 4 of 49 places see more than 4 columns of class 1: a try succeeds in 8 % of the cases, ten tries do in 57 %
    assert share_of_mixed(1.1) < 0.2
    assert share_of_mixed(0.75) > 0.4
    # a picture of ignored pixels alone ends too
    torch.manual_seed(0)
    assert (training_crop(image, np.full((64, 64), 255, np.uint8), PLAIN)[1] == IGNORED).all()


def test_colours_change_and_channels_keep_their_places():
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    mask = np.tile(np.arange(4, dtype=np.uint8), (8, 2))
    seen = []
    for seed in range(40):
        torch.manual_seed(seed)
        seen.append(training_crop(image, mask, Crops((8, 8), scale=(1, 1), flip=0))[0][:, 4, 4].tolist())
    assert len({tuple(p) for p in seen}) > 20
    assert all(red == max(red, green, blue) for red, green, blue in seen)  # hue moves by a tenth: red stays the first
    grey = training_crop(image, mask, Crops((8, 8), scale=(1, 1), channels=1, fill=(0.5,)))[0]
    assert grey.shape == (1, 8, 8)


def test_whole_images_are_resized_and_their_masks_are_not():
    image, mask = pair(20, 30)
    pixels, classes = whole_image(image, mask, Crops((40, 40)))
    assert pixels.shape == (3, 40, 60) and np.array_equal(classes.numpy(), mask)


# ---------------------------------------------------------------- batches


def test_a_sample_depends_on_seed_epoch_and_index_alone(folder):
    crops = Crops((24, 24))
    one, other = SegmentationImages(opened(folder), crops, 7), SegmentationImages(opened(folder), crops, 7)
    first = one[(2, 1)]
    one[(0, 0)]
    again = other[(2, 1)]
    assert torch.equal(first.pair[0], again.pair[0]) and torch.equal(first.pair[1], again.pair[1])
    assert not torch.equal(first.pair[0], one[(3, 1)].pair[0])
    assert not torch.equal(first.pair[0], SegmentationImages(opened(folder), crops, 8)[(2, 1)].pair[0])


def test_batches_of_a_loader_are_the_samples(folder):
    images = SegmentationImages(opened(folder), Crops((24, 24)), 7)
    sampler = TrainSampler(4, batch_size=2, seed=0, total_steps=4, start_step=1)
    batches = list(batches_of(images, sampler, workers=1, pin=False))
    assert len(batches) == 3
    for batch, keys in zip(batches, sampler):
        assert batch.images.shape == (2, 3, 24, 24) and batch.targets.shape == (2, 24, 24)
        for pixels, classes, key in zip(batch.images, batch.targets, keys):
            assert torch.equal(pixels, images[key].pair[0]) and torch.equal(classes, images[key].pair[1])


def test_images_of_several_sizes_are_evaluated_each_once(folder):
    for i, size in ((1, (24, 20)), (3, (40, 30))):
        for kind in ("images", "masks"):
            file = folder / kind / f"{i}.png"
            Image.open(file).resize(size, Image.Resampling.NEAREST).save(file)
    images = SegmentationImages(opened(folder), Crops((20, 20)), None)
    batches = list(eval_batches(images, 3, workers=0, pin=False))
    assert [tuple(b.targets.shape) for b in batches] == [(1, 20, 30), (1, 20, 24), (1, 20, 30), (1, 30, 40)]
    halves = [list(eval_batches(images, 1, 0, False, rank=r, world=2)) for r in (0, 1)]
    assert [len(h) for h in halves] == [2, 2]
    assert torch.equal(halves[1][0].targets, batches[1].targets)


def test_a_bad_pair_stops_or_is_left_out_and_noted(folder):
    pairs = save_mask(folder, np.full((20, 30), 9, np.uint8))
    with pytest.raises(UserError, match=r"cannot use .*1.png: its mask .*beyond the class list"):
        list(eval_batches(SegmentationImages(pairs, PLAIN, None), 2, 0, False))
    bad = BadImages("train", 4, 0.25)
    batches = list(eval_batches(SegmentationImages(pairs, PLAIN, None, bad), 2, 0, False))
    assert sum(len(b.targets) for b in batches) == 3 and list(bad.found) == [str(pairs.images[1])]
    sample = SegmentationImages(pairs, PLAIN, 0, BadImages("train", 4, 0.25))[(0, 1)]  # the next takes its place
    seed_everything(0, 0, 1)
    assert torch.equal(sample.pair[1], training_crop(*pairs[2], PLAIN)[1]) and len(sample.skipped) == 1
