"""Recipes with an assistant: a student that is trained first and is then the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .losses import reads_logits
from .recipe import Config, assistant_of, check_config


def taught_by(config: Config, run: Path) -> Config:
    """The recipe with the student of the finished run in folder `run` as its teacher. Raises `UserError`."""
    return _with_teacher(config, {"model": str(run), "cuts": assistant_of(config).student.cuts})


def taught_by_untrained(config: Config) -> Config:
    """The recipe with an untrained assistant as its teacher, to check it before the assistant exists. Raises `UserError`."""
    assistant = assistant_of(config)
    teacher = assistant.student.model_dump(mode="json", include={"model", "kwargs", "mean", "std", "cuts"})
    teacher |= {"weights": "random", "image_size": assistant.data.image_size}
    if not any(map(reads_logits, assistant.losses)):
        teacher["kwargs"] |= {"num_classes": 0}
    return _with_teacher(config, teacher)


def _with_teacher(config: Config, teacher: dict[str, Any]) -> Config:
    values = config.model_dump(mode="json", exclude={"assistant", "teachers"})
    return check_config(values | {"teacher": teacher}, config.name)


def chained(config: Config) -> list[Config]:
    """The recipes that `scalekd train` runs for this one, assistants first. Each has an untrained assistant as teacher."""
    if config.assistant is None:
        return [config]
    return [*chained(assistant_of(config)), taught_by_untrained(config)]
