"""Rebuilds a finished or unfinished run from its folder."""

from __future__ import annotations

from pathlib import Path

from scalekd.common.errors import UserError, first_line
from scalekd.common.yaml_file import parse_yaml
from scalekd.config.recipe import Config, check_config


def as_trained(recipe: Path) -> Config:
    try:
        text = recipe.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe} cannot be read: {first_line(error)}") from None
    return check_config(parse_yaml(text, str(recipe)), str(recipe))
