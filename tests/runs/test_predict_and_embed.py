"""`scalekd predict` and `embed`: the same numbers as `evaluate`, from every kind of input, with bad images skipped."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_students import exported
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from small_images import write_images

import scalekd
from scalekd.cli.deploy import WIDTH, table
from scalekd.common.results import Prediction
from scalekd.models import open_student as opening
from scalekd.models import student_file
from scalekd.models.features import pooled
from scalekd.models.student_file import export_onnx, load_student
from scalekd.report.contact_sheet import MOST, chosen
from scalekd.runs import students
from scalekd.runs.students import evaluate_student

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ with a student of ant, bee and cat; bare/ with one without a classifier; val/ with 12 images."""
    root = tmp_path_factory.mktemp("predict")
    write_images(root / "val", per_class=4)
    for name, classes in (("run", 3), ("bare", 0)):
        (root / name).mkdir()
        student, card = exported(root / name, "test_resnet", (48, 48), classes=classes)
        if classes:  # so that some predictions are right and some are wrong
            with torch.no_grad():
                student.fc.weight.neg_()
                student.fc.bias -= student(pixels_of(root / "val", card)).mean(0)
            student_file.export_student(student, root / name / "student.safetensors", card)
    return root


def pixels_of(folder: Path, card: dict[str, Any]) -> torch.Tensor:
    """The normalised images of a folder in the order of their names, by timm's own transform."""
    from timm.data import create_transform

    transform = create_transform(
        (3, *card["image_size"]),
        interpolation=card["interpolation"],
        crop_pct=card["crop_pct"],
        mean=card["mean"],
        std=card["std"],
    )
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in sorted(folder.rglob("*.png"))])


def test_probabilities_are_those_of_timm(root):
    student, card = load_student(root / "run")
    with torch.no_grad():
        expected = student(pixels_of(root / "val", card)).softmax(1)
    found = scalekd.predict(root / "run", root / "val", device="cpu")
    assert [row.image for row in found.images] == [str(f) for f in sorted((root / "val").rglob("*.png"))]
    assert not found.skipped and not found.notes
    for row, shares in zip(found.images, expected):
        order = shares.argsort(descending=True)
        assert row.classes == tuple(card["classes"][i] for i in order) and len(row.classes) == 3
        assert row.probabilities == pytest.approx(shares[order].tolist(), abs=1e-6)
    assert len({row.classes[0] for row in found.images}) > 1


