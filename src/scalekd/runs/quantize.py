"""`scalekd quantize`: int8 files of a run's student, by calibration and by training, with their accuracy and speed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from scalekd.common.errors import UserError
from scalekd.common.files import is_file, make_folder, replacing, write_text
from scalekd.common.provenance import command_line, machine, versions
from scalekd.common.results import Quantized
from scalekd.common.stop import StopRequest
from scalekd.common.text import in_shell, say
from scalekd.config.recipe import Config
from scalekd.data.batches import Images, bad_images, eval_batches
from scalekd.data.calibration import FEWEST_IMAGES, Calibration, calibration_split
from scalekd.data.split import Split, class_difference, open_split, same_classes
from scalekd.distill.quantised import normalised
from scalekd.distill.rebuild import read_recipe
from scalekd.models.inputs import card_statistics
from scalekd.models.int8.file import INT8, write_int8
from scalekd.models.int8.graph import Graph, graph_of
from scalekd.models.int8.onnx_quantiser import METHODS, quantised, ranges
from scalekd.models.int8.shares import left_in_float
from scalekd.models.open_student import OnnxStudent
from scalekd.models.student_file import onnx_runtime
from scalekd.models.weights.match import sha256_of
from scalekd.train.folder import open_folder
from scalekd.train.resume import recipe_difference

from .distillation import execute
from .int8 import Answers, compare_answers, threshold_of
from .int8_speed import costs
from .quantized_recipe import LABELS, PTQ, TEACHER, WAYS, quantized_recipe, run_to_quantise
from .students import check_kind, validation_transform

FILE = "quantize.json"
CPU = torch.device("cpu")


@dataclass
class Material:
    """A student, its graph, and the images to quantise it with."""

    run: Path
    config: Config
    student: nn.Module
    card: dict[str, Any]
    split: Split
    numbers: Calibration
    graph: Graph

    def images(self, source: Any, numbers: Sequence[int], part: str) -> Images:
        bad = bad_images(part, self.config.data, len(numbers))
        return Images(source, numbers, validation_transform(self.card), None, bad)


def quantize(
    run: Path,
    *,
    data_overrides: Sequence[str],
    ways: Sequence[str],
    epochs: int,
    calibration: str,
    images: int,
    overrides: Sequence[str],
    out: Path | None,
    device: torch.device,
    console: Console,
    stop: StopRequest,
) -> Quantized:
    """Quantises the student of a run by calibration and by the `ways` that train it, and measures all of them.

    Finished parts in `out` are not repeated. Raises `UserError`; raises `Stopped` as `execute`.
    """
    if images < FEWEST_IMAGES:
        raise UserError(f"`images` {images}: calibration needs {FEWEST_IMAGES} or more")
    onnx_runtime(exporting=True)  # an error without the extra, before anything is written
    config, student, card = run_to_quantise(run, data_overrides)
    folder = out or run / "quantize"
    for way in ways:  # before anything takes time or is written
        method = _held(folder / way) if calibration == "auto" else calibration
        recipe = quantized_recipe(config, run, way, method, images, epochs, overrides)
        if _differs(folder / way, recipe):
            open_folder(folder / way, recipe)  # which says how
    split = open_split(config.data, strict=False)
    check_kind(card, split.multi_label)
    if not same_classes(card["classes"], split.classes) or len(card["classes"]) != len(split.classes):
        raise UserError(
            f"{config.data.train} has other classes than the student: {class_difference(card['classes'], split.classes)}. "
            "Name images of the student's classes with `data`"
        )
    numbers = calibration_split(split, images, config.data.seed)
    graph = graph_of(student, card, config.student.cuts)
    material = Material(run, config, student, card, split, numbers, graph)
    make_folder(folder)
    tried, method = calibrated(material, calibration, folder / f"{PTQ}.onnx", console)
    for way in ways:
        recipe = quantized_recipe(config, run, way, method, images, epochs, overrides)
        _trained(recipe, folder / way, device, console, stop)
    files = _files(folder, material, ways, console)
    details = _measured(material, files, tried, method, console)
    best = next(way for way in (TEACHER, LABELS, PTQ) if way in files)
    with replacing(run / INT8) as file:
        file.write(files[best].read_bytes())
    details["file"] = {"name": INT8, "way": best}
    write_text(run / FILE, json.dumps(details, indent=1) + "\n")
    return Quantized(run / INT8, best, details["rows"], details)


def calibrated(
    material: Material, calibration: str, file: Path, console: Console
) -> tuple[dict[str, dict[str, Any]], str]:
    """Writes the int8 file by the best of the calibration methods, or by the given one. Returns all results and its name.

    The best has the highest accuracy, or mAP, on training images that were not calibrated with; equal ones differ in the
    squared difference of their logits from the student's.
    """
    mean, std = card_statistics(material.card, CPU)
    methods = list(METHODS) if calibration == "auto" else [calibration]
    models: dict[str, Any] = {}
    say(console, f"calibrating: {', '.join(methods)} ...")
    for method in methods:
        images = material.images(material.split.train, material.numbers.ranges, "train")
        models[method] = quantised(material.graph, ranges(material.graph, normalised(images, mean, std), method))
    with tempfile.TemporaryDirectory() as scratch:
        opened: dict[str, nn.Module] = {"float32": material.student.eval()}
        for method, model in models.items():
            path = Path(scratch) / f"{method}.onnx"
            path.write_bytes(model.SerializeToString())
            opened[method] = OnnxStudent(path, CPU)
        images = material.images(material.split.train, material.numbers.comparison, "train")
        seen = compare_answers(opened, eval_batches(images, 64, 0, False), mean, std, threshold_of(material.card))
    best = max(methods, key=lambda method: (seen[method].figure or 0, -seen[method].squares))
    written = {"way": PTQ, "of": sha256_of(material.run / "student.safetensors"), "calibration": best}
    write_int8(models[best], file, material.card | {"quantized": written})
    say(console, f"calibration on {len(material.numbers.ranges)} training images: {_told(seen, best)}")
    return {method: seen[method].row() for method in ("float32", *methods)}, best


def _told(seen: dict[str, Answers], best: str) -> str:
    values = {
        name: answers.figure if answers.figure is not None else answers.agreement for name, answers in seen.items()
    }
    listed = ", ".join(f"{name} {value:.2f} %" for name, value in values.items())
    return f"{best} (on {seen[best].images} others: {listed})"


def _trained(recipe: Config, folder: Path, device: torch.device, console: Console, stop: StopRequest) -> None:
    """Runs or resumes a quantised run, unless this same run is finished."""
    finished = all(is_file(folder / name) for name in ("summary.json", INT8, "recipe.yaml"))
    if finished and not _differs(folder, recipe):
        say(console, f"{folder} is finished already")
        return
    execute(recipe, folder, device, console, check=False, stop=stop, look=False)


def _held(folder: Path) -> str:
    """The calibration method of the quantised run in `folder`; any, if there is none."""
    known = read_recipe(folder).quantize if is_file(folder / "recipe.yaml") else None
    return known.calibration if known else "minmax"


def _differs(folder: Path, recipe: Config) -> bool:
    """Whether `folder` holds a run of another recipe."""
    known = folder / "recipe.yaml"
    return is_file(known) and bool(recipe_difference(known.read_text(), recipe))


def _files(folder: Path, material: Material, ways: Sequence[str], console: Console) -> dict[str, Path]:
    """The int8 files by way, also of ways that were finished earlier and started from the same student."""
    files = {PTQ: folder / f"{PTQ}.onnx"}
    ours = sha256_of(material.run / "student.safetensors")
    for way in (LABELS, TEACHER):
        file = folder / way / INT8
        if not is_file(file) or not is_file(folder / way / "summary.json"):
            continue
        card = json.loads(OnnxStudent(file, CPU).session.get_modelmeta().custom_metadata_map["scalekd"])
        if card.get("quantized", {}).get("of") == ours:
            files[way] = file
        else:
            say(console, f"{folder / way} is left out: it quantised another student; remove it and run this again")
    return files


def _measured(
    material: Material, files: dict[str, Path], tried: dict[str, Any], method: str, console: Console
) -> dict[str, Any]:
    """The content of quantize.json: accuracy on the validation images, size and latency of every file."""
    import onnx

    card = material.card
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "student.onnx"
        onnx.save(material.graph.onnx, str(plain))
        every = {"float32": plain} | files
        say(console, f"accuracy on {len(material.split.val_indices)} validation images ...")
        models: dict[str, nn.Module] = {name: OnnxStudent(file, CPU) for name, file in every.items()}
        images = material.images(material.split.val, material.split.val_indices, "val")
        batches = eval_batches(images, 64, 0, False)
        seen = compare_answers(models, batches, *card_statistics(card, CPU), threshold_of(card))
        say(console, "latency on this CPU ...")
        speed = costs(every, material.config, len(card["classes"]), Path(scratch))
    rows = {name: {"label": WAYS.get(name, name)} | seen[name].row() | speed["files"][name] for name in every}
    for key in ("agreement", "change", "change_interval", "largest_difference"):  # of float32 from itself
        rows["float32"].pop(key, None)
    for way in (LABELS, TEACHER):
        if way in files:
            summary = json.loads((files[way].parent / "summary.json").read_text())
            rows[way] |= {
                "epochs": summary["epochs"],
                "seconds": summary["seconds"],
                "trained": summary["int8_agreement"],
            }
    return {
        "rows": rows,
        "teachers": speed["teachers"],
        "calibration": {"method": method, "images": len(material.numbers.ranges), "tried": tried},
        "left_in_float": left_in_float(material.graph, (len(card["mean"]), *card["image_size"])),
        "latency_of": speed["how"],
        "validation": material.split.described.get("validation", {}),
        "command": command_line(),
        "machine": machine(CPU),
        "versions": versions() | {"onnxruntime": speed["onnxruntime"]},
        "run": in_shell(material.run),
    }
