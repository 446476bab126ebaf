"""Hints in the errors of the command line: options that are keys of a recipe, and a missing recipe or ladder."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, get_args

if TYPE_CHECKING:
    from scalekd.common.sections import Section

WHICH = {
    "recipe": "name a shipped recipe (`scalekd recipes` lists them) or a YAML file, such as `scalekd {command} own-data`",
    "ladder": "name a shipped ladder (own-ladder, own-methods, ...) or a YAML file, such as `scalekd compare own-ladder`",
}


class Parser(argparse.ArgumentParser):
    """A parser whose error for a missing recipe or ladder says what to name. Sub-commands use it too."""

    def error(self, message: str) -> NoReturn:
        missing = message.partition("arguments are required: ")[2].split(", ")[0]
        if missing in WHICH:
            message += "; " + WHICH[missing].format(command=self.prog.removeprefix("scalekd "))
        super().error(message)


def key_hint(words: Sequence[str]) -> str:
    """`--epochs is a key of the recipe: write train.epochs=3 (without --); `, for the unknown options that are keys."""
    keys = list(_keys())
    hints = []
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        if not word.startswith("--") or not name[2:]:
            continue
        value = value if equals else following if following and not following.startswith("-") else "VALUE"
        wanted = name[2:].replace("-", "_")
        found = [key for key in keys if key == wanted] or [key for key in keys if key.split(".")[-1] == wanted]
        if found:
            texts = " or ".join(f"{key}={value}" for key in found[:4])
            hints.append(f"{name} is a key of the recipe: write {texts}; ")
    return "".join(hints)


def _keys() -> Iterator[str]:
    """All keys of a distillation recipe, such as `train.epochs`."""
    from scalekd.config.fields import Recipe

    for name, field in Recipe.model_fields.items():
        section = _section(field.annotation)
        yield from (f"{name}.{key}" for key in section.model_fields) if section else (name,)


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field holds; None for a plain value or a mapping."""
    from scalekd.common.sections import Section

    options = (annotation, *get_args(annotation)) if getattr(annotation, "__origin__", None) is not dict else ()
    return next((a for a in options if inspect.isclass(a) and issubclass(a, Section)), None)
