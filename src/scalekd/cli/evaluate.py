"""`scalekd evaluate`: what an exported student is worth on labelled images."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scalekd import api
from scalekd.common.errors import UserError
from scalekd.common.text import counted, printable

from .deploy import STUDENT, skipped
from .options import DEVICE, command


def add_commands(commands: Any) -> None:
    sub = command(
        commands, "evaluate", _evaluate, "measure top-1 and top-5, mAP and F1, or retrieval, of an exported student"
    )
    sub.add_argument("student", type=Path, help=STUDENT)
    sub.add_argument(
        "--data", required=True, metavar="SOURCE", help="a folder with one sub-folder per class, or a named source"
    )
    sub.add_argument(
        "--retrieval", action="store_true", help="measure recall@k, mAP@R and k-NN of its embeddings instead"
    )
    sub.add_argument(
        "--gallery", metavar="SOURCE", help="with --retrieval: the images to search (default: those of --data)"
    )
    sub.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE",
        help="with --retrieval: draw queries with their nearest images, as .png or .jpg",
    )
    sub.add_argument("--device", help=DEVICE)
    sub.add_argument("--json", action="store_true")


def _evaluate(args: argparse.Namespace) -> None:
    if args.retrieval:
        _evaluate_retrieval(args)
        return
    if args.gallery is not None or args.sheet is not None:
        raise UserError(f"--{'gallery' if args.gallery is not None else 'sheet'} goes with --retrieval")
    result = api.evaluate(args.student, data=args.data, device=args.device, verbose=not args.json)
    if args.json:
        print(json.dumps(asdict(result)))
    elif result.map is not None:
        from scalekd.common.set_figures import class_lines

        print("\n".join(class_lines(result.classes, "`--json` has all")))
        print(
            f"mAP {result.map:.2f} %  macro F1 {result.f1_macro:.2f} %  micro F1 {result.f1_micro:.2f} %  at threshold "
            f"{result.threshold:g}  loss {result.loss:.4f}  on {result.images} images"
        )
    else:
        print(
            f"top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %  loss {result.loss:.4f}  on {result.images} images"
        )


def _evaluate_retrieval(args: argparse.Namespace) -> None:
    from scalekd.heads.retrieval import RETRIEVAL_FIGURES

    found = api.evaluate_retrieval(
        args.student, data=args.data, gallery=args.gallery, sheet=args.sheet, device=args.device, verbose=not args.json
    )
    if args.json:
        print(json.dumps(asdict(found)))
        return
    for key, name in RETRIEVAL_FIGURES.items():
        low, high = found.intervals[key]
        print(f"{name:9}  {found.figures[key]:6.2f} %  [{low:.2f}, {high:.2f}]")
    alone = f"; {counted(found.left_out, 'image')} without an image of the class to find left out" * (
        found.left_out > 0
    )
    print(f"{found.queries} queries among {counted(found.gallery, 'image')}{alone}{skipped(found.skipped)}")
    if args.sheet:
        print(printable(f"written: {args.sheet}"))
