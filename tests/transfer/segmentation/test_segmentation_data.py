"""Random crops, whole images, and batches of a segmenter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mask_files import opened, save_mask
from PIL import Image

from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.data.images import BadImages
from scalekd.data.samplers import TrainSampler
from scalekd.transfer.segmentation import data as segment_data
from scalekd.transfer.segmentation.data import (
    Crops,
    SegmentationImages,
    batches_of,
    eval_batches,
    training_crop,
    whole_image,
)
from scalekd.transfer.segmentation.pairs import IGNORED

PLAIN = Crops((32, 32), scale=(1, 1), flip=0, photometric=False)


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


def test_a_class_without_a_readable_pair_is_named(folder):
    pairs = save_mask(folder, np.full((20, 30), 1, np.uint8))
    for i in (0, 2, 3):
        save_mask(folder, np.full((20, 30), i % 2 * 2, np.uint8), f"{i}.png")  # "sky" is in 3 only
    (folder / "images" / "0.png").write_bytes(b"")
    bad = BadImages("val", 4, 1.0)
    assert len(list(eval_batches(SegmentationImages(pairs, PLAIN, None, bad), 4, 0, False))) == 1
    (folder / "images" / "3.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"none of the 1 validation images of the class sky can be read, such as .*3.png"
    ):
        list(eval_batches(SegmentationImages(pairs, PLAIN, None, bad), 4, 0, False))
