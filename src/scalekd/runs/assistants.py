"""A student as the next teacher: a recipe's `assistant` is trained first, and then teaches the student.

Teacher assistants: Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant, AAAI 2020 (arXiv:1902.03393).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.files import is_file
from scalekd.config.assistants import taught_by, taught_by_untrained
from scalekd.config.recipe import Config, assistant_of
from scalekd.distill.build import build
from scalekd.train.resume import recipe_difference

from .distillation import checked, execute
from .heads import heads_aside, with_heads


def folder_of_assistant(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-assistant")


def train_chain(config: Config, folder: Path, device: torch.device, console: Console, **options: Any) -> dict[str, Any]:
    """`execute`, after the same for the recipe's assistant and its assistant's, each in a folder beside.

    What is finished is not run again, so the same call goes on where it stopped. Before an assistant is trained, the
    student is built with an untrained one, so that what does not fit is told first. options: of `execute`.
    Raises what `execute` raises.
    """
    if config.assistant is None:
        return execute(config, folder, device, console, **options)
    there = folder_of_assistant(folder)
    if not _finished(config, there):
        if is_file(folder / "recipe.yaml"):
            raise UserError(f"{folder} holds a run, and its assistant's in {there} is not finished; give another --out")
        rehearse(config, device)
        train_chain(assistant_of(config), there, device, console, **options)
        parallel.wait_for_all()  # the first process wrote its student
    elif parallel.rank() == 0:
        console.print(f"{there} is finished: it teaches {config.name}", highlight=False, markup=False, soft_wrap=True)
    return execute(taught_by(config, there), folder, device, console, **options)


def check_chain(config: Config, device: torch.device, console: Console) -> None:
    """The pre-flight of the run that comes first, and the others built. Writes nothing. Raises `UserError`."""
    while config.assistant is not None:
        rehearse(config, device)
        config = assistant_of(config)
    with heads_aside(config, device, console) as config:
        checked(config, device, console)


def rehearse(config: Config, device: torch.device) -> None:
    """Builds the student's run with an assistant that knows nothing. Raises `UserError` for what does not fit."""
    try:
        build(taught_by_untrained(config), device)
    except UserError as error:
        raise UserError(f"the student does not fit its assistant: {error}") from None


def _finished(config: Config, there: Path) -> bool:
    """Whether the assistant's run is there and at its end. Raises `UserError` if it is another recipe's."""
    recipe = there / "recipe.yaml"
    if not is_file(there / "summary.json") or not is_file(recipe):
        return False
    assistant = assistant_of(config)
    if assistant.assistant is not None:
        assistant = taught_by(assistant, folder_of_assistant(there))
    if difference := recipe_difference(recipe.read_text(), with_heads(assistant, there)):
        raise UserError(
            f"{there} holds another assistant's run (first difference: {difference}). Remove it, or give another --out"
        )
    return True
