"""`scalekd advise`."""

from __future__ import annotations

import argparse
from typing import Any

from scalekd import api

from .options import add_models, add_sources, command, print_result


def add_commands(commands: Any) -> None:
    sub = command(
        commands, "advise", _advise, "choose a recipe and losses for your images, by comparisons that were measured"
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    add_sources(sub)
    sub.add_argument("--unlabelled", metavar="SOURCE", help="images without labels, as for train")
    add_models(sub)
    sub.add_argument(
        "--steps", type=int, metavar="N", help="about how many steps to train (default: the recipe's epochs)"
    )
    sub.add_argument("--json", action="store_true")


def _advise(args: argparse.Namespace) -> None:
    from scalekd.compare.advice_page import show

    found = api.advise(
        data=args.data,
        val=args.val,
        unlabelled=args.unlabelled,
        teacher=args.teacher,
        student=args.student,
        steps=args.steps,
        overrides=args.overrides,
    )
    print_result(args, found.details, show)
