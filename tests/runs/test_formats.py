"""`scalekd export --format`: files for other runtimes, compared with the student."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exported_students import exported
from small_images import write_images

import scalekd
from scalekd.common.errors import UserError
from scalekd.models import formats
from scalekd.models.formats import FORMATS, Source, converted, size_of
from scalekd.runs import students
from scalekd.runs.formats import add_results, export_formats, listed
from scalekd.runs.students import Exported

HERE = [name for name, made in FORMATS.items() if name != "fp16" and formats.is_installed(name)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ with a student of ant, bee and cat; val/ with 12 images."""
    root = tmp_path_factory.mktemp("formats")
    write_images(root / "val", per_class=4)
    (root / "run").mkdir()
    exported(root / "run", "test_resnet", (48, 48))
    return root


def test_half_precision(root, cli, monkeypatch):
    monkeypatch.setattr(
        students,
        "export_run",
        lambda folder, *_: Exported({"top1": 50.0}, "top1", {folder / "student.safetensors": 0.0}),
    )
    result = cli("export", root / "run", "--format", "fp16", "--data", root / "val")
    assert result.code == 0, result.err
    file = root / "run" / "student.fp16.onnx"
    line = next(line for line in result.out.splitlines() if line.startswith(str(file)))
    entry = json.loads((root / "run" / "formats.json").read_text())["formats"]["fp16"]
    assert entry["file"] == file.name and entry["bytes"] == file.stat().st_size and entry["ran"]
    assert 0 < entry["largest_difference"] < 0.01 and "on 12 validation images; top-1" in line
    assert entry["student_top1"] == pytest.approx(scalekd.evaluate(root / "run", data=root / "val", device="cpu").top1)
    assert entry["top1"] == pytest.approx(scalekd.evaluate(file, data=root / "val", device="cpu").top1)
    assert "onnxruntime" in entry["versions"]
    assert cli("predict", file, root / "val", "--device", "cpu").code == 0


@pytest.mark.skipif(not HERE, reason="no converter is installed")
@pytest.mark.parametrize("name", HERE)
def test_other_converters(root, name):
    made = export_formats(root / "run", [name], str(root / "val"))[name]
    assert made.bytes == size_of(made.file) > 1000
    assert made.ran == (FORMATS[name].open is not None) and (not made.ran or made.largest_difference < 1e-3)


def test_results_of_other_formats_stay(root):
    file = root / "run" / "formats.json"
    file.write_text('{"formats": {"litert": {"bytes": 1}}}')
    add_results(root / "run", {})
    assert json.loads(file.read_text())["formats"] == {"litert": {"bytes": 1}}
    file.write_text("[")
    add_results(root / "run", {})
    assert json.loads(file.read_text())["formats"] == {}


def test_tensorrt_calls_trtexec(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "trtexec"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor a in "$@"; do case $a in --saveEngine=*) echo "$@" > "${a#*=}";; esac; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    source = Source(torch.nn.Identity(), {"model": "m", "mean": [0.5] * 3, "image_size": [48, 32]}, tmp_path / "a.onnx")
    file = converted("tensorrt", source, tmp_path)
    assert f"--onnx={tmp_path / 'a.onnx'}" in file.read_text() and "--maxShapes=images:64x3x48x32" in file.read_text()
    program.write_text("#!/bin/sh\necho no GPU >&2\nexit 1\n")
    with pytest.raises(UserError, match="trtexec failed: no GPU"):
        converted("tensorrt", source, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "student.engine"]


def test_a_folder_replaces_a_folder(tmp_path, monkeypatch):
    def convert(source: Source, file: Path) -> None:
        file.mkdir()
        (file / f"{source.card['model']}.bin").write_bytes(bytes(10))

    monkeypatch.setitem(FORMATS, "coreml", FORMATS["coreml"]._replace(convert=convert, package="json"))
    for model in ("first", "second"):
        file = converted("coreml", SimpleNamespace(card={"model": model}), tmp_path)
    assert [p.name for p in file.iterdir()] == ["second.bin"] and size_of(file) == 10


def test_mistakes(root, cli, monkeypatch):
    def told(*arguments: object) -> str:
        before = sorted((root / "run").iterdir())
        result = cli("export", *arguments)
        assert result.code == 2 and before == sorted((root / "run").iterdir())
        assert len(result.err.strip().splitlines()) == 1
        return result.err

    assert "no format `openvin`. Did you mean `openvino`?" in told(root / "run", "--format", "openvin")
    monkeypatch.setitem(FORMATS, "openvino", FORMATS["openvino"]._replace(package="no_such_package"))
    assert "needs no_such_package: pip install openvino" in told(root / "run", "--format", "openvino")
    assert "export needs the folder of a run" in told()
    assert "`--data` goes with `--format`" in told(root / "run", "--data", root / "val")
    monkeypatch.setitem(FORMATS, "litert", FORMATS["litert"]._replace(package="json", convert=lambda *_: 1 / 0))
    monkeypatch.setattr(
        students,
        "export_run",
        lambda folder, *_: Exported({"top1": 50.0}, "top1", {folder / "student.safetensors": 0.0}),
    )
    assert "json cannot convert test_resnet: division by zero" in told(
        root / "run", "--format", "litert", "--data", root / "val"
    )
    result = cli("export", "--list")
    assert result.code == 0 and result.out.splitlines() == listed() and "pip install openvino" in result.out


@pytest.mark.parametrize("name, weights", [("s.xml", "s.bin"), ("s.onnx", "s.onnx.data"), ("s.onnx", None)])
def test_the_size_counts_weights_in_a_file_of_their_own(tmp_path, name, weights):
    (tmp_path / name).write_bytes(b"x" * 5)
    (tmp_path / "s.onnx.json").write_bytes(b"x" * 100)  # a neighbour that is no part of it
    if weights:
        (tmp_path / weights).write_bytes(b"x" * 70)
    assert size_of(tmp_path / name) == (75 if weights else 5)
