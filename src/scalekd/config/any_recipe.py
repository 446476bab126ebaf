"""What the recipes of all tasks have in common."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from scalekd.common.sections import Section
from scalekd.models.weights.folder import with_folders


class AnyRecipe(Section):
    @model_validator(mode="before")
    @classmethod
    def _folders_as_models(cls, values: Any) -> Any:
        return with_folders(values) if isinstance(values, dict) else values
