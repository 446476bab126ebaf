"""Predictions on a folder of images: where they go, what is in them, and how bad images are handled."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from exported_models import DETECTOR, SEGMENTER, new_detector, new_segmenter
from faster_coco_eval.core import mask as rle
from PIL import Image
from rich.console import Console
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from scalekd.common.errors import UserError
from scalekd.models import mixer  # noqa: F401 - adds a name to timm's
from scalekd.transfer import predict
from scalekd.transfer.predict import objects_in, predict_classes, predict_objects
from scalekd.transfer.predict_files import output_names
from scalekd.transfer.segmentation.pairs import open_pairs, read_classes
from scalekd.transfer.segmentation.scores import classes_of

CPU = torch.device("cpu")
WITH_HEADER = {"sha256": "0" * 64}


@pytest.fixture(scope="module")
def detector():
    return new_detector().eval()


@pytest.fixture
def models(monkeypatch, detector):
    """What a run's folder would hold; test_exported_model.py reads real ones."""
    loaded = {
        "detection": (detector, DETECTOR | WITH_HEADER),
        "segmentation": (new_segmenter(), SEGMENTER | WITH_HEADER),
    }
    monkeypatch.setattr(detector.student.roi_heads, "score_thresh", 0.05)
    monkeypatch.setattr(predict, "load", lambda run, task: loaded[task])
    return loaded


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(folder, name, image, **options):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)


