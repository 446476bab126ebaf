"""`scalekd methods`, `teachers`, `recipes`, `docs` and `doctor`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from scalekd import api
from scalekd.common.errors import UserError

from .options import add_json_or_markdown, command, print_result


def add_commands(commands: Any) -> None:
    sub = command(
        commands, "methods", _methods, "list the distillation methods with their options; with a name, explain one"
    )
    sub.add_argument("names", nargs="*", metavar="NAME", help="explain these methods and their options")
    sub.add_argument("--json", action="store_true")

    sub = command(
        commands, "teachers", _teachers, "which methods timm models can teach; without names, one model per family"
    )
    sub.add_argument("models", nargs="*", metavar="MODEL", help="timm names")
    add_json_or_markdown(sub)

    sub = command(
        commands, "recipes", _recipes, "list the shipped recipes; `recipes show NAME` prints and explains one"
    )
    sub.add_argument("show", nargs="*", metavar="show NAME")
    sub.add_argument("--json", action="store_true")

    sub = command(commands, "docs", _docs, "list the pages of the documentation, or print one")
    sub.add_argument("page", nargs="?", metavar="PAGE", help="a name in the list, such as any-teacher")

    sub = command(commands, "doctor", _doctor, "check this machine: versions, devices, a small distillation step")
    sub.add_argument("--json", action="store_true")


def _methods(args: argparse.Namespace) -> None:
    from scalekd.config.losses import explained

    listed = api.methods()
    if args.names:
        texts = [explained(name) for name in args.names]
        listed = [method for name in args.names for method in listed if method.name == name]
        if not args.json:
            print("\n\n".join(texts))
            return
    if args.json:
        plain = [
            {
                "name": method.name,
                "summary": method.summary,
                "needs": {"teacher": method.needs_teacher, "targets": method.needs_targets},
                "options": method.options,
            }
            for method in listed
        ]
        print(json.dumps(plain, indent=2))
        return
    for method in listed:
        print(f"{method.name:9} {method.summary}{' Reads labels.' * method.needs_targets}")
        if method.options:
            print(f"{'':9} {', '.join(f'{key}={value!r}' for key, value in method.options.items())}")


def _teachers(args: argparse.Namespace) -> None:
    from scalekd.checks.supported_methods import examine, families, markdown, show

    print_result(args, [examine(name) for name in args.models] or families(), show, markdown)


def _recipes(args: argparse.Namespace) -> None:
    from scalekd.config.listing import amount, entry, explained, table
    from scalekd.config.recipe import load_recipe
    from scalekd.config.recipe_files import recipe_values

    if args.show and (len(args.show) != 2 or args.show[0] != "show"):
        raise UserError("use `scalekd recipes` or `scalekd recipes show NAME`")
    if args.show and args.json:
        name = args.show[1]
        more = {"amount": amount(load_recipe(name)), "recipe": recipe_values(name)}
        print(json.dumps(entry(name) | more, indent=2))
    elif args.show:
        print(explained(args.show[1]), end="")
    else:
        print(json.dumps(api.recipes(), indent=2) if args.json else table(api.recipes()))


def _docs(args: argparse.Namespace) -> None:
    from scalekd.common.documentation import page_text, pages, title

    if args.page:
        print(page_text(args.page), end="")
        return
    for name, file in pages().items():
        print(f"{name:20} {title(file)}")


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    return examine(as_json=args.json)
