"""Writes a student's int8 file, from ranges or from a trained fake-quantised student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scalekd.common.files import replacing
from scalekd.models.student_file import CARD, create_student

from .fake import FakeQuantised
from .fold import unfold
from .graph import graph_of
from .onnx_quantiser import quantised

INT8 = "student.int8.onnx"


def write_int8(model: Any, path: Path, card: dict[str, Any]) -> None:
    """Writes an int8 model of `quantised` with its card. Raises `UserError` if the file cannot be written."""
    del model.metadata_props[:]
    model.metadata_props.add(key=CARD, value=json.dumps(card))
    with replacing(path) as file:
        file.write(model.SerializeToString())


def unrounded(trained: FakeQuantised, card: dict[str, Any], card_file: Path) -> Any:
    """The plain timm student with the weights of a fake-quantised one, before rounding. Raises `UserError`."""
    student = create_student(card, card_file).eval()
    unfold(trained.weights(), trained.pairs, student)
    return student


def int8_of(trained: FakeQuantised, card: dict[str, Any], card_file: Path, cuts: Any = None) -> Any:
    """The int8 model of a fake-quantised student: the same weights, places and scales. Raises `UserError`."""
    graph = graph_of(create_student(card, card_file), card, cuts, trained.weights())
    return quantised(graph, places=trained.places())
