"""A run, described: YAML recipe + `key=value` overrides -> `Config`, with all errors told at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import (
    model_validator,
)

from scalekd.common.errors import UserError
from scalekd.common.sections import validated

from .fields import Recipe
from .files import merged, override, recipe_values
from .misfits import misfits


class Config(Recipe):
    """A distillation recipe whose sections fit together."""

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        problems = misfits(self)
        if self.assistant is not None and not problems:
            problems += _assistant_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _assistant_problems(config: Config) -> list[str]:
    if not config.all_teachers:
        return ["assistant: it needs a teacher itself; name one, or leave it out"]
    if chosen := [name for name, options in config.losses.items() if "teachers" in options]:
        return [f"losses.{chosen[0]}.teachers: the student's teacher is the assistant; say that in assistant.losses"]
    try:
        assistant_of(config)
    except UserError as error:
        return [f"assistant: {line.removeprefix('  - ')}" for line in str(error).splitlines()[1:]] or [str(error)]
    return []


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """A shipped recipe's name or a YAML file, with `section.key=value` overrides (values are YAML).

    Raises `UserError` that lists every problem, each with the nearest valid name.
    """
    values = recipe_values(recipe)
    for text in overrides:
        override(values, text)
    return check_config(values, recipe)


def check_config(values: dict[str, Any], where: str) -> Config:
    """Validates plain values; `UserError` with all problems at once. Models named by a folder are written out."""
    return validated(Config, values, where)


def assistant_of(config: Config) -> Config:
    """The recipe of a recipe's assistant: the recipe itself with what `assistant` says in its place. Raises `UserError`."""
    values = config.model_dump(mode="json", exclude={"assistant"}) | {"name": f"{config.name}-assistant"}
    return check_config(merged(values, config.assistant or {}), "assistant")
