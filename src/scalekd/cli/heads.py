"""`scalekd head` and `scalekd probe`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scalekd import api

from .error_options import as_options
from .options import DEVICE, command


def add_commands(commands: Any) -> None:
    _add_head(commands)
    _add_probe(commands)


def _add_head(commands: Any) -> None:
    sub = command(
        commands,
        "head",
        _head,
        "fit a linear classifier for your classes on a frozen teacher (`scalekd docs any-teacher`)",
    )
    sub.add_argument("model", metavar="MODEL", help="the teacher's timm name, or its folder")
    sub.add_argument("--data", required=True, metavar="SOURCE", help="as for train")
    sub.add_argument("--val", metavar="SOURCE", help="as for train")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for head.safetensors and head.json")
    sub.add_argument("--weights", default="pretrained", metavar="FILE", help="as teacher.weights (default: timm's own)")
    sub.add_argument("--prefix", metavar="TEXT", help="as teacher.prefix: the prefix of the names in that file")
    sub.add_argument("--kwargs", metavar="YAML", help="teacher.kwargs of a recipe: '{global_pool: avg}'")
    sub.add_argument("--image-size", metavar="N", help="pixels, such as 98 or '[98, 126]' (default: timm's own)")
    sub.add_argument("--channels", type=int, choices=[1, 3], help="as data.channels (default: 3)")
    sub.add_argument(
        "--mean", metavar="YAML", help="mean of the pixels, such as '[0.5, 0.5, 0.5]' (default: timm's own)"
    )
    sub.add_argument("--std", metavar="YAML", help="standard deviation of the pixels, as --mean")
    sub.add_argument("--crop-pct", type=float, metavar="X", help="as augment.crop_pct (default: timm's own)")
    sub.add_argument("--limit", type=int, metavar="N", help="use only N labels, the same number per class")
    sub.add_argument("--seed", type=int, help="as data.seed: chooses the labels and the held-out part (default: 0)")
    sub.add_argument(
        "--draws",
        type=int,
        default=1,
        metavar="K",
        help="fit on K draws of the labels; keep the head of the first (default: 1)",
    )
    sub.add_argument("--val-limit", type=int, metavar="N", help="use only N validation images")
    sub.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder that keeps the features (default: runs/features)"
    )
    sub.add_argument("--device", help=DEVICE)


def _add_probe(commands: Any) -> None:
    sub = command(
        commands, "probe", _probe, "evaluate frozen features with few labels per class (`scalekd docs transfer`)"
    )
    sub.add_argument(
        "models", nargs="+", metavar="MODEL", help="an exported student, a timm name, or NAME=FILE for other weights"
    )
    sub.add_argument("--data", required=True, metavar="SOURCE", help="as for train: the labelled images")
    sub.add_argument("--val", metavar="SOURCE", help="as for train: the images to test on")
    sub.add_argument(
        "--shots", default="1,5,10,25,all", metavar="N,N,..", help="labels per class (default: 1,5,10,25,all)"
    )
    sub.add_argument(
        "--draws", type=int, default=5, metavar="K", help="sets of labelled images for each number (default: 5)"
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("runs/probe"),
        metavar="DIR",
        help="folder for the results (default: runs/probe)",
    )
    sub.add_argument("--image-size", metavar="N", help="for timm names: pixels, such as 98 or '[98, 126]'")
    sub.add_argument("--seed", type=int, help="seed of the draws, and of the held-out part without --val (default: 0)")
    sub.add_argument("--val-limit", type=int, metavar="N", help="test on N images only")
    sub.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder that keeps the features (default: runs/features)"
    )
    sub.add_argument("--device", help=DEVICE)
    sub.add_argument("--dry-run", action="store_true", help="check data and models, show the plan, write nothing")


def _head(args: argparse.Namespace) -> None:
    from scalekd.common.yaml_file import parse_yaml

    values = {key: value for key, value in vars(args).items() if key != "run"}
    for key in ("kwargs", "image_size", "mean", "std"):
        if values[key] is not None:
            values[key] = parse_yaml(values[key], f"--{key.replace('_', '-')}")
    as_options(api.fit_head)(values.pop("model"), **values, verbose=True)


def _probe(args: argparse.Namespace) -> None:
    from rich.console import Console

    from scalekd.analyze.probe import probe_named
    from scalekd.analyze.shots import parse_shots
    from scalekd.common.yaml_file import parse_yaml

    as_options(probe_named)(
        args.models,
        args.data,
        args.val,
        args.out,
        Console(emoji=False),
        shots=parse_shots(args.shots),
        draws=args.draws,
        image_size=None if args.image_size is None else parse_yaml(args.image_size, "--image-size"),
        seed=args.seed,
        val_limit=args.val_limit,
        cache=args.cache,
        device_name=args.device,
        dry_run=args.dry_run,
    )
