"""Compares what a run was started with to what it would continue with: data, teachers, versions of the libraries.

`inputs.json` in the run's folder holds fingerprints of the last start. A run resumes exactly only if they are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import PIL

from scalekd.common.errors import UserError
from scalekd.common.files import is_file, write_text
from scalekd.common.provenance import machine, versions
from scalekd.common.text import shortened
from scalekd.data.fingerprint import differences, fingerprint

from .run import Run

FILE = "inputs.json"
TRAINED = ("student", "backbone")  # models whose weights are in the checkpoint


def inputs_of(run: Run) -> dict[str, Any]:
    """Fingerprints of the data, checksums of the models' weights, versions and machine, as plain values."""
    libraries = {key: value for key, value in versions().items() if key != "python"}
    return {
        "data": {
            part: fingerprint(images.listed())
            for part, images in (("train", run.train_images), ("val", run.val_images))
        },
        "teacher": {role: [loaded.sha256, loaded.head] for role, loaded in run.loaded.items() if role not in TRAINED},
        "versions": libraries | {"pillow": PIL.__version__, "numpy": numpy.__version__},
        "machine": machine(run.device),
    }


def data_changes(folder: Path, now: dict[str, Any]) -> list[str]:
    """How the images of the run in `folder` differ from those of now, in words; [] if the folder does not tell.

    now: the fingerprints of `train` and `val`.
    """
    before = _read(folder / FILE)
    return [] if before is None else _data(before["data"], now)


def check_inputs(now: dict[str, Any], allowed: Sequence[str], folder: Path) -> list[str]:
    """Compares the `inputs_of` a run that resumes with those of its last start; returns lines to print.

    A run without a checkpoint starts from the beginning, so nothing is compared. Raises `UserError` for inputs that
    differ and are not `allowed`.
    """
    if not any(is_file(folder / name) for name in ("last.pt", "previous.pt")):
        return []
    return _compared(_read(folder / FILE), now, allowed, folder)


def write_inputs(now: dict[str, Any], folder: Path) -> None:
    """Raises `UserError` if the file cannot be written."""
    write_text(folder / FILE, json.dumps(now, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any] | None:
    """The content of inputs.json; None without one, or if it is damaged."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kinds = ("data", "teacher", "versions")
    return values if isinstance(values, dict) and all(isinstance(values.get(kind), dict) for kind in kinds) else None


def _compared(before: dict[str, Any] | None, now: dict[str, Any], allowed: Sequence[str], folder: Path) -> list[str]:
    if before is None:
        return [f"{folder} has no readable {FILE}, as in older versions; data and teacher are not compared with before"]
    found = {
        "data": _data(before["data"], now["data"]),
        "teacher": [f"the weights of {role} changed" for role in _changed(before["teacher"], now["teacher"])],
        "versions": [
            f"{name} {now['versions'].get(name)}, {shortened(str(before['versions'].get(name)), 40)} before"
            for name in _changed(before["versions"], now["versions"])
        ],
    }
    refused = {kind: texts for kind, texts in found.items() if texts and kind not in allowed}
    if refused:
        what = "; ".join(text for texts in refused.values() for text in texts)
        keys = ", ".join(dict.fromkeys([*allowed, *refused]))
        raise UserError(
            f"{folder} was started with other inputs, so it would not be the same run: {what}.\n"
            "Restore them or choose another folder with `out`; "
            f'to continue anyway, set "train.resume_anyway=[{keys}]".'
        )
    lines = [f"continues with other inputs (train.resume_anyway): {text}" for texts in found.values() for text in texts]
    if before.get("machine") != now["machine"]:
        lines.append(
            f"continues on {now['machine']}, before on {shortened(str(before.get('machine')), 100)}: "
            "results may differ in rounding"
        )
    return lines


def _data(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    texts = []
    for part, known in now.items():
        old = before.get(part)
        words = differences(old, known) if isinstance(old, dict) else ["no fingerprint before"]
        texts += [f"data.{part} has {shortened(word, 200)}" for word in words]
    return texts


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
