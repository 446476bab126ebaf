"""`scalekd export`, `predict`, `embed` and `push`: the student of a run in use."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalekd import api
from scalekd.common.errors import UserError
from scalekd.common.text import counted, printable

from .options import DEVICE, command

if TYPE_CHECKING:
    from scalekd.common.results import FormatFile, Prediction, Predictions

STUDENT = "a run's folder, a .safetensors file or an .onnx file"
WIDTH = 80  # of the table, in characters
NAME, CLASS = 32, 20  # of its columns
STDOUT = "-"


def add_commands(commands: Any) -> None:
    sub = command(commands, "export", _export, "export a run's student as safetensors for timm, and as ONNX")
    sub.add_argument("run_folder", type=Path, nargs="?", metavar="RUN", help="the run's folder")
    sub.add_argument(
        "--checkpoint",
        choices=["best", "last"],
        default="last",
        help="which weights: the best by top-1, mAP or `train.best_by` on the validation images, or the last (default)",
    )
    sub.add_argument("--onnx", action="store_true", help="also write student.onnx and compare its outputs")
    sub.add_argument(
        "--format",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also convert it for other runtimes, and compare them on validation images",
    )
    sub.add_argument("--list", action="store_true", help="list the formats, and how to install their converters")
    sub.add_argument("--data", metavar="SOURCE", help="images to compare on (default: the run's validation images)")

    sub = command(commands, "predict", _predict, "print the most probable classes of images")
    _add_inputs(sub)
    sub.add_argument("--top", type=int, metavar="K", help="most classes per image (default: 5; all labels of a set)")
    sub.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="for sets of labels: least probability (default: that of the student)",
    )
    sub.add_argument("--csv", metavar="FILE", help="write a table to this file; - for standard output")
    sub.add_argument("--jsonl", metavar="FILE", help="write a JSON object per image; - for standard output")
    sub.add_argument("--sheet", type=Path, metavar="FILE", help="draw the images with their classes, as .png or .jpg")
    _add_speed(sub)

    sub = command(commands, "embed", _embed, "write the embeddings of images")
    _add_inputs(sub)
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=".npy, with the names in .names.txt next to it, or .safetensors, with the names in its metadata",
    )
    _add_speed(sub)

    sub = command(commands, "push", _push, "upload a student to the Hugging Face Hub in timm's format")
    sub.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder")
    sub.add_argument("repo", metavar="USER/NAME", help="where; created if it does not exist")
    sub.add_argument("--private", action="store_true", help="create it as a private one")
    sub.add_argument("--dry-run", action="store_true", help="make and check the files, list them, and send nothing")


def _add_inputs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("student", type=Path, metavar="STUDENT", help=STUDENT)
    sub.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="an image, a folder that is searched at any depth, or a source such as tar:FILE",
    )


def _add_speed(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    sub.add_argument("--workers", type=workers, default="auto", metavar="N", help="processes that read images")
    sub.add_argument("--device", help=DEVICE)


def workers(text: str) -> int | str:
    """A number, or `auto`."""
    return text if text == "auto" else int(text)


def _export(args: argparse.Namespace) -> None:
    if args.list:
        from scalekd.runs.formats import listed

        print("\n".join(listed()))
        return
    if args.run_folder is None:
        raise UserError("export needs the folder of a run; `scalekd export --list` lists the formats")
    from scalekd.models.weights.card import read_card
    from scalekd.report.damage import FIGURES

    result = api.export(
        args.run_folder, checkpoint=args.checkpoint, onnx=args.onnx, formats=args.format, data=args.data
    )
    key, value = result.chosen_by
    neighbours = key == "top1" and not read_card(result.student.with_suffix(".json"))["classes"]
    name = "nearest-neighbour top-1" if neighbours else FIGURES[key]
    print(f"exported: the {args.checkpoint} weights, {name} {value:.2f} % on the validation images")
    for file, difference in result.differences.items():
        reader = "onnxruntime" if file == result.onnx else "timm loads it back"
        print(printable(f"{file}  {reader}: largest difference of outputs {difference:.1e}"))
    for name, made in result.formats.items():
        print(printable(f"{made.file}  {name}, {made.bytes / 1e6:.2f} MB, {_comparison(made)}"))


def _comparison(made: FormatFile) -> str:
    if made.largest_difference is None:
        return made.about
    text = f"largest difference of logits {made.largest_difference:.1e} on {made.about}"
    if made.map is not None:
        return f"{text}; mAP {made.map:.2f} % (student {made.student_map:.2f} %)"
    if made.top1 is None:
        return text
    return f"{text}; top-1 {made.top1:.2f} % (student {made.student_top1:.2f} %)"


def _predict(args: argparse.Namespace) -> None:
    if args.csv == args.jsonl == STDOUT:
        raise UserError("--csv and --jsonl: only one of them can go to standard output")
    files = {name: None if getattr(args, name) == STDOUT else getattr(args, name) for name in ("csv", "jsonl")}
    found = api.predict(
        args.student,
        args.inputs,
        top=args.top,
        threshold=args.threshold,
        csv=files["csv"],
        jsonl=files["jsonl"],
        sheet=args.sheet,
        batch=args.batch,
        workers=args.workers,
        device=args.device,
        verbose=True,
    )
    if STDOUT in (args.csv, args.jsonl):
        from scalekd.runs.prediction_files import as_csv, as_json_lines

        print((as_csv if args.csv == STDOUT else as_json_lines)(found.images), end="")
    elif not (args.csv or args.jsonl):
        print("\n".join(table(found.images)))
    print(printable(_summary(found)), file=sys.stderr)
    for file in (files["csv"], files["jsonl"], args.sheet):
        if file:
            print(printable(f"written: {file}"), file=sys.stderr)


def table(rows: list[Prediction]) -> list[str]:
    """A line for each image, at most `WIDTH` characters: its name, the best class with its probability, the others."""
    names = [_cut(row.image, NAME, from_end=True) for row in rows]
    width = max(5, *map(len, names))
    first = max(5, *(len(_cut(printable(_first(row)), CLASS)) for row in rows))
    lines = [f"{'image':{width}}  {'class':{first}}      %  next".rstrip()]
    for row, name in zip(rows, names):
        pairs = [(printable(c), 100 * p) for c, p in zip(row.classes, row.probabilities)]
        others, best = pairs[1:], f"{pairs[0][1]:5.1f}" if pairs else ""
        line = f"{name:{width}}  {_cut(printable(_first(row)), CLASS):{first}}  {best}  "
        for i, (other, share) in enumerate(others):
            text = ", " * (i > 0) + f"{other} {share:.1f}"
            if len(line) + len(text) > WIDTH:
                break
            line += text
        lines.append(line.rstrip())
    return lines


def _first(row: Prediction) -> str:
    return row.classes[0] if row.classes else "-"


def _cut(text: str, most: int, from_end: bool = False) -> str:
    if len(text) <= most:
        return text
    return f"...{text[3 - most :]}" if from_end else f"{text[: max(0, most - 3)]}..."[:most]


def _summary(found: Predictions) -> str:
    if found.threshold is None:
        classes = Counter(row.classes[0] for row in found.images).most_common()
    else:
        classes = Counter(name for row in found.images for name in row.classes).most_common()
        empty = sum(not row.classes for row in found.images)
        classes += [("without a label", empty)] * (empty > 0)
    listed = ", ".join(f"{number} {name}" for name, number in classes[:5]) + ", ..." * (len(classes) > 5)
    at = "" if found.threshold is None else f", labels from probability {found.threshold:g}"
    return f"{counted(len(found.images), 'image')}{at}: {listed}{skipped(found.skipped)}"


def skipped(skipped: dict[str, str]) -> str:
    """The end of a sentence on images that could not be read."""
    return f"; {counted(len(skipped), 'image')} skipped" if skipped else ""


def _embed(args: argparse.Namespace) -> None:
    found = api.embed(
        args.student,
        args.inputs,
        out=args.out,
        batch=args.batch,
        workers=args.workers,
        device=args.device,
        verbose=True,
    )
    count, width = found.features.shape
    print(printable(f"{args.out}  {count} x {width}, float32{skipped(found.skipped)}"))


def _push(args: argparse.Namespace) -> None:
    found = api.push(args.run_folder, args.repo, private=args.private, dry_run=args.dry_run)
    print("timm loads the files back: equal logits to the last bit")
    for name, size in found.files.items():
        print(f"  {name:20} {size:>14,} bytes")
    print(printable(f"uploaded: {found.url}" if found.url else f"nothing was sent to {found.repo} (--dry-run)"))
