"""Size and latency of a student's files and of its teachers, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError, first_line
from scalekd.common.sections import height_and_width
from scalekd.config.recipe import Config
from scalekd.cost.latency import BATCHES, latencies
from scalekd.models.build import build_model
from scalekd.models.formats import size_of
from scalekd.models.student_file import export_onnx, onnx_runtime

THREADS = 1


def costs(files: dict[str, Path], config: Config, classes: int, scratch: Path) -> dict[str, Any]:
    """Bytes and latency of ONNX files and of the recipe's teachers, all measured side by side.

    A teacher that cannot be built or exported here has its reason instead. scratch: a folder for the teachers' files.
    """
    teachers: dict[str, Any] = {}
    theirs: dict[str, Path] = {}
    for name, spec in config.all_teachers.items():
        key = config.key_of(name)
        size = height_and_width(spec.image_size or config.data.image_size)
        try:
            own = None if spec.weights == "pretrained" else classes
            model, _ = build_model(spec, channels=config.data.channels, image_size=size, classes=own, where=key)
            card = {"classes": [""], "image_size": list(size), "mean": [0.0] * config.data.channels}
            theirs[key] = scratch / f"{key}.onnx"
            export_onnx(model, theirs[key], card)
            teachers[key] = {"model": spec.model, "bytes": size_of(theirs[key])}
        except UserError as error:
            teachers[key] = {"model": spec.model, "not_measured": first_line(error)}
            theirs.pop(key, None)
    measured = latencies(files | theirs, threads=THREADS)
    for key in theirs:
        teachers[key]["latency_ms"] = measured[key]
    return {
        "files": {name: {"bytes": size_of(file), "latency_ms": measured[name]} for name, file in files.items()},
        "teachers": teachers,
        "how": f"a batch in ms under onnxruntime, {THREADS} thread, random images, batches of "
        f"{' and '.join(map(str, BATCHES))}; median and quartiles of rounds in which every file runs, in random order",
        "onnxruntime": onnx_runtime().__version__,
    }
