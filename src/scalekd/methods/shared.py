"""What methods share: checks of their options and models, stage maps, pooled features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scalekd.models.stages import Features, Shapes


def check_features(student: Shapes, teacher: Shapes | None) -> Shapes:
    """The teacher. Raises ValueError if there is none, or if one of the models has no stage maps."""
    if teacher is None:
        raise ValueError("a feature method needs a teacher")
    for model in (student, teacher):
        if model.final is None or len(model.maps) != 4:
            raise ValueError(f"a feature method needs stage maps and {model.model} gives logits only. Use kd")
    return teacher


def check_positive(method: str, **options: float) -> None:
    """Raises ValueError unless all options are positive."""
    for name, value in options.items():
        if not value > 0:
            remedy = "; to switch the method off, remove it from the losses" if name == "alpha" else ""
            raise ValueError(f"{method}: {name} is {value} and must be positive{remedy}")


def check_weights(method: str, **weights: float) -> None:
    """Raises ValueError unless no weight is negative and at least one is positive."""
    if not (all(weight >= 0 for weight in weights.values()) and sum(weights.values()) > 0):
        values = " and ".join(f"{name} is {weight}" for name, weight in weights.items())
        raise ValueError(f"{method}: {values}; none may be negative, and one must be positive")


def check_choice(method: str, option: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{method}: {option} is {value!r}; choose from {', '.join(map(repr, choices))}")


def check_stages(method: str, stages: tuple[int, ...]) -> None:
    """Raises ValueError unless `stages` contains some of the stages 1 to 4, each at most once."""
    if not stages or len(set(stages)) != len(stages) or not set(stages) <= {1, 2, 3, 4}:
        raise ValueError(f"{method}: stages is {list(stages)}; use some of the stages 1 to 4, each at most once")


def check_positions(student: Shapes, stages: Iterable[int]) -> None:
    """Raises ValueError if the student's map of one of the stages has a single position.

    Attention over one position returns its value for every query, so the projected map would be the same vector at all
    positions.
    """
    for stage in stages:
        channels, height, width = stage_map(student, stage)
        if height * width == 1:
            raise ValueError(
                f"cross attention needs several positions, and {student.model}'s map of stage {stage} is 1x1 "
                f"({channels} channels).\nUse a larger data.image_size, or fd (projector linear or conv) or kd"
            )


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32; float64 is kept."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_logits(name: str, student: Shapes, teacher: Shapes | None, temperature: float = 1.0) -> None:
    """Raises ValueError unless the two models have the same number of classes and `temperature` is positive."""
    if teacher is None:
        raise ValueError(f"{name} needs a teacher")
    if teacher.classes < 1:
        raise ValueError(
            f"{name}: the teacher {teacher.model} has no classifier. Fit one on your labels, with `scalekd head` or "
            "teacher.head=fit, or use feature methods: scalekd, dfm, cap, fd"
        )
    if student.classes != teacher.classes:
        raise ValueError(
            f"{name}: {student.model} has {student.classes} classes and {teacher.model} {teacher.classes}. Use a teacher "
            "with the same classes, fit it a classifier for yours (`scalekd head`, or teacher.head=fit), or use feature "
            "methods: scalekd, dfm, cap, fd"
        )
    check_positive(name, temperature=temperature)


def stage_map(model: Shapes | Features, stage: int) -> Any:
    """The map of a stage from 1 to 4, or its shape `(channels, height, width)`. Stage 4 is after the final norm."""
    return model.final if stage == 4 else model.maps[stage - 1]


def pooled(model: Features) -> Tensor:
    """The final map averaged over its grid, `(B, D)`, in float32 or float64.

    This is the same for all families, even for a ViT that classifies from its class token.
    """
    assert model.final is not None
    return full_precision(model.final).mean(dim=(2, 3))
