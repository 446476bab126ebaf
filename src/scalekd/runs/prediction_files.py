"""Writes what a student gave for images: CSV, JSON lines, a contact sheet, arrays of features."""

from __future__ import annotations

import csv as csv_format
import io
import json
from pathlib import Path

import numpy as np
from numpy.lib.format import write_array
from safetensors.numpy import save

from scalekd.common.errors import UserError
from scalekd.common.files import check_name, odd_kind, replacing, write_text
from scalekd.common.results import Embeddings, Prediction, Predictions
from scalekd.common.text import counted
from scalekd.data.sources.source import Source
from scalekd.report.contact_sheet import chosen, contact_sheet, predicted

SHEETS, ARRAYS = (".png", ".jpg", ".jpeg"), (".npy", ".safetensors")
ENDINGS = {"sheet": SHEETS, "out": ARRAYS}
MOST_NAMES = 50_000_000  # bytes of names in the header of a .safetensors file, which may have 100 MB


def check_outputs(**files: Path | None) -> None:
    """Raises `UserError` for an output file with a wrong ending or in no folder; before anything is computed."""
    for name, file in files.items():
        if file is None:
            continue
        check_name(file)
        endings = ENDINGS.get(name, ())
        if endings and file.suffix.lower() not in endings:
            raise UserError(f"`{name}`: {file} must end in {' or '.join(endings)}")
        kind = "a folder" if file.is_dir() else odd_kind(file)
        if kind or not file.parent.is_dir():
            problem = f"{file} is {kind}" if kind else f"there is no folder {file.parent}"
            raise UserError(f"`{name}`: {problem}; name a file in a folder that exists")


def write_predictions(
    found: Predictions, source: Source, numbers: list[int], *, csv: Path | None, jsonl: Path | None, sheet: Path | None
) -> None:
    """Writes the files that are given. numbers: of the images in `source`. Raises `UserError`."""
    if csv:
        write_text(csv, as_csv(found.images))
    if jsonl:
        write_text(jsonl, as_json_lines(found.images))
    if sheet:
        shown = chosen(len(numbers))
        several = found.threshold is not None
        cells = [predicted(source[numbers[i]][0], found.images[i], several) for i in shown]
        title = counted(len(numbers), "image")
        title = f"{len(shown)} of {title}" if len(shown) < len(numbers) else title
        with replacing(sheet) as file:
            picture = contact_sheet(cells, title)
            picture.save(file, "png" if sheet.suffix.lower() == ".png" else "jpeg", quality=92)


def as_csv(rows: list[Prediction]) -> str:
    """A header and a line for each image: image,class,probability,class_2,probability_2,...; cells after the last class
    are empty."""
    count = max(1, *(len(row.classes) for row in rows))
    header = ["image", "class", "probability"]
    header += [f"{name}_{i}" for i in range(2, count + 1) for name in ("class", "probability")]
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        pairs = zip(row.classes, row.probabilities)
        cells = [value for name, share in pairs for value in (name, f"{share:.6f}")]
        writer.writerow([row.image, *cells, *[""] * (2 * count - len(cells))])
    return text.getvalue()


def as_json_lines(rows: list[Prediction]) -> str:
    """A JSON object for each image: its name, and the classes with their probabilities."""
    lines = []
    for row in rows:
        pairs = [{"class": name, "probability": share} for name, share in zip(row.classes, row.probabilities)]
        lines.append(json.dumps({"image": row.image, "predictions": pairs}, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_embeddings(found: Embeddings, out: Path) -> None:
    """Writes the features and the names of the images.

    FILE.npy is the array alone, and FILE.names.txt has one name a line: names in it would need pickle. FILE.safetensors
    has the tensor `features`, and the names as a JSON list in its metadata, as `images`. Raises `UserError`.
    """
    if out.suffix.lower() == ".npy":
        with replacing(out) as file:
            write_array(file, np.ascontiguousarray(found.features), allow_pickle=False)
        write_text(names_file(out), "".join(f"{name}\n" for name in found.images))
        return
    names = json.dumps(found.images, ensure_ascii=False)
    if len(names.encode()) > MOST_NAMES:
        raise UserError(f"`out`: the names of {len(found.images):,} images do not fit into {out}; write a .npy file")
    with replacing(out) as file:
        file.write(save({"features": np.ascontiguousarray(found.features)}, metadata={"images": names}))


def names_file(out: Path) -> Path:
    """The file with the names of the images in a .npy file."""
    return out.with_suffix(".names.txt")
