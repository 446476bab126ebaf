"""Names of recipe keys and Python parameters in messages, as the options of the command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from scalekd.common.errors import UserError

# options whose values have no recipe key
POSSIBLE = {
    "analysis", "annotations", "backbone", "baseline", "batch", "cache", "classes", "data", "device", "draws", "gpu",
    "gpus", "image_size", "images", "inference", "jobs", "kwargs", "known", "measure", "no_preflight", "out", "pictures", "random", "seeds",
    "share_teacher", "shots", "student", "students", "teacher", "teacher_outputs", "threshold", "val_limit", "workers",
}  # fmt: skip
OPTIONS = {"train": "data"}  # recipe keys whose option has another name
KEYS = re.compile(
    r"(?<![\w./-])(?:teacher\.(weights|prefix|kwargs|mean|std|image_size)|data\.(channels|limit|seed|train|val)"
    r"|augment\.(crop_pct))\b"
)
PARAMETER = re.compile(r"`([a-z_]+)`")
CALLED = {"analyses": "analysis", "baselines": "baseline", "preflight": "no_preflight"}  # parameter -> option


def with_options(message: str, args: argparse.Namespace) -> str:
    """`message` with the parameters of Python functions that it names in backticks as this command's options."""

    def shown(found: re.Match[str]) -> str:
        name = CALLED.get(found[1], found[1])
        return f"`{_option(name)}`" if name in POSSIBLE and hasattr(args, name) else found[0]

    return PARAMETER.sub(shown, message)


def as_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, for a command that has options in place of recipe keys: its errors name those."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise UserError(KEYS.sub(lambda key: _option(key[1] or key[2] or key[3]), str(error))) from None

    return call


def _option(name: str) -> str:
    return "--" + OPTIONS.get(name, name).replace("_", "-")
