"""Saves and restores a run: `last.pt`, and `previous.pt` in case `last.pt` is damaged."""

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

OLD_EMA_POWER = 2 / 3  # of checkpoints that do not say it; their runs go on with the warm-up that they began with
REMEDY = "Delete it to start this run from the beginning, or restore a copy."


@dataclass
class Progress:
    """The state of a run besides weights and optimiser. Random numbers need none: they follow from seed and step."""

    step: int = 0
    best: float = -1.0  # of the metric that chooses best.pt
    history: list[dict[str, Any]] = field(default_factory=list)  # the validations
    elapsed: float = 0.0  # seconds
    skipped: int = 0  # steps whose loss or gradient was not finite
    sums: dict[str, float] = field(default_factory=dict)  # each loss summed since the last log line
    counted: int = 0  # steps in `sums`


def snapshot(run: Run, progress: Progress) -> dict[str, Any]:
    """The content of a checkpoint: an entry for each of `run.parts`, the deployed model, optimiser and progress."""
    return {
        **{name: part.state_dict() for name, part in run.parts.items()},
        "deployed": run.deployed.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "ema": run.ema.state_dict() if run.ema else None,
        "ema_power": run.ema.warmup_power if run.ema else None,
        "progress": asdict(progress),
        "recipe": to_yaml(run.config),
    }


def save(run: Run, progress: Progress, folder: Path) -> None:
    """Writes `last.pt` and keeps the old one as `previous.pt`. Only rank 0 writes."""
    if parallel.rank() == 0:
        checkpoint.save(folder / "last.pt", snapshot(run, progress), previous=folder / "previous.pt")


def restore(run: Run, folder: Path, log: RunLog) -> Progress:
    """Loads the newest intact checkpoint in `folder` into `run`. Returns a new `Progress` if there is none.

    A damaged `last.pt` is moved to `last.pt.damaged`, with a message. Raises `UserError` if all checkpoints are damaged
    or belong to another run.
    """
    path, state = _newest_intact(folder, log) if parallel.rank() == 0 else (None, None)
    path = parallel.from_first(path)
    if path is None:
        # an earlier start logged steps but did not reach its first checkpoint
        if parallel.rank() == 0 and (folder / "log.jsonl").stat().st_size:
            log.event("resumed", step=0, checkpoint=None)
        return Progress()
    progress = load_snapshot(run, state or checkpoint.load(Path(path)), path)
    log.event("resumed", step=progress.step, checkpoint=Path(path).name)
    log.say(f"{log.label} resumes from step {progress.step} of {run.total_steps}")
    if run.ema and run.ema.warmup_power == OLD_EMA_POWER:
        log.say(f"{log.label} keeps the warm-up of train.ema that it began with, 1 - s^(-2/3) in step s")
    return progress


def _newest_intact(folder: Path, log: RunLog) -> tuple[str | None, dict[str, Any] | None]:
    """The path of the newest checkpoint that can be read, and its content; None and None if there is none."""
    last, previous = folder / "last.pt", folder / "previous.pt"
    state = None
    try:
        if last.exists():
            return str(last), checkpoint.load(last)
    except UserError as error:
        if not previous.exists():
            raise
        state = checkpoint.load(previous)  # raises if it is damaged too, before anything is moved
        os.replace(last, folder / "last.pt.damaged")
        log.event("damaged", checkpoint=last.name, reason=str(error))
        log.say(f"{first_line(error)}; moved it to last.pt.damaged")
    if not previous.exists():
        return None, None
    log.say(f"{log.label} uses the previous checkpoint, {previous}")
    return str(previous), state


def load_snapshot(run: Run, state: dict[str, Any], name: str) -> Progress:
    """Loads a `snapshot` into `run`. name: its file, for messages. Raises `UserError` if it belongs to another run."""
    recipe = state.get("recipe")  # older versions did not store it
    if recipe is not None and (difference := recipe_difference(str(recipe), run.config)):
        raise UserError(f"{name} belongs to a run of another recipe (first difference: {difference}).\n{REMEDY}")
    try:
        values = dict(state["progress"])
        values.setdefault("best", values.pop("best_top1", -1.0))  # its name in versions up to 0.1
        progress = TypeAdapter(Progress).validate_python(values)
        if not 0 <= progress.step <= run.total_steps:
            raise ValueError(f"step {progress.step} of {run.total_steps}")
        built = [id(p) for p in run.model.parameters()]
        for part, module in run.parts.items():
            module.load_state_dict(state[part])
        if built != [id(p) for p in run.model.parameters()]:  # by a method, to load older weights for analyses
            raise ValueError(
                "`diffkd` had no norm after its last convolution in the version that wrote it; finish it there"
            )
        load_state(run.optimizer, state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        if run.ema:
            run.ema.load_state_dict(state["ema"])
            run.ema.warmup_power = float(state.get("ema_power", OLD_EMA_POWER))
        return progress
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{name} does not fit this recipe: {first_line(error)}\n{REMEDY}") from None


def recipe_difference(text: str, config: Section) -> str:
    """The first difference between a run's recipe.yaml, given as text, and `config`; '' if there is none.

    Ignores keys that may change on resume. Keys that an older version did not have get their defaults.
    """
    try:
        recipe = validated(type(config), parse_yaml(text, "recipe.yaml"), "recipe.yaml")
        if repr(_without_changeable(recipe).complete()) == repr(_without_changeable(config).complete()):
            return ""  # as most are; writing YAML takes longer
        before = to_yaml(_without_changeable(recipe)).splitlines()
    except UserError:  # perhaps written by another version
        before = text.splitlines()
    now = to_yaml(_without_changeable(config)).splitlines()
    for a, b in zip(before, now):
        if a != b:
            return f"`{a.strip()}` before, `{b.strip()}` now"
    return "one recipe has more lines than the other" if len(before) != len(now) else ""


def _without_changeable(config: Any) -> Any:
    """`config` with fixed values for the keys that may change when a run is resumed."""
    # on_bad_image and max_bad may change because a run that stops at a bad image has not trained on one
    data = config.data.model_copy(update={"workers": 0, "on_bad_image": "error", "max_bad": 0.01})
    changeable = {"save_minutes": 0.0, "skip_nonfinite": 0, "resume_anyway": (), "export": "last"}
    train = config.train.model_copy(update=changeable)
    return config.model_copy(update={"data": data, "train": train, "track": ()})
