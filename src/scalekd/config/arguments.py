"""Translates arguments of the Python functions into overrides of a recipe, `section.key=value`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from scalekd.common.errors import UserError


def overrides_of(
    data: Any,
    val: Any,
    unlabelled: Any,
    teacher: Any,
    student: Any,
    overrides: Sequence[str] = (),
    sections: Mapping[str, Any] | None = None,
) -> list[str]:
    """The overrides for the arguments of `scalekd.train`, which describes them. Later overrides take precedence.

    Raises `UserError` for a value that a recipe cannot hold.
    """
    named = {name: value for name, value in (("teacher", teacher), ("student", student)) if value is not None}
    whole = {name: value for name, value in named.items() if isinstance(value, Mapping)}
    texts = [] if isinstance(data, Mapping) or not data else list(_sources(fspath(data)))
    if isinstance(data, Mapping):
        whole = {"data": data} | whole
    texts += [f"data.{key}={json.dumps(fspath(v))}" for key, v in (("val", val), ("unlabelled", unlabelled)) if v]
    for name, value in named.items():
        if value is False:
            texts.append(f"{name}=null")
        elif name not in whole:
            texts.append(f"{name}.model={json.dumps(fspath(value))}")
            if name == "teacher":
                texts.append("teacher.weights=pretrained")
    return [*texts, *_assignments(whole), *_assignments(sections or {}), *overrides]


def _sources(data: str) -> Iterator[str]:
    from scalekd.data.sources.open import pair_of  # imports PIL and torch

    train, val = pair_of(data) or (data, None)
    yield f"data.train={json.dumps(train)}"
    yield f"data.val={json.dumps(val)}"


def _assignments(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _assignments(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value, default=_plain)}"


def _plain(value: Any) -> Any:
    if isinstance(value, PathLike):
        return fspath(value)
    raise UserError(f"a recipe can hold numbers, text, lists and mappings, not {type(value).__name__}")
