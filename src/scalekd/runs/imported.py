"""Imports released weights as an exported student."""

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
from scalekd.models import mixer  # noqa: F401 - adds a name to timm's
from scalekd.models.build import build_model
from scalekd.models.export import export_student
from scalekd.models.options import Model
from scalekd.models.released import (
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
from scalekd.models.released_keys import REFUSED, TIMM
from scalekd.models.weights.file import read_file
from scalekd.models.weights.match import sha256_of


def import_student(
    file: Path, model_name: str, kwargs: dict[str, Any], out: Path, classes: str | None = None, ema: bool = True
) -> list[str]:
    """Writes `out`/student.safetensors and its card; returns what to tell.

    kwargs: as `student.kwargs` of a recipe; they replace what is worked out from the tensors.
    classes: a source whose classes the head's rows are, in order; None: those of ImageNet-1K, which are 1,000.
    ema: take the averaged weights where a file has both.
    Raises `UserError` for a file that is no checkpoint, is of another model, or does not fill the model exactly.
    """
    try:
        spec = Model(model=model_name, kwargs=kwargs)
    except ValidationError as error:
        raise UserError(f"--model, --kwargs: {shortened(error.errors()[0]['msg'])}") from None
    if (out / "student.safetensors").exists():
        raise UserError(f"{out} holds a student already; name another folder with --out")
    found = find_student(read_file(file), file, ema)
    naming = recognise(found.state)
    if naming in REFUSED:
        raise UserError(f"{file} is recognised as {naming} and not imported: {REFUSED[naming]}")
    state, left, worked_out = renamed(found, naming, spec, file)
    given = worked_out | mixer_sizes(spec.model, state) | spec.kwargs
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
    check(student, state, left, f"{file}, recognised as {naming}, does not fit {spec.model} with {loaded.kwargs}")
    student.load_state_dict(state)

    card = {
        "model": spec.model,
        "kwargs": loaded.kwargs,
        "classes": class_names(loaded.kwargs["num_classes"], classes),
        "image_size": list(size),
        **preprocessing(student, naming),
        "teacher": None,
        "losses": {},
        "provenance": {
            "command": command_line(),
            "scalekd": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "released": {"file": file.name, "sha256": sha256_of(file), "naming": naming, "entry": found.entry},
        },
    }
    make_folder(out)
    difference = export_student(student.eval(), out / "student.safetensors", card)
    parameters = sum(p.numel() for p in student.parameters())
    return [
        f"{file}  sha256 {card['provenance']['released']['sha256']}",
        f"recognised as {naming}, from {found.entry}; {found.beside} tensors beside the student",
        *found.notes,
        f"{len(state)} of {len(student.state_dict())} tensors of {spec.model} filled, {parameters:,} parameters, "
        f"none missing, none left over; kwargs {loaded.kwargs}",
        f"{out / 'student.safetensors'}  timm loads it back: largest difference of logits {difference:.1e}",
    ]


def class_names(count: int, source: str | None) -> list[str]:
    """Raises `UserError` if they are not as many as the head has rows."""
    names = list(open_source(source, "--classes").classes if source else ImageNetInfo("imagenet-1k").label_names())
    if len(names) != count:
        whose = f"--classes {source} has" if source else "ImageNet-1K has"
        raise UserError(
            f"the head has {count} rows and {whose} {len(names)} classes; name the classes' source with --classes, "
            "such as a class folder"
        )
    return names
