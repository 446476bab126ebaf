"""Training and evaluation images of a detector, and their batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coco_files import GOOD, annotation, opened
from PIL import Image

from scalekd.common.errors import UserError
from scalekd.data.images import BadImages
from scalekd.data.samplers import TrainSampler
from scalekd.transfer.detection.data import DetectionImages, Scales, batches_of, eval_batches

PLAIN = Scales(short=(20,), long=40, flip=0.0)  # the images have 40x20 pixels and stay as they are


def test_a_training_item(folder):
    crowd = annotation(3, bbox=(0, 0, 40, 20), iscrowd=1, segmentation={"size": [20, 40], "counts": [0, 800]})
    coco = opened(folder, annotations=[*GOOD["annotations"], crowd])
    assert "1 crowd region" in coco.summary()[0]
    images = DetectionImages(coco, PLAIN, seed=0)
    assert len(images) == 2  # the third has no object
    (pixels,), (target,), _ = images[0, 0]
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(Image.open(folder / "images" / "1.png")))
    assert target["boxes"].tolist() == [[2, 2, 12, 10]] and target["labels"].tolist() == [1]  # without the crowd
    assert target["masks"].shape == (1, 20, 40) and target["masks"].sum() == 80
    assert target["picture"] == 0 and target["size"].tolist() == [20, 40]
    assert type(pixels) is type(target["boxes"]) is torch.Tensor


def test_flip_and_resize_move_boxes_and_masks_with_the_pixels(folder):
    coco = opened(folder)
    (straight,), _, _ = DetectionImages(coco, PLAIN, seed=0)[0, 0]
    (flipped,), (target,), _ = DetectionImages(coco, Scales((20,), 40, flip=1.0), seed=0)[0, 0]
    assert torch.equal(flipped, straight.flip(-1))
    assert target["boxes"].tolist() == [[40 - 12, 2, 40 - 2, 10]]
    assert target["masks"][0, 2:10, 28:38].all() and target["masks"].sum() == 80

    (large,), (target,), _ = DetectionImages(coco, Scales((60,), 200, flip=0.0), seed=0)[0, 0]
    assert large.shape == (3, 60, 120)
    assert target["boxes"].tolist() == [[6, 6, 36, 30]]
    assert target["masks"][0, 6:30, 6:36].all() and target["masks"].sum() == 24 * 30
    (long,), _, _ = DetectionImages(coco, Scales((60,), 50, flip=0.0), seed=0)[0, 0]
    assert long.shape == (3, 25, 50)


def test_what_is_random_depends_on_seed_epoch_and_index_only(folder):
    images = DetectionImages(opened(folder), Scales(tuple(range(20, 60)), 200), seed=3)
    first = images[1, 0]
    torch.manual_seed(99)
    images[0, 1]
    again = images[1, 0]
    assert torch.equal(first.images[0], again.images[0])
    assert torch.equal(first.targets[0]["boxes"], again.targets[0]["boxes"])
    assert len({images[epoch, 0].images[0].shape for epoch in range(8)}) > 1


def test_evaluation_items_are_all_images_as_they_are(folder):
    coco = opened(folder)
    batches = list(eval_batches(DetectionImages(coco, Scales(), None), 2, 0, False))
    assert [[int(t["picture"]) for t in batch.targets] for batch in batches] == [[0, 1], [2]]
    assert all(image.shape == (3, 20, 40) for batch in batches for image in batch.images)
    assert set(batches[0].targets[0]) == {"picture", "size"}
    grey = DetectionImages(coco, Scales(channels=1), None)
    assert grey[0, 0].images[0].shape == (1, 20, 40)


def test_scales_within_a_limit():
    assert Scales((480, 800), 1333).limited(None) == Scales((480, 800), 1333)
    assert Scales((480, 800), 1333).limited(512) == Scales((480,), 512)
    assert Scales((480, 800), 1333).limited(224) == Scales((224,), 224)


def test_a_class_without_a_readable_image_is_named(folder):
    coco = opened(folder)
    (folder / "images" / "1.png").write_bytes(b"")
    bad = BadImages("train", 30, 1.0)
    sampler = TrainSampler(size=2, batch_size=2, seed=0, total_steps=1)
    with pytest.raises(UserError, match=r"none of the 1 training images of the class bag can be read, such as .*1.png"):
        list(batches_of(DetectionImages(coco, PLAIN, 0, bad), sampler, 0, False))
    coco = opened(folder, annotations=[*GOOD["annotations"], annotation(3, image=2)])
    assert len(list(batches_of(DetectionImages(coco, PLAIN, 0, bad), sampler, 0, False))) == 1


def test_bad_images_stop_or_are_passed_over(folder):
    coco = opened(folder, annotations=[*GOOD["annotations"], annotation(3, image=2)])
    Image.new("RGB", (20, 40)).save(folder / "images" / "1.png")  # lies on its side now
    sampler = TrainSampler(size=2, batch_size=2, seed=0, total_steps=1)
    with pytest.raises(
        UserError, match=r"cannot use .*1.png: it has 20x40 pixels after EXIF rotation, but .* for 40x20"
    ):
        list(batches_of(DetectionImages(coco, PLAIN, 0), sampler, 0, False))
    bad = BadImages("train", 30, 0.1)
    (batch,) = batches_of(DetectionImages(coco, PLAIN, 0, bad), sampler, 0, False)
    assert [int(t["picture"]) for t in batch.targets] == [1, 1] and len(bad.found) == 1
    bad = BadImages("val", 30, 0.1)
    batches = list(eval_batches(DetectionImages(coco, PLAIN, None, bad), 1, 0, False))
    assert [int(batch.targets[0]["picture"]) for batch in batches] == [1, 2]
