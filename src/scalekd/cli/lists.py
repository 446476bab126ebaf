"""`scalekd methods`, `teachers`, `recipes` and `doctor`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from scalekd.common.errors import UserError

from .options import _tell


def _methods(args: argparse.Namespace) -> None:
    from scalekd.config.losses import options_of
    from scalekd.methods import METHODS

    listed: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        doc = (method.__doc__ or "").strip().split("\n\n")[0]
        options = {k: p.default for k, p in options_of(method).items()}
        needs = {
            key: getattr(method, f"needs_{key}", default) for key, default in (("teacher", True), ("targets", False))
        }
        listed.append({"name": name, "summary": " ".join(doc.split()), "needs": needs, "options": options})
    if args.json:
        print(json.dumps(listed, indent=2))
        return
    for entry in listed:
        print(f"{entry['name']:9} {entry['summary']}{' Reads labels.' * entry['needs']['targets']}")
        if entry["options"]:
            print(f"{'':9} {', '.join(f'{k}={v!r}' for k, v in entry['options'].items())}")


def _teachers(args: argparse.Namespace) -> None:
    from scalekd.checks.served_methods import examine, families, markdown, show

    _tell(args, [examine(name) for name in args.models] or families(), show, markdown)


def _recipes(args: argparse.Namespace) -> None:
    from scalekd.config.files import recipe_values
    from scalekd.config.listing import amount, entry, explained, listed, table
    from scalekd.config.recipe import load_recipe

    if args.show and (len(args.show) != 2 or args.show[0] != "show"):
        raise UserError("write `scalekd recipes` or `scalekd recipes show NAME`")
    if args.show and args.json:
        name = args.show[1]
        told = {"amount": amount(load_recipe(name)), "recipe": recipe_values(name)}
        print(json.dumps(entry(name) | told, indent=2))
    elif args.show:
        print(explained(args.show[1]), end="")
    else:
        print(json.dumps(listed(), indent=2) if args.json else table(listed()))


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    return examine(as_json=args.json)
