"""Base class of the recipes of all tasks: a model may be named by a folder."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from scalekd.common.sections import Section
from scalekd.models.weights.folder import with_folders


class AnyRecipe(Section):
    """A recipe in which a model section may name a folder, whose settings are then filled in."""

    @model_validator(mode="before")
    @classmethod
    def _folders_as_models(cls, values: Any) -> Any:
        return with_folders(values) if isinstance(values, dict) else values
