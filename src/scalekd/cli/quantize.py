"""`scalekd quantize`: int8 files of a student, with what they cost and give."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalekd import api
from scalekd.common import stop
from scalekd.common.text import counted, printable

from .options import DEVICE, add_sources, command, keeps_result

if TYPE_CHECKING:
    from scalekd.common.results import Quantized

FEW_IMAGES = 200  # with fewer, half the 95 % interval of a change is some points


def add_commands(commands: Any) -> None:
    sub = command(
        commands,
        "quantize",
        _quantize,
        "write a run's student as int8 for onnxruntime, and compare it with float32 (`scalekd docs quantize`)",
    )
    keeps_result(sub)
    sub.add_argument("run_folder", type=Path, metavar="RUN", help="the folder of a finished run")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe of a training, such as optim.lr=1e-5"
    )
    sub.add_argument("--qat", action="store_true", help="also train the int8 student with the run's teacher and losses")
    sub.add_argument("--qat-labels", action="store_true", help="also train it with the run's labels only")
    sub.add_argument("--epochs", type=int, default=3, metavar="N", help="of each training (default: 3)")
    sub.add_argument(
        "--calibration",
        choices=["auto", "minmax", "entropy", "percentile"],
        default="auto",
        help="how ranges are found; auto (default) takes the most accurate on training images kept apart",
    )
    sub.add_argument(
        "--images", type=int, default=256, metavar="N", help="training images to find ranges on (default: 256)"
    )
    add_sources(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="the folder for every way (default: RUN/quantize)")
    sub.add_argument("--device", help=DEVICE)


def _quantize(args: argparse.Namespace) -> None:
    found = api.quantize(
        args.run_folder,
        data=args.data,
        val=args.val,
        qat=args.qat,
        qat_labels=args.qat_labels,
        epochs=args.epochs,
        calibration=args.calibration,
        images=args.images,
        out=args.out,
        device=args.device,
        overrides=args.overrides,
        stop=stop.current(),
        verbose=True,
    )
    print("\n".join([*table(found), *notes(found, args.out or args.run_folder / "quantize")]))


def notes(found: Quantized, folder: Path) -> list[str]:
    """Where the int8 files of all ways are, if there are several, and whether the validation images are few."""
    lines = []
    if len(found.rows) > 2:
        lines.append(printable(f"all int8 files are in {folder}: ptq.onnx is the calibrated one"))
    images = found.rows["float32"]["images"]
    if images < FEW_IMAGES:
        lines.append(
            f"{counted(images, 'validation image')} show large changes only; `scalekd evaluate FILE --data SOURCE` measures "
            "a file on others"
        )
    return lines


def table(found: Quantized) -> list[str]:
    """The rows, the teachers, what stays in float32, and the file that was written."""
    teachers = {key: printable(f"{key} {of['model']}") for key, of in found.details["teachers"].items()}
    width = max(len(label) for label in (*teachers.values(), *(row["label"] for row in found.rows.values())))
    key, name, same = ("map", "mAP", "labels") if "map" in found.rows["float32"] else ("top1", "top-1", "class")
    lines = [
        f"{'':{width}}  {name + ' %':>7}  {'change':>13}  {'same ' + same:>11}  {'MB':>6}  {'ms, 1':>7}  {'ms, 16':>7}"
    ]
    for row in found.rows.values():
        measured = "change" in row
        change = f"{row['change']:+.2f} ± {row['change_interval']:.2f}" if measured else ""
        same = f"{row['agreement']:.2f} %" if measured else ""
        lines.append(f"{row['label']:{width}}  {row[key]:7.2f}  {change:>13}  {same:>11}  {_costs(row)}")
    for key, label in teachers.items():
        of = found.details["teachers"][key]
        costs = _costs(of) if "latency_ms" in of else printable(f"not measured: {of['not_measured']}")
        lines.append(f"{label:{width}}  {'':7}  {'':13}  {'':11}  {costs}")
    lines.append(
        f"{name} on the validation images; change from float32 with its 95 % interval; ms of a batch, one thread"
    )
    lines.append(f"in float32: {in_float(found.details['left_in_float'])}")
    written = printable(f"written: {found.file}  ({found.rows[found.way]['label']})")
    return [*lines, f"{written}; `scalekd report` shows this table"]


def _costs(row: Mapping[str, Any]) -> str:
    one, many = (row["latency_ms"][size]["median"] for size in ("1", "16"))
    return f"{row['bytes'] / 1e6:6.2f}  {one:7.2f}  {many:7.2f}"


def in_float(left: list[dict[str, Any]]) -> str:
    """The operators that stay in float32, with the share of the multiply-adds of those that have some."""
    named = [
        f"{kind['operator']} x {kind['count']}"
        + (f" ({kind['share']:.1%} of the multiply-adds)" if kind["share"] else "")
        for kind in left
    ]
    return ", ".join(named) or "nothing"
