"""Shared by several commands: adding a sub-command, common options, printing a result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

DEVICE = "cpu, cuda, cuda:1 (default: a GPU if there is one)"


def command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int | None], text: str
) -> argparse.ArgumentParser:
    """Adds the sub-command `name` that calls `function`."""
    sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(run=function)
    return sub


def keeps_result(sub: argparse.ArgumentParser) -> None:
    """The command's result is in a folder, so it continues if the screen is lost."""
    sub.set_defaults(folder_holds_result=True)


def add_recipe(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", help="a shipped recipe's name (`scalekd recipes`) or a YAML file")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-3 losses.kd.temperature=2 losses.kd=off"
    )


def add_models(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--teacher",
        metavar="MODEL",
        help="a timm name (pre-trained, unless teacher.weights is set) or the folder of a run or head",
    )
    sub.add_argument("--student", metavar="MODEL", help="a timm name, or the folder of a run")


def add_sources(sub: argparse.ArgumentParser, *, required: bool = False) -> None:
    sub.add_argument(
        "--data",
        required=required,
        metavar="SOURCE",
        help="a folder with train/ and val/ or one folder per class, tar:, wds:, hf:, ...",
    )
    sub.add_argument("--val", metavar="SOURCE", help="validation images (default: those of --data, or a held-out part)")


def add_bad_images(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--on-bad-image", choices=["error", "skip"], help="what to do if an image cannot be read (default: error)"
    )


def add_json_or_markdown(sub: argparse.ArgumentParser) -> None:
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")


def overrides(args: argparse.Namespace) -> list[str]:
    """The overrides of options that set a recipe key and are no parameter of the Python function, then `key=value`."""
    texts = []
    if getattr(args, "on_bad_image", None):
        texts.append(f"data.on_bad_image={args.on_bad_image}")
    if getattr(args, "teacher_random", False):
        texts.append("teacher.weights=random")
    return [*texts, *args.overrides]


def recipe_overrides(args: argparse.Namespace) -> list[str]:
    """All overrides of a command line: options that set recipe keys, then `key=value`."""
    from scalekd.config.arguments import overrides_of

    data, val, unlabelled, teacher, student = (
        getattr(args, name, None) for name in ("data", "val", "unlabelled", "teacher", "student")
    )
    return overrides_of(data, val, unlabelled, teacher, student, overrides(args))


def names(text: str) -> list[str]:
    """Splits a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def print_result(
    args: argparse.Namespace, result: Any, show: Callable[..., None], markdown: Callable[[Any], str] | None = None
) -> None:
    """Prints `result` as JSON with --json, as Markdown with --markdown, otherwise with `show`."""
    if args.json:
        print(json.dumps(result, indent=2))
    elif markdown and args.markdown:
        print(markdown(result), end="")
    else:
        from rich.console import Console

        show(result, Console(emoji=False))