@pytest.fixture
def photos(tmp_path):
    """Six images in three folders, of all kinds; one is bad."""
    folder = tmp_path / "photos"
    write(folder, "a.png", Image.fromarray(pixels(64, 64)))
    write(folder, "b/a.png", Image.fromarray(pixels(50, 70, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    write(folder, "b/turned.png", Image.fromarray(pixels(40, 60, 2)), exif=exif)
    write(folder, "c d/deep.tif", Image.fromarray(np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)))
    write(folder, "c d/grey.bmp", Image.fromarray(pixels(40, 40, 3)).convert("L"))
    (folder / "c d/half.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (folder / "notes.txt").write_text("not an image")
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def files_of(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


NAMES = ["a", "b/a", "b/turned", "c d/deep", "c d/grey"]


def test_objects_of_a_folder(models, photos, tmp_path):
    out, console = tmp_path / "out", quiet()
    predict_objects(tmp_path / "run", photos, out, CPU, console, threshold=0)
    pictures = [f"pictures/{name}.png" for name in NAMES]
    assert files_of(out) == sorted(["bad-images.txt", "index.html", "predictions.json", *pictures])
    assert (out / "bad-images.txt").read_text().startswith("c d/half.jpg\t")
    assert "skipped: c d/half.jpg: " in console.file.getvalue()
    entries = json.loads((out / "predictions.json").read_text())
    detector = models["detection"][0]
    for name, number in (("a.png", 1), ("b/a.png", 2)):
        image = Image.open(photos / name)
        with torch.inference_mode():
            truth = detector([torch.from_numpy(np.array(image)).permute(2, 0, 1)])[0]
        ours = [entry for entry in entries if entry["file_name"] == name]
        assert len(ours) == len(truth["scores"]) > 0 and {entry["image_id"] for entry in ours} == {number}
        assert [entry["score"] for entry in ours] == pytest.approx(truth["scores"].tolist(), abs=1e-5)
        for entry, box, label, mask in zip(ours, truth["boxes"].tolist(), truth["labels"].tolist(), truth["masks"]):
            assert (entry["category_id"], entry["category"]) == [(3, "bag"), (7, "tie")][label - 1]
            x, y, width, height = entry["bbox"]
            assert [x, y, x + width, y + height] == pytest.approx(box, abs=0.011)
            decoded = rle.decode(entry["segmentation"])
            assert np.array_equal(decoded, (mask[0] >= 0.5).numpy()) and decoded.shape == image.size[::-1]
    turned = next(entry for entry in entries if entry["file_name"] == "b/turned.png")
    assert turned["segmentation"]["size"] == [60, 40]  # upright
    page = (out / "index.html").read_text()
    assert page.count("<figure>") == 5 and "src='pictures/c%20d/grey.png'" in page and "c d/half.jpg" in page


def test_objects_below_the_threshold_are_omitted(models, photos, tmp_path):
    def predicted(out, threshold):
        predict_objects(tmp_path / "run", photos / "b/a.png", out, CPU, quiet(), threshold)
        return json.loads((out / "predictions.json").read_text())

    every = predicted(tmp_path / "all", 0)
    middle = sum(entry["score"] for entry in every[len(every) // 2 - 1 :][:2]) / 2
    sure = predicted(tmp_path / "sure", middle)
    assert sure == [entry for entry in every if entry["score"] >= middle] and 0 < len(sure) < len(every)
    assert files_of(tmp_path / "sure") == ["index.html", "pictures/a.png", "predictions.json"]
    drawn = [np.asarray(Image.open(tmp_path / name / "pictures/a.png")) for name in ("all", "sure")]
    assert not np.array_equal(*drawn)


def test_an_image_that_is_too_narrow(models, detector, tmp_path):
    assert objects_in(detector, Image.new("RGB", (2, 191)), 3) is not None  # 1.005 pixels wide at the detector's size
    assert objects_in(detector, Image.new("RGB", (2, 193)), 3) is None
    photos = tmp_path / "photos"
    write(photos, "line.png", Image.new("RGB", (1, 500)))
    with pytest.raises(UserError, match=r"no usable image among 1 image; the first: line.png: too"):
        predict_objects(tmp_path / "run", photos, tmp_path / "out", CPU, quiet())
    assert (tmp_path / "out/bad-images.txt").read_text() == "line.png\ttoo narrow, 1x500 pixels\n"


@pytest.mark.parametrize("zero", [True, False])
def test_masks_of_a_folder(models, photos, tmp_path, zero):
    model, card = models["segmentation"]
    card["reduce_zero_label"] = zero
    out, console = tmp_path / "out", quiet()
    predict_classes(tmp_path / "run", photos, out, CPU, console)
    both = [f"{folder}/{name}.png" for folder in ("masks", "pictures") for name in NAMES]
    assert files_of(out) == sorted(["bad-images.txt", "classes.txt", "index.html", *both])
    assert read_classes(out / "classes.txt") == SEGMENTER["classes"]
    mask = Image.open(out / "masks/b/a.png")
    assert mask.mode == "L" and mask.size == (70, 50)
    x = torch.from_numpy(pixels(50, 70, 1)).permute(2, 0, 1)[None]
    x = resize(
        x, [64, 90], InterpolationMode.BILINEAR, antialias=True
    )  # bytes, which releases of PyTorch round otherwise
    mean, std = (torch.tensor(SEGMENTER[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        truth = classes_of(model((x.float() / 255 - mean) / std), (50, 70))[0] + zero
    assert np.array_equal(np.asarray(mask), truth.numpy())
    assert len(np.unique(mask)) > 1 and np.asarray(mask).min() >= zero
    (photos / "c d/half.jpg").unlink()
    pairs = open_pairs(photos, out / "masks", SEGMENTER["classes"], zero)  # as masks to train on
    assert len(pairs) == 5 and pairs[2][1].shape == (60, 40)
    page = (out / "index.html").read_text()
    assert f"{zero + 2:d} sand" in page and "rgb(230, 159, 0)" in page
    assert "5 images; share of pixels: " in console.file.getvalue()


def test_a_backbone_of_one_size_needs_windows(monkeypatch, tmp_path):
    card = SEGMENTER | {"backbone": "mlp_mixer", "kwargs": {"embed_dim": 32, "num_blocks": 1, "img_size": 64}}
    monkeypatch.setattr(predict, "load", lambda run, task: (new_segmenter(card), card))
    write(tmp_path, "wide.png", Image.fromarray(pixels(64, 100)))
    write(tmp_path, "square.png", Image.fromarray(pixels(30, 30)))
    predict_classes(tmp_path, tmp_path / "square.png", tmp_path / "whole", CPU, quiet())
    with pytest.raises(UserError, match=r"only accepts 64x64 pixels, .* 64x100 after resizing; set `inference` to sli"):
        predict_classes(tmp_path, tmp_path / "wide.png", tmp_path / "too wide", CPU, quiet())
    predict_classes(tmp_path, tmp_path / "wide.png", tmp_path / "windows", CPU, quiet(), "sliding")
    assert Image.open(tmp_path / "windows/masks/wide.png").size == (100, 64)


def test_no_output_takes_the_place_of_another():
    assert output_names(["a.jpg", "b/a.png", "a.b.jpg"]) == ["a.png", "b/a.png", "a.b.png"]
    assert output_names(["a.jpg", "a.png", "b.jpg"]) == ["a.jpg.png", "a.png.png", "b.jpg.png"]
    tricky = ["a.jpg", "a.jpg.png", "a.png"]
    assert len(set(output_names(tricky))) == 3


def test_where_nothing_may_be_read_or_written(models, photos, tmp_path):
    def error_of(source, out, **options):
        with pytest.raises(UserError) as error:
            predict_objects(tmp_path / "run", source, out, CPU, quiet(), **options)
        return str(error.value)

    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    (tmp_path / "empty").mkdir()
    assert "full is not empty; choose a new folder with `out`" in error_of(photos, tmp_path / "full")
    assert "is a file; choose a folder with `out`" in error_of(photos, tmp_path / "full/mine.txt")
    assert "the next prediction would read its pictures" in error_of(photos, photos / "out")
    assert "Did you mean `photos`?" in error_of(tmp_path / "photo", tmp_path / "out")
    assert f"no images in {tmp_path / 'empty'} or" in error_of(tmp_path / "empty", tmp_path / "out")
    assert "`threshold` must be from 0 to 1, not 50" in error_of(photos, tmp_path / "out", threshold=50)
    assert not (tmp_path / "out").exists() and not (photos / "out").exists()
