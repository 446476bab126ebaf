"""Imports released weights (`scalekd import`) as an exported student."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from timm.data import ImageNetInfo

from scalekd.common.errors import UserError
from scalekd.common.files import make_folder
from scalekd.common.provenance import command_line
from scalekd.common.text import shortened
from scalekd.common.version import __version__
from scalekd.data.sources.open import open_source
from scalekd.models import added  # noqa: F401 - adds models to timm
from scalekd.models.build import build_model
from scalekd.models.options import Model
from scalekd.models.released_keys import REFUSED, TIMM
from scalekd.models.released_weights import (
    adapted,
    check,
    class_count,
    find_student,
    image_size,
    mixer_sizes,
    preprocessing,
    recognise,
    renamed,
)
from scalekd.models.student_file import export_student
from scalekd.models.weights.file import read_file
from scalekd.models.weights.match import sha256_of


def import_student(
    file: Path, model_name: str, kwargs: dict[str, Any], out: Path, classes: str | None = None, ema: bool = True
) -> list[str]:
    """Writes `out`/student.safetensors and its card. Returns the lines to print.

    Args:
        file: the released checkpoint.
        model_name: timm's name of its model.
        kwargs: as `student.kwargs` in a recipe; they override values derived from the tensors.
        classes: a data source whose classes are the rows of the head, in order; by default the 1,000 of ImageNet-1K.
        ema: use the averaged weights if the file also has them.

    Raises:
        UserError: if the file is not a checkpoint, belongs to another model, or does not match the model exactly.
    """
    try:
        spec = Model(model=model_name, kwargs=kwargs)
    except ValidationError as error:
        raise UserError(f"the model or its `kwargs`: {shortened(error.errors()[0]['msg'])}") from None
    if (out / "student.safetensors").exists():
        raise UserError(f"{out} already holds a student; choose another folder with `out`")
    released = find_student(read_file(file), file, ema)
    naming = recognise(released.state)
    if naming in REFUSED:
        raise UserError(f"{file} is recognised as {naming} and cannot be imported: {REFUSED[naming]}")
    state, unused, derived = renamed(released, naming, spec, file)
    given = derived | mixer_sizes(spec.model, state) | spec.kwargs
    size = image_size(state, spec.model, given)
    student, loaded = build_model(
        Model(model=spec.model, kwargs=given),
        channels=3,
        image_size=size,
        classes=class_count(spec.model, state, file),
        where="student",
    )
    if naming == TIMM:
        state = adapted(state, student)
    what = f"{file}, recognised as {naming}, does not fit {spec.model} with {loaded.kwargs}"
    student.load_state_dict(check(student, state, unused, what))

    card = {
        "model": spec.model,
        "kwargs": loaded.kwargs,
        "classes": class_names(loaded.kwargs["num_classes"], classes),
        "image_size": list(size),
        **preprocessing(student, naming),
        "teacher": None,
        "losses": {},
        "provenance": _provenance(file, naming, released.entry),
    }
    make_folder(out)
    difference = export_student(student.eval(), out / "student.safetensors", card)
    parameters = sum(p.numel() for p in student.parameters())
    return [
        f"{file}  sha256 {card['provenance']['released']['sha256']}",
        f"recognised as {naming}, from {released.entry}; {released.beside} tensors do not belong to the student",
        *released.notes,
        f"{len(state)} of {len(student.state_dict())} tensors of {spec.model} loaded, {parameters:,} parameters, "
        f"none missing, none left over; kwargs {loaded.kwargs}",
        f"{out / 'student.safetensors'}  timm loads it back: largest difference of logits {difference:.1e}",
    ]


def _provenance(file: Path, naming: str, entry: str) -> dict[str, Any]:
    return {
        "command": command_line(),
        "scalekd": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "released": {"file": file.name, "sha256": sha256_of(file), "naming": naming, "entry": entry},
    }


def class_names(count: int, source: str | None) -> list[str]:
    """The classes of a data source, by default of ImageNet-1K. Raises `UserError` if there are not `count`."""
    names = list(open_source(source, "`classes`").classes if source else ImageNetInfo("imagenet-1k").label_names())
    if len(names) != count:
        owner = source or "ImageNet-1K"
        raise UserError(
            f"the head has {count} rows, but {owner} has {len(names)} classes; "
            "give a source with the head's classes, such as a class folder, with `classes`"
        )
    return names
