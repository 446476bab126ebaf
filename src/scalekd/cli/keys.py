"""Command-line options and the recipe keys they set."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from scalekd.common.errors import UserError
from scalekd.common.sections import Section, described

OPTIONS = {"train": "data"}  # a recipe's keys that the option is called otherwise; the others are called the same
KEYS = re.compile(
    r"(?<![\w./-])(?:teacher\.(weights|prefix|kwargs|mean|std|image_size)|data\.(channels|limit|seed|train|val))\b"
)


def parsed(section: type[Section], values: dict[str, Any]) -> Any:
    """`section` with these values, less those that are None. Raises `UserError` that names the options."""
    try:
        return section.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        lines = [line for e in error.errors() for line in described(dict(e), section)]
        told = (re.sub(r"^(?!model)[a-z_]+", lambda key: _option(key[0]), line) for line in lines)
        raise UserError("\n".join(told)) from None


def as_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, its errors naming this command's options where they name a recipe's keys."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise UserError(KEYS.sub(lambda key: _option(key[1] or key[2]), str(error))) from None

    return call


def _option(key: str) -> str:
    return "--" + OPTIONS.get(key, key).replace("_", "-")
