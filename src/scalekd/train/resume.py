"""Where a run stands, saved and found again: `last.pt`, and `previous.pt` in case that one is damaged."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from scalekd.common import parallel
from scalekd.common.errors import UserError, first_line
from scalekd.common.sections import Section, to_yaml, validated
from scalekd.common.yaml_file import parse_yaml

from . import checkpoint
from .log import RunLog
from .optim import load_state
from .run import Run


@dataclass
class Progress:
    """All of a run that is neither a weight nor the optimiser's; random numbers follow from seed and position."""

    step: int = 0
    best: float = -1.0  # of the first of the run's `figures`
    history: list[dict[str, Any]] = field(default_factory=list)  # of validations
    elapsed: float = 0.0  # seconds
    skipped: int = 0  # steps whose loss or gradient was not finite
    sums: dict[str, float] = field(default_factory=dict)  # of the losses since the last log line
    counted: int = 0  # the steps in them


def snapshot(run: Run, at: Progress) -> dict[str, Any]:
    """A checkpoint: separate entries for student, method parameters, optimiser and position."""
    return {
        **{name: part.state_dict() for name, part in run.parts.items()},
        "deployed": run.deployed.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "ema": run.ema.state_dict() if run.ema else None,
        "progress": asdict(at),
        "recipe": to_yaml(run.config),
    }


def save(run: Run, at: Progress, folder: Path) -> None:
    """Writes `last.pt`; the one before becomes `previous.pt`. Rank 0's work."""
    if parallel.rank() == 0:
        checkpoint.save(folder / "last.pt", snapshot(run, at), previous=folder / "previous.pt")


def restore(run: Run, folder: Path, log: RunLog) -> Progress:
    """Puts a run where its folder's newest whole checkpoint was; a fresh `Progress` if there is none.

    A damaged `last.pt` is moved to `last.pt.damaged`, and told. Raises `UserError` when all are damaged or are
    not this run's.
    """
    path = parallel.from_first(_newest_whole(folder, log) if parallel.rank() == 0 else None)
    if path is None:
        if (
            parallel.rank() == 0 and (folder / "log.jsonl").stat().st_size
        ):  # of a start that did not reach its first checkpoint
            log.event("resumed", step=0, checkpoint=None)
        return Progress()
    at = load_snapshot(run, checkpoint.load(Path(path)), path)
    log.event("resumed", step=at.step, checkpoint=Path(path).name)
    log.say(f"{log.label} goes on from step {at.step} of {run.total_steps}")
    return at


def _newest_whole(folder: Path, log: RunLog) -> str | None:
    last, previous = folder / "last.pt", folder / "previous.pt"
    try:
        if last.exists():
            checkpoint.load(last)
            return str(last)
    except UserError as error:
        if not previous.exists():
            raise
        checkpoint.load(previous)  # before anything is moved
        os.replace(last, folder / "last.pt.damaged")
        log.event("damaged", checkpoint=last.name, reason=str(error))
        log.say(f"{first_line(error)}; moved to last.pt.damaged")
    if not previous.exists():
        return None
    log.say(f"{log.label} uses the checkpoint before it, {previous}")
    return str(previous)


def load_snapshot(run: Run, state: dict[str, Any], name: str) -> Progress:
    """Loads a `snapshot`. Raises `UserError` for one of another recipe's run."""
    there = state.get("recipe")  # a checkpoint of an older version has none
    if there is not None and (difference := recipe_difference(str(there), run.config)):
        raise UserError(
            f"{name} is of another recipe's run (first difference: {difference}).\n"
            "Remove it to start this run anew, or put back a copy."
        )
    try:
        told = dict(state["progress"])
        told.setdefault("best", told.pop("best_top1", -1.0))  # as versions up to 0.1 named it
        at = TypeAdapter(Progress).validate_python(told)
        if not 0 <= at.step <= run.total_steps:
            raise ValueError(f"step {at.step} of {run.total_steps}")
        for part, module in run.parts.items():
            module.load_state_dict(state[part])
        load_state(run.optimizer, state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        if run.ema:
            run.ema.load_state_dict(state["ema"])
        return at
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name} is not of this recipe's run: {first_line(error)}\n"
            "Remove it to start this run anew, or put back a copy."
        ) from None


def recipe_difference(text: str, config: Section) -> str:
    """Where a run's recipe.yaml differs from `config`, or ''. What leaves the run the same may differ.

    Fields that an older version did not have are as they are by default.
    """
    try:
        before = to_yaml(
            _what_counts(validated(type(config), parse_yaml(text, "recipe.yaml"), "recipe.yaml"))
        ).splitlines()
    except UserError:  # of another version, perhaps
        before = text.splitlines()
    now = to_yaml(_what_counts(config)).splitlines()
    for a, b in zip(before, now):
        if a != b:
            return f"`{a.strip()}` there, `{b.strip()}` now"
    return "more lines in one than in the other" if len(before) != len(now) else ""


def _what_counts(config: Any) -> Any:
    # what becomes of bad images: a run that stopped at its first one has trained on none
    data = config.data.model_copy(update={"workers": 0, "on_bad_image": "error", "max_bad": 0.01})
    train = config.train.model_copy(update={"save_minutes": 0.0, "skip_nonfinite": 0})
    return config.model_copy(update={"data": data, "train": train, "track": ()})
