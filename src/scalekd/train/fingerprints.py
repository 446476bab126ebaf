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
from scalekd.common.text import counted, shortened
from scalekd.data.fingerprint import changed, differences, fingerprint
from scalekd.data.images import read_list

from .run import Run

FILE = "inputs.json"
TRAINED = ("student", "backbone")  # models whose weights are in the checkpoint


def inputs_of(run: Run) -> dict[str, Any]:
    """Fingerprints of the data, checksums of the models' weights, versions and machine, as plain values."""
    libraries = {key: value for key, value in versions().items() if key != "python"}
    return {
        "data": {part: fingerprint(images.listed()) for part, images in _parts(run)},
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


def teacher_changes(folder: Path, now: dict[str, str]) -> list[str]:
    """Which teachers of the run in `folder` have other weights now, in words. now: checksums by the recipe's key."""
    before = (_read(folder / FILE) or {"teacher": {}})["teacher"]
    known = {key: value[0] for key, value in before.items() if isinstance(value, list) and value}
    return [f"the weights of {key} changed" for key, checksum in now.items() if known.get(key) not in (None, checksum)]


def check_inputs(run: Run, now: dict[str, Any], folder: Path) -> list[str]:
    """Compares the `inputs_of` a run that resumes with those of its last start; returns lines to print.

    A run without a checkpoint starts from the beginning, so nothing is compared. Images that could not be read before may
    have changed: the run did not train on them. Raises `UserError` for other inputs that differ and that
    `train.resume_anyway` does not allow.
    """
    if not any(is_file(folder / name) for name in ("last.pt", "previous.pt")):
        return []
    before = _read(folder / FILE)
    if before is None:
        return [f"{folder} has no readable {FILE}, as in older versions; data and teacher are not compared with before"]
    repaired, texts = _images(run, before["data"], now["data"], folder)
    lines = []
    if repaired:
        lines.append(
            f"continues with {counted(len(repaired), 'image')} that could not be read before and changed since, such as "
            f"{repaired[0]}"
        )
    return lines + _compared(before, texts, now, run.config.train.resume_anyway, folder)


def _images(run: Run, before: dict[str, Any], now: dict[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """The names of the images that could not be read before and changed since; how the others differ, in words."""
    bad = {(part, name) for part, name, _ in read_list(folder)}
    repaired, texts = list[str](), list[str]()
    for part, images in _parts(run):
        old = before.get(part)
        if not isinstance(old, dict):
            texts.append(f"data.{part} has no fingerprint before")
            continue
        words, listing = differences(old, now[part]), images.listed()
        files = (changed(old, now[part], listing) if words else None) or {}
        others = [listing.name(i) for i, opened in files.items() if opened and (part, listing.name(i)) not in bad]
        if files and not others:
            repaired += [listing.name(i) for i in files]
            continue
        examples = f" ({counted(len(others), 'file')}, such as {others[0]})" if others else ""
        texts += [f"data.{part} has {shortened(word, 200)}{examples}" for word in words]
    return repaired, texts


def _parts(run: Run) -> list[tuple[str, Any]]:
    return [("train", run.train_images), ("val", run.val_images)]


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


def _compared(
    before: dict[str, Any], data: Sequence[str], now: dict[str, Any], allowed: Sequence[str], folder: Path
) -> list[str]:
    """data: how the images differ, in words."""
    found = {
        "data": list(data),
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