def agree(student: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` and `predict` give the same logits for the same batch, so the same class for every image."""
    seen: list[torch.Tensor] = []

    def watched(path: Path, device: torch.device) -> Any:
        model, card = opening.open_student(path, device)
        model.register_forward_hook(lambda module, images, logits: seen.append(logits))
        return model, card

    monkeypatch.setattr(students, "open_student", watched)
    evaluated, _ = evaluate_student(student, str(root / "val"), "cpu", Console(quiet=True))
    predicted = scalekd.predict(student, root / "val", batch=12, device="cpu")
    assert torch.equal(*seen) and len(seen[0]) == 12
    assert [row.classes[0] for row in predicted.images] == [CLASSES[i] for i in seen[0].argmax(1)]
    right = sum(row.classes[0] == Path(row.image).parent.name for row in predicted.images)
    assert evaluated["top1"] == pytest.approx(100 * right / 12) and 0 < right < 12


def test_predict_and_evaluate_agree_image_by_image(root, monkeypatch):
    agree(root / "run", root, monkeypatch)


@pytest.mark.slow
def test_onnx_is_used_by_the_same_commands(root, tmp_path, monkeypatch, cli):
    pytest.importorskip("onnxruntime", reason=student_file.ONNX_MISSING)
    pytest.importorskip("onnxscript", reason=student_file.ONNX_MISSING)
    student, card = load_student(root / "run")
    file = tmp_path / "mine.onnx"  # without a card next to it: it is in the file
    export_onnx(student, file, card)
    agree(file, root, monkeypatch)
    one, other = (scalekd.predict(path, root / "val", device="cpu").images for path in (root / "run", file))
    assert [row.classes for row in one] == [row.classes for row in other]
    shares = [np.array([row.probabilities for row in rows]) for rows in (one, other)]
    assert np.allclose(*shares, atol=1e-5)
    features = [scalekd.embed(path, root / "val", device="cpu").features for path in (root / "run", file)]
    assert features[0].shape == (12, 96) and np.allclose(*features, atol=1e-5)

    without = onnx_file(tmp_path / "old.onnx", file, outputs=["logits"], card=False)
    assert "has no card" in cli("predict", without, root / "val").err
    (tmp_path / "student.json").write_text((root / "run" / "student.json").read_text())
    assert cli("predict", without, root / "val", "--device", "cpu").code == 0
    assert "gives logits only; use student.safetensors" in cli("embed", without, root / "val", "--out", "x.npy").err
    small = json.loads((tmp_path / "student.json").read_text()) | {"image_size": [32, 32]}
    (tmp_path / "student.json").write_text(json.dumps(small))
    assert "takes images of" in cli("predict", without, root / "val").err
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    assert "cannot be opened by onnxruntime" in cli("predict", tmp_path / "bad.onnx", root / "val").err
    assert "no file" in cli("predict", tmp_path / "none.onnx", root / "val").err


def onnx_file(file: Path, source: Path, outputs: list[str], card: bool) -> Path:
    """A copy of a graph with some of its outputs, and without its card, as files of other programs are."""
    import onnx

    model = onnx.load(source)
    kept = [output for output in model.graph.output if output.name in outputs]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    if not card:
        del model.metadata_props[:]
    onnx.save(model, file)
    return file


def test_onnx_without_onnxruntime(root, tmp_path, cli, monkeypatch):
    import sys

    (tmp_path / "student.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = cli("predict", tmp_path / "student.onnx", root / "val")
    assert result.code == 2 and "pip install 'scalekd[onnx]'" in result.err


# ------------------------------------------------ inputs


def test_every_kind_of_input(root, tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(root / "val", "val")
    one = root / "val" / "ant" / "0.png"
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "x.PNG").write_bytes(one.read_bytes())
    (deep / "notes.txt").write_text("no image")
    inputs = [one, tmp_path / "a", f"tar:{tmp_path / 'val.tar'}", one, root / "val" / "bee"]
    found = scalekd.predict(root / "run", inputs, top=1, batch=5, device="cpu")
    assert len(found.images) == 1 + 1 + 12 + 1 + 4
    assert found.images[0] == found.images[14] and found.images[0].probabilities == pytest.approx(
        found.images[1].probabilities
    )
    assert found.images[2].image == f"val/ant/0.png in {tmp_path / 'val.tar'}"
    assert found.notes == ["left out: 1 files without an image extension, such as b/notes.txt"]


def test_a_source_with_other_labels_is_told(root, tmp_path, cli):
    write_images(tmp_path / "more", per_class=1)
    (tmp_path / "more" / "ant").rename(tmp_path / "more" / "dog")
    result = cli("predict", root / "run", tmp_path / "more", "--device", "cpu")
    assert result.code == 0 and "folders of the images that are no classes of the student: dog (1 of 3)" in result.err
    result = cli("predict", root / "run", "fashion-mnist:nothing")
    assert result.code == 2
    assert "has several splits" in cli("predict", root / "run", "fashion-mnist").err


def test_bad_images_are_skipped(root, tmp_path, cli):
    folder = tmp_path / "mixed"
    write_images(folder, per_class=2)
    (folder / "bee" / "0.png").write_bytes(b"damaged")
    (folder / "empty.jpg").touch()
    result = cli("predict", root / "run", folder, "--batch", "2", "--jsonl", "-", "--device", "cpu")
    assert result.code == 0 and len(result.out.splitlines()) == 5
    assert f"skipped: {folder / 'bee' / '0.png'}: Pillow does not recognise it" in result.err
    assert "5 images" in result.err and "2 images skipped" in result.err
    names = [json.loads(line)["image"] for line in result.out.splitlines()]
    assert names == [str(folder / n) for n in ("ant/0.png", "ant/1.png", "bee/1.png", "cat/0.png", "cat/1.png")]
    clean = {
        row.image: row.probabilities for row in scalekd.predict(root / "run", folder, batch=2, device="cpu").images
    }
    alone = scalekd.predict(root / "run", folder / "bee" / "1.png", device="cpu").images[0]
    assert clean[alone.image] == pytest.approx(alone.probabilities, abs=1e-6)

    result = cli("predict", root / "run", folder / "empty.jpg", folder / "bee" / "0.png")
    assert result.code == 2 and "no image can be read, of 2; the first:" in result.err


# ------------------------------------------------ outputs


def test_files(root, tmp_path, cli):
    sheet, table_file, lines = tmp_path / "sheet.png", tmp_path / "p.csv", tmp_path / "p.jsonl"
    options = ["--csv", table_file, "--jsonl", lines, "--sheet", sheet, "--top", 2, "--device", "cpu"]
    result = cli("predict", root / "run", root / "val", *options)
    assert result.code == 0 and result.out == ""
    with table_file.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "class", "probability", "class_2", "probability_2"] and len(rows) == 13
    objects = [json.loads(line) for line in lines.read_text().splitlines()]
    found = scalekd.predict(root / "run", root / "val", top=2, device="cpu").images
    for row, entry, one in zip(rows[1:], objects, found):
        assert row[0] == entry["image"] == one.image and row[1::2] == list(one.classes)
        assert [p["probability"] for p in entry["predictions"]] == list(one.probabilities)
        assert [float(v) for v in row[2::2]] == pytest.approx(one.probabilities, abs=1e-6)
    with Image.open(sheet) as picture:
        assert picture.size[0] > 600 and len(picture.convert("RGB").getcolors(10**6)) > 1000
    assert cli("predict", root / "run", root / "val", "--csv", "-", "--top", 2, "--device", "cpu").out == (
        table_file.read_text()
    )


def test_the_table_has_eighty_columns():
    long = "a/" * 40 + "picture.jpg"
    rows = [
        Prediction(long, tuple(f"a rather long name of class {i}" for i in range(5)), (0.9, 0.05, 0.03, 0.01, 0.01)),
        Prediction("b.jpg", ("x\n[red]",), (1.0,)),
    ]
    lines = table(rows)
    assert len(lines) == 3 and all(len(line) <= WIDTH for line in lines)
    assert lines[1].startswith("...") and "picture.jpg" in lines[1] and "90.0" in lines[1]
    assert lines[2].split() == ["b.jpg", "x\\n[red]", "100.0"]


def test_a_sheet_shows_a_part_of_many_images():
    assert chosen(3) == [0, 1, 2] and len(chosen(10_000)) == MOST == len(set(chosen(MOST + 1)))
    assert chosen(10_000)[0] == 0 and chosen(10_000)[-1] > 9_900


# ------------------------------------------------ features


@pytest.mark.parametrize("name", ["run", "bare"])
def test_features(root, tmp_path, cli, name):
    student, card = load_student(root / name)
    with torch.no_grad():
        expected = pooled(student, pixels_of(root / "val", card))
        if name == "bare":
            assert torch.equal(expected, student(pixels_of(root / "val", card)))
    names = [str(f) for f in sorted((root / "val").rglob("*.png"))]
    for out in (tmp_path / "f.npy", tmp_path / "f.safetensors"):
        result = cli("embed", root / name, root / "val", "--out", out, "--device", "cpu")
        assert result.code == 0 and f"{out}  12 x 96, float32" in result.out
    array = np.load(tmp_path / "f.npy", allow_pickle=False)
    assert array.dtype == np.float32 and np.allclose(array, expected, atol=1e-6)
    assert (tmp_path / "f.names.txt").read_text().splitlines() == names
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("features"), array) and json.loads(file.metadata()["images"]) == names


# ------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["predict", "bare", "val"], "has no classifier.*`scalekd embed` gives its features"),
        (["predict", "run", "nothing"], "inputs: there is no image or folder nothing"),
        (["predict", "nowhere", "val"], "nowhere does not exist; name a run's folder"),
        (["predict", "run/student.json", "val"], "run/student.json is no exported student"),
        (["predict", "run", "val", "--top", "0"], "`--top` 0: must be 1 or more"),
        (["predict", "run", "val", "--batch", "0"], "`--batch` 0: must be 1 or more"),
        (["predict", "run", "val", "--workers", "-1"], "`--workers` -1"),
        (["predict", "run", "val", "--sheet", "x.gif"], r"`--sheet`: .*x.gif must end in \.png or \.jpg"),
        (["predict", "run", "val", "--csv", "no/x.csv"], "`--csv`: there is no folder .*no"),
        (["predict", "run", "val", "--jsonl", "/dev/null"], "`--jsonl`: /dev/null is a device"),
        (["predict", "run", "val", "--csv", "-", "--jsonl", "-"], "only one of them"),
        (["embed", "run", "val", "--out", "x.txt"], r"`--out`: .*x.txt must end in \.npy or \.safetensors"),
        (["predict", "val", "val"], "has no student.safetensors"),
    ],
)
def test_a_mistake_is_told_in_a_line(root, monkeypatch, cli, arguments, told):
    import re

    monkeypatch.chdir(root)
    result = cli(*arguments)
    assert result.code == 2 and re.search(told, result.err) and len(result.err.splitlines()) <= 2, result.err


def test_a_detector_is_not_a_student(tmp_path, cli, root):
    (tmp_path / "detector.safetensors").touch()
    result = cli("predict", tmp_path, root / "val")
    assert result.code == 2 and "holds a detector; use `scalekd detect predict`" in result.err


def test_a_student_that_diverged_is_not_used(root, tmp_path, cli):
    student, card = load_student(root / "run")
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    student_file.export_student(student, tmp_path / "student.safetensors", card)
    assert "the student's outputs are not finite" in cli("predict", tmp_path, root / "val").err
    assert "some features are not finite" in cli("embed", tmp_path, root / "val", "--out", tmp_path / "x.npy").err
    assert not (tmp_path / "x.npy").exists()
