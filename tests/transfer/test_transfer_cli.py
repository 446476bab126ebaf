"""The commands `scalekd detect` and `scalekd segment`."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from exported_models import DETECTOR, RETINANET, SEGMENTER, new_detector, new_segmenter
from PIL import Image

from scalekd.cli import transfer as transfer_cli
from scalekd.config.recipe_files import recipe_names
from scalekd.runs import transfer as transfer_runs
from scalekd.transfer import evaluate, exported_model
from scalekd.transfer.config import SHELVES
from scalekd.transfer.detection import onnx_file

WORDS = ("train", "evaluate", "predict", "recipes")
COMMANDS = [(task, word) for task in ("detect", "segment") for word in WORDS] + [("detect", "export")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders `detector/` and `segmenter/` of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    for model, name, card in (
        (new_detector().student, "detector", DETECTOR),
        (new_segmenter(), "segmenter", SEGMENTER),
    ):
        (folder / name).mkdir()
        exported_model.export(model, folder / name / f"{name}.safetensors", card)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (height, width) in enumerate([(64, 64), (50, 70), (80, 60)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(("task", "word"), COMMANDS)
def test_help(cli, task, word):
    result = cli(task, word, "--help")
    assert result.code == 0 and result.out.startswith(f"usage: scalekd {task} {word}")
    assert cli(task).code == 2


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_missing_extra_is_named_before_anything_else(cli, monkeypatch, tmp_path, task):
    extra = {"detect": "detection", "segment": "segmentation"}[task]
    for package in ("faster_coco_eval", "segmentation_models_pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    data = {"detect": ["--annotations", "no.json", "--images", "no"], "segment": ["--data", "no"]}[task]
    for words in (
        ["train", "no-such-recipe"],
        ["evaluate", tmp_path / "none", *data],
        ["predict", tmp_path / "none", "no", "--out", tmp_path / "out"],
    ):
        result = cli(task, *words)
        assert result.code == 2 and f"pip install 'scalekd[{extra}]'" in result.err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- train, recipes


def parsed(*words):
    from scalekd.cli.app import parse

    return parse([str(word) for word in words])


def test_what_flags_stand_for():
    args = parsed(
        "detect", "train", "r", "a=1", "--images", "in", "--val-annotations", "v.json", "b=2", "--backbone", "x"
    )
    assert args.overrides == ["a=1", "b=2"]
    assert transfer_cli.shortcuts(args) == [
        'data.images="in"', 'data.val_annotations="v.json"', 'backbone.model="x"', 'backbone.weights="pretrained"',
    ]  # fmt: skip
    args = parsed("segment", "train", "r", "--data", "a b", "--backbone", "x", "--weights", "random")
    assert transfer_cli.shortcuts(args) == ['data.root="a b"', 'backbone.model="x"', 'backbone.weights="random"']
    assert transfer_cli.shortcuts(parsed("segment", "train", "r")) == []
    args = parsed("segment", "train", "r", "--teacher", "vit_small_patch14_dinov2")
    assert transfer_cli.shortcuts(args) == ['teacher.model="vit_small_patch14_dinov2"', 'teacher.weights="pretrained"']


RECIPES = {
    "detect": {"data": {}, "train": {"epochs": 2, "batch_size": 2}, "backbone": {"model": "resnet18"}},
    "segment": {"data": {}, "train": {"iterations": 4, "batch_size": 2}, "backbone": {"model": "resnet18"}},
}


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_train_hands_over_what_was_typed(cli, monkeypatch, tmp_path, task):
    seen = {}

    def train(config, folder, device, console, *, stop, dry_run):
        seen.update(config=config, folder=folder, device=device, dry_run=dry_run)
        if not dry_run:
            folder.mkdir()
            (folder / "report.html").touch()
        figures = {"mask_ap": 12.345, "box_ap": 20, "miou": 33.333, "pixel_accuracy": 70}
        return None if dry_run else {"model": str(folder / "x.safetensors")} | figures

    monkeypatch.setattr(transfer_runs, "train", train)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"name": "mine"} | RECIPES[task]))
    data = ["--annotations", "t.json", "--images", "t", "--val-annotations", "v.json", "--val-images", "v"]
    words = data if task == "detect" else ["--data", "ade"]
    result = cli(task, "train", file, *words, "--backbone", "test_resnet", "--weights", "w.pt", "seed=5", "--dry-run")
    assert result.code == 0 and result.out == "" and seen["dry_run"] and str(seen["folder"]) == "runs/mine"
    config = seen["config"]
    assert (config.seed, config.backbone.model, config.backbone.weights) == (5, "test_resnet", "w.pt")
    assert (config.data.val_images == "v") if task == "detect" else (config.data.root == "ade")

    out = tmp_path / "run"
    result = cli(task, "train", file, *words, "backbone.weights=w.pt", "--out", out, "--device", "cpu")
    told = {"detect": "mask AP 12.35 %  box AP 20.00 %", "segment": "mIoU 33.33 %  pixel accuracy 70.00 %"}[task]
    assert result.out == f"{told}  model {out}/x.safetensors  report {out}/report.html\n"
    assert seen["device"] == torch.device("cpu")

    result = cli(task, "train", "no-such-recipe", *words)
    assert result.code == 2 and "no recipe `no-such-recipe`" in result.err
    result = cli(task, "train", file, *words, "backbone.wieghts=w.pt")
    assert result.code == 2 and "weights" in result.err


@pytest.mark.parametrize(("word", "task"), [("detect", "detection"), ("segment", "segmentation")])
def test_recipes_are_listed(cli, word, task):
    entries = json.loads(cli(word, "recipes", "--json").out)
    assert [entry["name"] for entry in entries] == recipe_names(SHELVES[task]) != []
    assert all(entry["summary"] for entry in entries)
    text = cli(word, "recipes").out
    assert all(f"{entry['name']} " in text and entry["summary"] in text for entry in entries)


# ---------------------------------------------------------------- evaluate, predict


def as_annotations(entries, photos, names=("bag", "tie")):
    """What was predicted, as the truth."""
    sizes = [Image.open(file).size for file in sorted(photos.iterdir())]
    return {
        "images": [
            {"id": i, "file_name": f"{i - 1}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes, 1)
        ],
        "categories": [{"id": id, "name": name} for id, name in zip((3, 7), names)],
        "annotations": [entry | {"id": i, "iscrowd": 0} for i, entry in enumerate(entries, 1)],
    }


def test_a_detector_agrees_with_its_own_predictions(cli, runs, photos, tmp_path):
    result = cli("detect", "predict", runs / "detector", photos, "--out", tmp_path / "out", "--threshold", 0)
    assert result.code == 0 and result.out.startswith("3 images: ")
    entries = json.loads((tmp_path / "out/predictions.json").read_text())
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(as_annotations(entries, photos)))
    words = ["detect", "evaluate", runs / "detector", "--annotations", truth, "--images", photos, "--workers", 0]
    result = cli(*words, "--json", "--out", tmp_path / "figures")
    found = json.loads(result.out)
    assert found == json.loads((tmp_path / "figures/evaluation.json").read_text())
    assert found["images"] == 3 and f"{len(entries)} objects" in result.err
    for kind in ("box", "mask"):
        assert found[kind]["ap"] == found[kind]["ap50"] == pytest.approx(100)
    assert [(row["class"], row["box_ap"]) for row in found["per_class"]] == [("bag", pytest.approx(100)), ("tie", 100)]
    assert sum(row["objects"] for row in found["per_class"]) == len(entries)
    assert found["seconds"].keys() == {"reading", "model", "encoding", "scores"}
    table = (tmp_path / "figures/evaluation.md").read_text()
    assert "| box | 100.00 | 100.00 | 100.00 |" in table and "| tie | 100.00 | 100.00 |" in table
    assert "3 images; seconds: reading " in table

    half = [entry for entry in entries if entry["image_id"] != 1]  # the first image's are errors now
    truth.write_text(json.dumps(as_annotations(half, photos)))
    table = cli(*words).out
    assert 0 < float(table.splitlines()[2].split("|")[2]) < 100


def test_a_detector_without_masks_agrees_with_its_own_boxes(cli, photos, tmp_path, monkeypatch):
    detector, run = new_detector(RETINANET), tmp_path / "run"
    run.mkdir()
    exported_model.export(detector.student, run / "detector.safetensors", RETINANET)
    result = cli("detect", "predict", run, photos, "--out", tmp_path / "out", "--threshold", 0.3)
    assert result.code == 0 and len(list((tmp_path / "out/pictures").iterdir())) == 3
    entries = json.loads((tmp_path / "out/predictions.json").read_text())
    assert entries and all("segmentation" not in entry and entry["score"] >= 0.3 for entry in entries)
    (tmp_path / "truth.json").write_text(json.dumps(as_annotations(entries, photos)))
    files = "--annotations", tmp_path / "truth.json", "--images", photos
    result = cli("detect", "evaluate", run, *files, "--workers", 0)
    assert result.code == 0, result.err
    table = result.out
    assert float(table.splitlines()[2].split("|")[2]) > 50 and "| class | box AP | objects |" in table
    assert "mask" not in table

    asked = []
    written = onnx_file.Written(200, 199, 12.3)
    monkeypatch.setattr(onnx_file, "write_onnx", lambda *args: asked.append(args[2:]) or written)
    result = cli("detect", "export", run)
    assert result.code == 0 and asked[-1] == ((64, 64), run / "detector.onnx")
    assert "uint8 images (1, 3, 64, 64); 199 of 200 objects in random images equal" in result.out
    assert "1 have rivals with equal scores; 12 ms per image" in result.out
    cli("detect", "export", run, "--image-size", 50, 70, "--out", tmp_path / "new/a.onnx")
    assert asked[-1] == ((50, 70), tmp_path / "new/a.onnx")
    result = cli("detect", "export", run, "--image-size", 0, 70)
    assert result.code == 2 and "--image-size must be two numbers of pixels from 1 to 65535, not 0 70" in result.err
    result = cli("detect", "export", run, "--out", tmp_path / "a.bin")
    assert result.code == 2 and "ends in .onnx" in result.err


def test_a_detector_of_other_classes(cli, runs, photos, tmp_path):
    box = {"image_id": 1, "category_id": 3, "bbox": [1, 1, 9, 9], "segmentation": [[1, 1, 9, 1, 9, 9]]}
    words = ["detect", "evaluate", runs / "detector", "--images", photos, "--workers", 0, "--annotations"]
    for names, reason in (
        (("bag", "shoe"), "missing: tie; unknown to the model: shoe"),
        (("tie", "bag"), "the same names in another order"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(as_annotations([box], photos, names)))
        result = cli(*words, tmp_path / "other.json")
        assert result.code == 2 and reason in result.err
    assert "no file" in cli(*words, tmp_path / "none.json").err
    result = cli(*words, tmp_path / "other.json", "--workers", -1)
    assert result.code == 2 and "--workers must be 0 or more, not -1" in result.err


def test_a_segmenter_agrees_with_its_own_masks(cli, runs, photos, tmp_path):
    data = tmp_path / "data"
    result = cli("segment", "predict", runs / "segmenter", photos, "--out", data)
    assert result.code == 0 and result.out.startswith("3 images; share of pixels: ")
    photos.rename(data / "images")
    result = cli("segment", "evaluate", runs / "segmenter", "--data", data, "--workers", 0, "--json")
    found = json.loads(result.out)
    assert (found["miou"], found["pixel_accuracy"], found["images"], found["inference"]) == (100, 100, 3, "whole")
    assert found["pixels"] == 64 * 64 + 50 * 70 + 80 * 60

    # one wrong image: as many pixels of it count as there are
    file = data / "masks/0.png"
    mask = np.asarray(Image.open(file))
    Image.fromarray(np.where(mask == 1, 2, 1).astype(np.uint8)).save(file)
    words = ["segment", "evaluate", runs / "segmenter", "--data", data, "--workers", 0]
    result = cli(*words, "--out", tmp_path / "figures")
    wrong = 100 * (1 - 64 * 64 / found["pixels"])
    assert f"pixel accuracy {wrong:.2f} %" in result.out and "| sand |" in result.out
    assert (tmp_path / "figures/evaluation.md").read_text() == result.out
    assert "inference sliding" in cli(*words, "--inference", "sliding").out

    (data / "classes.txt").write_text("sky\nsea\n")
    assert "classes.txt has 2 classes, the model 3 others; missing: sand" in cli(*words).err
    (tmp_path / "names.txt").write_text("sky\nsea\nsand\n")
    assert cli(*words, "--classes", tmp_path / "names.txt").code == 0


def test_what_a_segmenter_is_evaluated_on(cli, runs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluate, "open_pairs", lambda images, masks, *_: seen.append((images.name, masks.name)) or 1 / 0
    )
    data = tmp_path / "data"
    data.mkdir()
    words = ["segment", "evaluate", runs / "segmenter", "--data"]
    assert f"`--data`: {tmp_path / 'none'} is not a folder" in cli(*words, tmp_path / "none").err
    assert "has no classes.txt" in cli(*words, data).err
    (data / "classes.txt").write_text("sky\nsea\nsand\n")
    for place in ("images/training", "annotations/training"):
        (data / place).mkdir(parents=True)
    assert "has no validation images" in cli(*words, data).err  # training images alone
    for place in ("images/validation", "annotations/validation"):
        (data / place).mkdir()
    with pytest.raises(ZeroDivisionError):
        cli(*words, data)
    assert seen == [("validation", "validation")]


def test_a_segmenter_is_not_evaluated_on_what_it_was_trained_on(cli, runs, tmp_path):
    data = tmp_path / "data"
    for place in ("images", "masks"):
        (data / place).mkdir(parents=True)
    (data / "classes.txt").write_text("sky\nsea\nsand\n")
    recipe = runs / "segmenter/recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"root": str(data)}}))
    try:
        result = cli("segment", "evaluate", runs / "segmenter", "--data", data)
    finally:
        recipe.unlink()
    assert result.code == 2 and "was trained on most of" in result.err and "`--data`" in result.err
    assert "contains no images" in cli("segment", "evaluate", runs / "segmenter", "--data", data).err
