"""`scalekd analyze`: frequency, distance, similarity. Slow imports are inside the functions."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds `analyze` to the sub-commands of `scalekd`."""
    sub = commands.add_parser(
        "analyze", help="analyse features, and how close students are to their teacher (`scalekd docs analyze`)"
    )
    analyses = sub.add_subparsers(title="analyses", metavar="ANALYSIS", required=True)

    def analysis(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = analyses.add_parser(name, help=text, description=text)
        sub.set_defaults(run=function)
        sub.add_argument("--batch", type=int, default=32, metavar="N", help="images per batch (default: 32)")
        sub.add_argument("--device", help="as for train")
        sub.add_argument("--out", type=Path, metavar="DIR", help="also write figures and data to DIR")
        return sub

    sub = analysis("frequency", _frequency, "the frequencies of models' last maps")
    sub.add_argument("models", nargs="+", metavar="MODEL", help="a timm name, NAME=FILE, or an exported student")
    sub.add_argument("--data", required=True, metavar="SOURCE", help="as for train")
    sub.add_argument("--images", type=int, default=1600, metavar="N", help="how many (default: 1600)")
    sub.add_argument("--random", action="store_true", help="use initial values for models given by name")

    for name, function, text in (
        ("distance", _distance, "the distance of students' alternative components from their teacher's"),
        ("similarity", _similarity, "students compared with their teacher: CKA, agreement, calibration, attention"),
    ):
        sub = analysis(name, function, text)
        sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs with the same teacher")
        sub.add_argument("--data", metavar="SOURCE", help="images to use instead of the first run's validation images")
        sub.add_argument("--images", type=int, metavar="N", help="use N images, spread evenly (default: all)")
    sub.add_argument("--baseline", type=Path, metavar="RUN", help="show gains by class over this run")
    sub.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="images in the attention figures (default: 4)"
    )


def _frequency(args: argparse.Namespace) -> None:
    from scalekd.analyze.frequency import analyze, show, write
    from scalekd.common.parallel import pick_device

    device = pick_device(args.device)
    found = analyze(args.models, args.data, args.images, device, random=args.random, batch=args.batch, out=args.out)
    _print(args, found, show, write)


def _distance(args: argparse.Namespace) -> None:
    from scalekd.analyze.distance import analyze, show, write
    from scalekd.common.parallel import pick_device

    found = analyze(args.runs, args.data, args.images, pick_device(args.device), batch=args.batch, out=args.out)
    _print(args, found, show, write)


def _similarity(args: argparse.Namespace) -> None:
    from scalekd.analyze.similarity import analyze, show, write
    from scalekd.common.parallel import pick_device

    found = analyze(
        args.runs,
        args.data,
        args.images,
        pick_device(args.device),
        baseline=args.baseline,
        pictures=args.pictures,
        batch=args.batch,
        out=args.out,
    )
    _print(args, found, show, write)


def _print(
    args: argparse.Namespace, found: Any, show: Callable[[Any, Any], None], write: Callable[[Any, Path], None]
) -> None:
    from rich.console import Console

    show(found, Console(emoji=False))
    if args.out:
        write(found, args.out)
