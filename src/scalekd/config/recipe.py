"""`Config`, a complete and valid distillation recipe, from a YAML recipe and `key=value` overrides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import (
    model_validator,
)

from scalekd.common.errors import UserError
from scalekd.common.sections import validated

from .cross_checks import cross_checks
from .fields import Recipe
from .recipe_files import merged, override, recipe_values


class Config(Recipe):
    """A distillation recipe whose sections are compatible with each other. Validation reports all errors together."""

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        problems = cross_checks(self)
        if self.assistant is not None and not problems:
            problems += _assistant_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _assistant_problems(config: Config) -> list[str]:
    """One line per problem of the assistant's recipe."""
    if not config.all_teachers:
        return ["assistant: needs a teacher to learn from; set `teacher`, or remove the assistant"]
    if chosen := [name for name, options in config.losses.items() if "teachers" in options]:
        return [
            f"losses.{chosen[0]}.teachers: the student's only teacher is the assistant; set this in assistant.losses"
        ]
    try:
        assistant_of(config)
    except UserError as error:
        return [f"assistant: {line.removeprefix('  - ')}" for line in str(error).splitlines()[1:]] or [str(error)]
    return []


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """Loads a recipe.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `section.key=value`, applied in order. Values are parsed as YAML.

    Raises:
        UserError: lists all problems, with the nearest valid name for each unknown one.
    """
    values = recipe_values(recipe)
    for text in overrides:
        override(values, text)
    return check_config(values, recipe)


def check_config(values: dict[str, Any], where: str) -> Config:
    """Validates plain values; `where` names them in errors. The settings of models named by a folder are filled in.

    Raises `UserError` that lists all problems.
    """
    return validated(Config, values, where)


def assistant_of(config: Config) -> Config:
    """The recipe of the assistant: this recipe updated with the values of `assistant`. Raises `UserError`."""
    values = config.model_dump(mode="json", exclude={"assistant"}) | {"name": f"{config.name}-assistant"}
    return check_config(merged(values, config.assistant or {}), "assistant")
