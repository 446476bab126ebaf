"""Trains a recipe's `assistant` first, and then the student with the assistant as its teacher.

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
from scalekd.common.text import say
from scalekd.config.assistants import taught_by, taught_by_untrained
from scalekd.config.recipe import Config, assistant_of
from scalekd.distill.build import build
from scalekd.train.hardware import for_device
from scalekd.train.resume import recipe_difference

from .distillation import check_teacher_outputs, checked, execute
from .heads import heads_aside, with_heads


def folder_of_assistant(folder: Path) -> Path:
    """The folder of the assistant's run, next to `folder`."""
    return folder.with_name(f"{folder.name}-assistant")


def train_chain(config: Config, folder: Path, device: torch.device, console: Console, **options: Any) -> dict[str, Any]:
    """Runs the recipe's assistant (and the assistant's own assistant, if it has one), then the recipe itself.

    Each assistant has its own folder next to `folder`. Finished runs are not repeated, so the same call resumes.
    Before an assistant is trained, the student is built with an untrained one, to find errors early.

    options: as for `execute`. Raises what `execute` raises.
    """
    if config.assistant is None:
        return execute(config, folder, device, console, **options)
    check_teacher_outputs(config, options.get("teacher_outputs"))
    assistant = folder_of_assistant(folder)
    if not assistant_finished(config, assistant, device):
        if is_file(folder / "recipe.yaml"):
            raise UserError(
                f"{folder} holds a run, but the run of its assistant in {assistant} is not finished; "
                "choose another folder with `out`"
            )
        rehearse(config, device)
        train_chain(assistant_of(config), assistant, device, console, **options)
        parallel.wait_for_all()  # until the first process has written the assistant's weights
    elif parallel.rank() == 0:
        say(console, f"{assistant} is finished and teaches {config.name}")
    return execute(taught_by(config, assistant), folder, device, console, **options)


def check_chain(config: Config, device: torch.device, console: Console) -> None:
    """For a dry run: builds every run of the chain, and runs the pre-flight of the first. Raises `UserError`."""
    while config.assistant is not None:
        rehearse(config, device)
        config = assistant_of(config)
    with heads_aside(config, device, console) as config:
        checked(config, device, console)


def rehearse(config: Config, device: torch.device) -> None:
    """Builds the student's run with an untrained assistant. Raises `UserError` if they do not fit."""
    try:
        build(taught_by_untrained(config), device)
    except UserError as error:
        raise UserError(f"the student does not fit its assistant: {error}") from None


def assistant_finished(config: Config, folder: Path, device: torch.device) -> bool:
    """Whether `folder` holds the finished run of the recipe's assistant. Raises `UserError` if it holds another's."""
    recipe = folder / "recipe.yaml"
    if not is_file(folder / "summary.json") or not is_file(recipe):
        return False
    assistant = assistant_of(config)
    if assistant.assistant is not None:
        assistant = taught_by(assistant, folder_of_assistant(folder))
    if difference := recipe_difference(recipe.read_text(), with_heads(for_device(assistant, device, folder), folder)):
        raise UserError(
            f"{folder} holds the run of another assistant (first difference: {difference}).\n"
            "Remove it, or choose another folder with `out`."
        )
    return True
