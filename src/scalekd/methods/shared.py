"""What the methods on stage maps share: a stage's map, and the check of the option `stages`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scalekd.models.stages import Features, Shapes


def check_features(student: Shapes, teacher: Shapes | None, alpha: float, reduction: str) -> Shapes:
    """The teacher, after the checks that every method with this distance makes. Raises ValueError."""
    if teacher is None:
        raise ValueError("a feature method needs a teacher")
    for model in (student, teacher):
        if model.final is None or len(model.maps) != 4:
            raise ValueError(f"a feature method needs maps and {model.model} gives logits only. Use kd")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be positive (to switch the method off, leave it out)")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it can be 'mean' or 'sum'")
    return teacher


def check_positions(student: Shapes, stages: Iterable[int]) -> None:
    """Attention over one position gives its value to every query: the projection would be the same vector everywhere,
    and nothing in it would tell one position from another. Raises ValueError."""
    for stage in stages:
        channels, height, width = stage_map(student, stage)
        if height * width == 1:
            raise ValueError(
                f"cross attention needs several positions, and {student.model}'s map of stage {stage} is 1x1 "
                f"({channels} channels).\nUse a larger data.image_size, or fd (projector linear or conv) or kd"
            )


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 at least: float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_logits(name: str, student: Shapes, teacher: Shapes | None, temperature: float = 1.0) -> None:
    """The checks of every method that compares the two models' logits. Raises ValueError."""
    if teacher is None:
        raise ValueError(f"{name} needs a teacher")
    if teacher.classes < 1:
        raise ValueError(
            f"{name}: the teacher {teacher.model} has no classifier. Fit one on your labels: `scalekd head`, or "
            "teacher.head=fit as the run starts; or use feature methods: scalekd, dfm, cap, fd"
        )
    if student.classes != teacher.classes:
        raise ValueError(
            f"{name}: {student.model} has {student.classes} classes and {teacher.model} {teacher.classes}. "
            "Use a teacher of the same classes, fit it a classifier for yours (`scalekd head`, or teacher.head=fit), or "
            "use feature methods: scalekd, dfm, cap, fd"
        )
    if not temperature > 0:
        raise ValueError(f"{name}: temperature is {temperature}; it must be positive")


def stage_map(model: Shapes | Features, stage: int) -> Any:
    """The map of stage 1 to 4, or its shape. Stage 4 is the one after the model's final norm."""
    return model.final if stage == 4 else model.maps[stage - 1]


def check_stages(method: str, stages: tuple[int, ...]) -> None:
    """Raises ValueError unless `stages` names some of the stages 1 to 4, each once."""
    if not stages or len(set(stages)) != len(stages) or not set(stages) <= {1, 2, 3, 4}:
        raise ValueError(f"{method}: stages is {list(stages)}; name each of the stages 1 to 4 once at most")


def pooled(model: Features) -> Tensor:
    """The final map averaged over its grid, `(B, D, H, W)` to `(B, D)`, in float32 at least.

    Of any family the same, also of a ViT that classifies from its class token.
    """
    assert model.final is not None
    return full_precision(model.final).mean(dim=(2, 3))
