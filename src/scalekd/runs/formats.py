"""`scalekd export --format`: a run's student for other runtimes, compared with the student on validation images."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.files import is_file, write_text
from scalekd.common.provenance import machine, versions
from scalekd.common.results import FormatFile
from scalekd.data.batches import Images, eval_batches
from scalekd.data.sources.open import evaluated_part, open_source
from scalekd.data.sources.unlabelled import WithoutLabels
from scalekd.data.split import class_difference, open_split, same_classes
from scalekd.data.targets import are_sets
from scalekd.distill.rebuild import read_recipe
from scalekd.models.features import embedded
from scalekd.models.formats import FORMATS, Format, Source, check_installed, converted, is_installed, size_of
from scalekd.models.inputs import card_statistics
from scalekd.models.student_file import example_images, export_onnx, load_student

from .int8 import compare_answers, threshold_of
from .students import validation_transform

FILE = "formats.json"
MOST_IMAGES = 1000
FROM_ONNX = ("fp16", "openvino", "tensorrt")  # formats that are made from the ONNX file


class Opened(nn.Module):
    """A converted student, used like a timm model."""

    def __init__(self, made: Format, file: Path):
        super().__init__()
        assert made.open is not None
        self.run = made.open(file)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


def export_formats(folder: Path, names: Sequence[str], data: str | None) -> dict[str, FormatFile]:
    """Converts the exported student of a run's folder and compares every file that can be run here with it.

    data: images with labels, in place of the run's validation images; at most 1,000 are used. Adds the results to
    formats.json. Raises `UserError`.
    """
    check_formats(names)
    student, card = load_student(folder)
    if card.get("embedding") and not card["classes"]:
        student.forward = partial(embedded, student)  # otherwise a converter would see the pooled features
    elif card.get("embedding") and (others := [name for name in names if name not in FROM_ONNX]):
        raise UserError(
            f"`formats`: {others[0]} has one output, and this student has logits and an embedding; choose from "
            f"{', '.join(FROM_ONNX)}, which have both"
        )
    images, about = _images(folder, card, data)
    made: dict[str, FormatFile] = {}
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "student.onnx"
        if any(name in FROM_ONNX for name in names):
            export_onnx(student, plain, card)
        for name in names:
            file = converted(name, Source(student, card, plain), folder)
            made[name] = _compared(name, file, student, card, images, about)
    add_results(folder, made)
    return made


def check_formats(names: Sequence[str]) -> None:
    """Raises `UserError` for a format that does not exist or whose converter is missing."""
    for name in names:
        if name not in FORMATS:
            raise UserError(f"no format `{name}`.{nearest(name, FORMATS)} `scalekd export --list` shows them")
        check_installed(name)


def _images(folder: Path, card: dict[str, Any], data: str | None) -> tuple[Images | None, str]:
    """Validation images, evenly spaced if there are many, and what they are; None if they cannot be opened."""
    try:
        if data is not None:
            place, source = data, open_source(evaluated_part(data), "`data`")
            numbers: Sequence[int] = range(len(source))
            classes = source.classes
        else:
            of = read_recipe(folder).data
            place, split = str(of.val or of.train), open_split(of, strict=False)
            source, numbers, classes = split.val, split.val_indices, split.classes
    except UserError as error:
        if data is not None or not is_file(folder / "recipe.yaml"):
            raise
        return None, f"random inputs, because the validation images cannot be opened: {first_line(error)}"
    if card["classes"] and not same_classes(card["classes"], classes):
        raise UserError(
            f"{place} has other classes than the student: {class_difference(card['classes'], classes)}. "
            "Name images of the student's classes with `data`"
        )
    if not card["classes"]:  # only its features are compared
        source = WithoutLabels(source)
    elif are_sets(source.targets) != bool(card.get("multi_label")):
        raise UserError("`data`: its labels are not of the student's kind: sets, or one class per image")
    step = max(1, len(numbers) / MOST_IMAGES)
    chosen = [numbers[int(i * step)] for i in range(min(MOST_IMAGES, len(numbers)))]
    return Images(source, chosen, validation_transform(card), None), f"{len(chosen)} validation images"


def _compared(
    name: str, file: Path, student: nn.Module, card: dict[str, Any], images: Images | None, about: str
) -> FormatFile:
    made, size = FORMATS[name], size_of(file)
    if made.open is None:
        return FormatFile(file, size, ran=False, about=f"not run here: {made.told}")
    models = {"student": student.eval(), name: Opened(made, file)}
    if images is None:
        with torch.inference_mode():
            found = [model(example_images(card)).float() for model in models.values()]
        return FormatFile(file, size, True, about, (found[0] - found[1]).abs().max().item())
    batches, statistics = eval_batches(images, 32, 0, False), card_statistics(card, torch.device("cpu"))
    seen = compare_answers(models, batches, *statistics, threshold_of(card))
    ours, theirs = seen["student"], seen[name]
    result = FormatFile(file, size, True, about, theirs.largest_difference)
    if not card["classes"]:
        return result
    result = replace(result, agreement=theirs.agreement)
    if card.get("multi_label"):
        return replace(result, student_map=ours.figure, map=theirs.figure)
    return replace(result, student_top1=ours.figure, top1=theirs.figure)


def add_results(folder: Path, made: dict[str, FormatFile]) -> None:
    """Adds results to formats.json, and keeps those of formats that were made earlier."""
    try:
        known = json.loads((folder / FILE).read_text())["formats"]
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known = {}
    for name, of in made.items():
        known[name] = {
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(of).items()
            if value is not None
        } | {"versions": versions() | _version(name)}
    values = {"machine": machine(torch.device("cpu")), "formats": known}
    write_text(folder / FILE, json.dumps(values, indent=1) + "\n")


def _version(name: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    package = FORMATS[name].install.split()[-1].strip("'")
    package = "onnxruntime" if name == "fp16" else package
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


def listed() -> list[str]:
    """A line for every format: its file, and whether its converter is installed or how to install it."""
    width, file = max(map(len, FORMATS)), max(len(made.file) for made in FORMATS.values())
    return [
        f"{name:{width}}  {made.file:{file}}  {'installed' if is_installed(name) else made.install}  ({made.told})"
        for name, made in FORMATS.items()
    ]
