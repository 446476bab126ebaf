"""`scalekd cost`, `plan` and `pairs`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scalekd import api

from .options import DEVICE, add_json_or_markdown, add_models, add_recipe, command, overrides, print_result


def add_commands(commands: Any) -> None:
    sub = command(
        commands, "cost", _cost, "count what a training step costs, by part and against plain feature distillation"
    )
    add_recipe(sub)
    add_models(sub)
    sub.add_argument("--classes", type=int, default=1000, metavar="N", help="classes of the data (default: 1000)")
    sub.add_argument("--batch", type=int, metavar="N", help="images per device (default: 32; 4 with --measure)")
    sub.add_argument("--measure", action="store_true", help="also time real steps on random pixels")
    sub.add_argument("--device", help=f"for --measure: {DEVICE}")
    sub.add_argument("--out", type=Path, metavar="DIR", help="also write NAME.json and NAME.md there")
    sub.add_argument("--json", action="store_true")

    _add_plan(commands)

    sub = command(
        commands, "pairs", _pairs, "parameters, multiply-adds and stage maps of the papers' teachers and students"
    )
    sub.add_argument("names", nargs="*", metavar="NAME", help="only pairs whose model names contain all of these")
    add_json_or_markdown(sub)


def _add_plan(commands: Any) -> None:
    sub = command(
        commands, "plan", _plan, "estimate hours, GPU-hours, memory and the bottleneck of a run, as intervals"
    )
    add_recipe(sub)
    sub.add_argument("--data", metavar="SOURCE", help="as for train")
    sub.add_argument("--val", metavar="SOURCE", help="as for train")
    add_models(sub)
    sub.add_argument("--images", type=int, metavar="N", help="training images (default: the data's, or ImageNet-1K's)")
    sub.add_argument("--classes", type=int, metavar="N", help="classes of the data (default: the data's, or 1000)")
    sub.add_argument("--gpu", metavar="KIND", help="the GPU: v100, a100, h100, l4, rtx4090, ... (default: a100)")
    sub.add_argument("--gpus", type=int, default=1, metavar="K", help="number of GPUs (default: 1)")
    sub.add_argument("--measure", action="store_true", help="time real steps and image loading on this machine")
    sub.add_argument(
        "--together", action="store_true", help="for --measure: also time steps while the workers load images"
    )
    sub.add_argument("--batch", type=int, metavar="N", help="for --measure: images per step (default: up to 64)")
    sub.add_argument("--device", help=f"for --measure: {DEVICE}")
    add_json_or_markdown(sub)


def _cost(args: argparse.Namespace) -> None:
    from scalekd.cost.page import show

    result = api.cost(
        args.recipe,
        teacher=args.teacher,
        student=args.student,
        classes=args.classes,
        batch=args.batch,
        measure=args.measure,
        device=args.device,
        out=args.out,
        overrides=overrides(args),
    )
    print_result(args, result.details, show)


def _plan(args: argparse.Namespace) -> None:
    from scalekd.cost.plan_page import markdown, show

    result = api.plan(
        args.recipe,
        data=args.data,
        val=args.val,
        teacher=args.teacher,
        student=args.student,
        images=args.images,
        classes=args.classes,
        gpu=args.gpu,
        gpus=args.gpus,
        measure=args.measure,
        together=args.together,
        batch=args.batch,
        device=args.device,
        overrides=overrides(args),
    )
    values = {"runs": result.runs, "hours": list(result.hours), "gpu_hours": list(result.gpu_hours)}
    print_result(args, values, show, markdown)


def _pairs(args: argparse.Namespace) -> None:
    from scalekd.cost.pairs import markdown, pairs, show

    print_result(args, pairs(args.names), show, markdown)
