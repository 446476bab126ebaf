"""Batches have the same pixels for any number of workers and processes and any first step."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from scalekd.common.seeds import seed_everything
from scalekd.data.batches import Images, eval_batches, train_batches, training_images, validation_images
from scalekd.data.options import Augment, Data
from scalekd.data.samplers import TrainSampler
from scalekd.data.sources.idx import FASHION_CLASSES
from scalekd.data.sources.open import open_source
from scalekd.data.split import Split, open_split
from scalekd.data.transforms import eval_transform, make_mixup, train_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def keys(size: int = 10, batch_size: int = 4, seed: int = 0, total_steps: int = 6, **options: int) -> list:
    return list(TrainSampler(size, batch_size, seed, total_steps, **options))


@pytest.fixture
def split(image_folder: Path) -> Split:
    return open_split(Data(train=str(image_folder / "train"), val=str(image_folder / "val")))


@pytest.fixture
def images(split: Split) -> Images:
    """24 training images with every random augmentation."""
    data = Data(train="", image_size=32)
    augment = Augment(auto_augment="rand-m7-mstd0.5", erase=0.5)
    return training_images(split, data, augment, MEAN, STD, seed=3)


def pixels(images: Images, start: int = 0, workers: int = 0) -> Tensor:
    sampler = TrainSampler(len(images), 8, 3, 6, start)
    return torch.cat([b.images for b in train_batches(images, sampler, workers, pin=False)])


# ---------------------------------------------------------------- order and randomness


@pytest.mark.parametrize(("start", "workers"), [(0, 2), (2, 0), (4, 2)])
def test_pixels_depend_on_neither_workers_nor_start(images, start, workers):
    assert torch.equal(pixels(images, start, workers), pixels(images)[start * 8 :])


def test_pixels_depend_on_seed_epoch_and_index_alone(images, split):
    first = images[0, 5][0]
    torch.rand(3), np.random.rand(3)
    assert torch.equal(images[0, 5][0], first)
    assert not torch.equal(images[1, 5][0], first)
    other = Images(split.train, split.train_indices, images.transform, seed=4)
    assert not torch.equal(other[0, 5][0], first)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 6])
def test_sampler_from_the_middle_is_the_tail(start, accumulate):
    tail = keys(start_step=start, accumulate=accumulate)
    assert tail == keys(accumulate=accumulate)[start * accumulate :]
    assert len(tail) == len(TrainSampler(10, 4, 0, 6, start, accumulate))


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_global_batches_do_not_depend_on_processes_and_accumulation(world, accumulate):
    of_rank = [iter(keys(accumulate=accumulate, rank=r, world=world)) for r in range(world)]
    joined = [[key for _ in range(accumulate) for part in of_rank for key in next(part)] for _ in range(6)]
    assert joined == keys()


def test_repeated_augmentation():
    """Ten images, three times each: an epoch's 8 samples are of three images, each version augmented differently."""
    assert keys(repeats=3)[3:] == keys(repeats=3, start_step=3)
    assert keys(repeats=3, accumulate=2) == [part for batch in keys(repeats=3) for part in (batch[:2], batch[2:])]
    epochs = [[key for batch in keys(repeats=3)[i : i + 2] for key in batch] for i in (0, 2, 4)]
    for number, epoch in enumerate(epochs):
        assert len(set(epoch)) == len(epoch) == 8
        assert {e // 3 for e, _ in epoch} == {number}
        once = [i for batch in keys()[2 * number : 2 * number + 2] for _, i in batch]
        assert sorted(i for _, i in epoch) == sorted((once * 3)[j] for j in (0, 0, 0, 1, 1, 1, 2, 2))
    first = keys(repeats=3)[0]
    assert [i for _, i in first[:2]] == list(dict.fromkeys(i for _, i in first))  # versions apart


def test_every_image_once_per_epoch_less_the_rest():
    epochs = [[key for batch in keys()[i : i + 2] for key in batch] for i in (0, 2, 4)]  # 10 images: 2 batches of 4
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert len({i for _, i in epoch}) == 8
    assert len({tuple(i for _, i in epoch) for epoch in epochs}) == 3
    assert keys(seed=1) != keys()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_takes_each_image_once(split, world):
    images = Images(split.train, range(21), eval_transform(Data(train="", image_size=32), Augment()), None)
    found = Counter()
    for rank in range(world):
        for batch in eval_batches(images, 4, 0, False, rank, world):
            found.update(p.numpy().tobytes() for p in batch.images)
    assert found == Counter(images[0, i][0].numpy().tobytes() for i in range(21))


# ---------------------------------------------------------------- which images


@pytest.mark.parametrize(("limit", "per_class"), [(50, {5}), (47, {4, 5})])
def test_limit_is_balanced_and_seeded(limit, per_class):
    data = Data(train="fashion-mnist:train", val="fashion-mnist:test", limit=limit)
    chosen = open_split(data)
    counts = Counter(chosen.train.targets[i] for i in chosen.train_indices)
    assert (sum(counts.values()), len(counts), set(counts.values())) == (limit, 10, per_class)
    assert open_split(data).train_indices == chosen.train_indices
    assert open_split(data.model_copy(update={"seed": 1})).train_indices != chosen.train_indices


def test_held_out_images_are_disjoint_and_balanced(image_folder):
    split = open_split(Data(train=str(image_folder / "train"), val_fraction=0.25))
    assert sorted([*split.train_indices, *split.val_indices]) == list(range(24))
    assert Counter(split.val.targets[i] for i in split.val_indices) == {0: 2, 1: 2, 2: 2}
    limited = open_split(Data(train=str(image_folder / "train"), val_fraction=0.25, limit=6))
    assert limited.val_indices == split.val_indices
    assert set(limited.train_indices) < set(split.train_indices)


# ---------------------------------------------------------------- sources

random = np.random.default_rng(0)
PICTURES = random.integers(0, 256, (6, 5, 7), dtype=np.uint8)
LABELS = [2, 0, 1, 1, 0, 2]


def write_idx(folder: Path, name: str, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in (("images-idx3", PICTURES), ("labels-idx1", np.array(LABELS, np.uint8))):
        raw = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
        path = folder / f"{name}-{kind}-ubyte{'.gz' * zipped}"
        path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.mark.parametrize("form", ["{}", "folder:{}"])
def test_class_folder(image_folder, form):
    source = open_source(form.format(image_folder / "train"), "data.train")
    assert source.classes == ["ant", "bee", "cat"]
    assert source.targets == [0] * 8 + [1] * 8 + [2] * 8
    image, target = source[9]
    assert (target, source.where(9)) == (1, str(image_folder / "train" / "bee" / "1.png"))
    assert np.array_equal(np.array(image), np.array(Image.open(source.where(9))))


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path, zipped):
    write_idx(tmp_path, "train", zipped)
    source = open_source(f"idx:{tmp_path}/train", "data.train")
    assert (source.targets, source.classes) == (LABELS, ["0", "1", "2"])
    assert all(np.array_equal(np.array(source[i][0]), PICTURES[i]) for i in range(len(source)))


def test_embedded_fashion_mnist():
    train, test = (open_source(f"fashion-mnist:{split}", "data.train") for split in ("train", "test"))
    assert train.classes == test.classes == FASHION_CLASSES
    assert Counter(train.targets) == dict.fromkeys(range(10), 1000)
    assert len(test) == 10_000
    assert (train[0][0].mode, train[0][0].size) == ("L", (28, 28))


@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_mnist(tmp_path, split):
    """torchvision only checks that the files of MNIST exist, so small ones pass."""
    write_idx(tmp_path / "MNIST" / "raw", "train")
    write_idx(tmp_path / "MNIST" / "raw", "t10k")
    source = open_source(f"torchvision:MNIST:{split}:{tmp_path}", "data.train")
    assert source.targets == LABELS
    assert np.array_equal(np.array(source[3][0]), PICTURES[3])


def test_torchvision_cifar10(tmp_path, monkeypatch):
    """CIFAR-10's own format with 2 images per batch file; torchvision's MD5 check is disabled."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    names = ["airplane", "automobile", "bird"]
    data = random.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        batch = {"data": data[2 * i : 2 * i + 2].reshape(2, -1), "labels": [i % 3, 2]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    train, test = (open_source(f"torchvision:CIFAR10:{split}:{tmp_path}", "data.train") for split in ("train", "test"))
    assert (train.classes, train.targets, test.targets) == (names, [0, 2, 1, 2, 2, 2, 0, 2, 1, 2], [2, 2])
    assert np.array_equal(np.array(train[5][0]), data[5].transpose(1, 2, 0))


def test_torchvision_set_with_named_splits(tmp_path):
    (tmp_path / "food-101" / "meta").mkdir(parents=True)
    for split, numbers in (("train", [1, 2]), ("test", [3])):
        listed = {name: [f"{name}/{n}" for n in numbers] for name in ("pie", "soup")}
        (tmp_path / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for file in (f for files in listed.values() for f in files):
            path = tmp_path / "food-101" / "images" / f"{file}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (10 * numbers[0], 0, 0)).save(path)
    source = open_source(f"torchvision:Food101:train:{tmp_path}", "data.train")
    assert (source.classes, source.targets) == (["pie", "soup"], [0, 0, 1, 1])
    assert source[2][0].size == (8, 6)


# ---------------------------------------------------------------- transforms


def picture(width: int = 20, height: int = 16, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def transform(**augment: object):
    return train_transform(Data(train="", image_size=(16, 20)), Augment(**{"flip": 0.0} | augment), MEAN, STD)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["random_resized", "pad", "none"])
def test_transforms_give_uint8_of_the_asked_shape(crop, channels, mode):
    data = Data(train="", image_size=(24, 32), channels=channels)
    augment = Augment(crop=crop, auto_augment="rand-m7-mstd0.5", erase=1.0)
    for t in (train_transform(data, augment, MEAN[:channels], STD[:channels]), eval_transform(data, augment)):
        out = t(picture(mode=mode))
        assert (out.dtype, tuple(out.shape)) == (torch.uint8, (channels, 24, 32))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crop_none_keeps_the_pixels(flip):
    original = pil_to_tensor(picture())
    assert torch.equal(transform(crop="none", flip=flip)(picture()), original.flip(2) if flip else original)


def test_crop_pad_shifts_the_pixels():
    padded = torch.nn.functional.pad(pil_to_tensor(picture()), (2, 2, 2, 2))
    windows = [padded[:, y : y + 16, x : x + 20] for y in range(5) for x in range(5)]
    t = transform(crop="pad", pad=2)
    seen = set()
    for seed in range(30):
        seed_everything(seed)
        out = t(picture())
        seen |= {i for i, window in enumerate(windows) if torch.equal(out, window)}
    assert len(seen) > 10


def test_crop_random_resized_takes_the_asked_area():
    ramp = Image.fromarray(np.tile(np.linspace(0, 250, 100).astype(np.uint8), (100, 1)))
    t = transform(crop="random_resized", scale=(0.2, 0.2), interpolation="bilinear")
    for seed in range(10):
        seed_everything(seed)
        share = np.ptp(t(ramp).numpy()) / 250  # of the width; area 0.2 at aspect 3/4 to 4/3: 0.39 to 0.52
        assert 0.34 < share < 0.54


def test_erasing_keeps_the_other_pixels():
    original = pil_to_tensor(picture(64, 64))
    erase = train_transform(Data(train="", image_size=64), Augment(crop="none", flip=0, erase=1.0), MEAN, STD)
    for seed in range(5):
        seed_everything(seed)
        changed = (erase(picture(64, 64)) != original).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert 0 < box.numel() < 0.4 * changed.numel()
        assert box.float().mean() > 0.9


def test_erasing_is_timms_own_on_normalised_pixels():
    erase = train_transform(Data(train="", image_size=64), Augment(crop="none", flip=0, erase=0.7), MEAN, STD)
    theirs = RandomErasing(0.7, mode="pixel", device="cpu")
    mean, std = (255 * torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    original = pil_to_tensor(picture(64, 64))
    kept = 0
    for seed in range(20):
        seed_everything(seed)
        ours = erase(picture(64, 64))
        seed_everything(seed)
        torch.rand(1)  # the transform draws once for the flip
        wanted = (theirs((original - mean) / std) * std + mean).round().clamp(0, 255).to(torch.uint8)
        assert torch.equal(ours, wanted)
        kept += torch.equal(ours, original)
    assert 0 < kept < 20


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop_pct"), [(24, 0.875), (24, 1.0), ((16, 24), 0.9)])
def test_eval_transform_is_timms_own(size, crop_pct, interpolation):
    ours = eval_transform(Data(train="", image_size=size), Augment(crop_pct=crop_pct, interpolation=interpolation))
    shape = (3, size, size) if isinstance(size, int) else (3, *size)
    theirs = create_transform(shape, crop_pct=crop_pct, interpolation=interpolation, mean=MEAN, std=STD)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close((ours(picture(50, 40)) / 255 - mean) / std, theirs(picture(50, 40)))


def test_validation_images_have_no_randomness(split):
    images = validation_images(split, Data(train="", image_size=32), Augment())
    assert torch.equal(images[0, 3][0], images[1, 3][0])
    assert len(images) == 12


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixup_targets_sum_to_one(mixup, cutmix):
    seed_everything(0)
    mix = make_mixup(Augment(mixup=mixup, cutmix=cutmix), classes=5)
    images, targets = mix(torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0]))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert targets.shape == (6, 5)
    assert 0 <= images.min() <= images.max() <= 1
    assert 0 < targets.max(1).values.min() < 1


def test_no_mixup_unless_asked():
    assert make_mixup(Augment(), classes=5) is None
