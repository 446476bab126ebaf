"""Rewrites error messages for the command line: recipe keys and Python parameters become its options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from scalekd.common.errors import UserError

# parameters of the Python functions that have an option but no recipe key
POSSIBLE = {
    "analysis", "annotations", "backbone", "baseline", "batch", "cache", "classes", "csv", "data", "device", "draws", "format",
    "dry_run", "gallery", "gpu", "jsonl", "private", "qat", "qat_labels", "sheet", "top",
    "gpus", "image_size", "images", "inference", "jobs", "kwargs", "known", "measure", "no_preflight", "out", "pictures", "random", "seeds",
    "share_teacher", "shots", "student", "students", "teacher", "teacher_outputs", "threshold", "together", "val_limit", "workers",
}  # fmt: skip
OPTIONS = {"train": "data"}  # recipe key -> option, where the names differ
KEYS = re.compile(
    r"(?<![\w./-])(?:teacher\.(weights|prefix|kwargs|mean|std|image_size)|data\.(channels|limit|seed|train|val)"
    r"|augment\.(crop_pct))\b"
)
PARAMETER = re.compile(r"Did you mean [^?]*\?|`([a-z_]+)`")  # suggestions stay as they are
CALLED = {
    "analyses": "analysis",
    "baselines": "baseline",
    "formats": "format",
    "preflight": "no_preflight",
}  # parameter -> option


def with_options(message: str, args: argparse.Namespace) -> str:
    """`message` with parameter names in backticks replaced by this command's options: "`out`" becomes "`--out`"."""

    def replaced(match: re.Match[str]) -> str:
        name = CALLED.get(match[1] or "", match[1] or "")
        return f"`{_option(name)}`" if name in POSSIBLE and hasattr(args, name) else match[0]

    return PARAMETER.sub(replaced, message)


def as_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for a command with options instead of recipe keys: its errors name the options."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise UserError(KEYS.sub(lambda key: _option(key[1] or key[2] or key[3]), str(error))) from None

    return call


def _option(name: str) -> str:
    return "--" + OPTIONS.get(name, name).replace("_", "-")
