"""What the functions of the Python interface return."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path
    top1: float
    """Top-1 accuracy of the exported student on the validation images, in %. Without a classifier: of its features'
    nearest neighbours."""
    metrics: dict[str, float]
    """All numbers of `summary`: top1, top5, best_top1, seconds, steps, ..."""
    student: Path
    """The exported student, a .safetensors file with its card beside it."""
    report: Path
    summary: dict[str, Any]
    """What summary.json in `folder` holds."""


@dataclass(frozen=True)
class Evaluation:
    """A student's figures on labelled images: top-1 and top-5 accuracy in %, mean cross-entropy, image count."""

    top1: float
    top5: float
    loss: float
    images: int


@dataclass(frozen=True)
class Probe:
    """What frozen features tell of classes, by number of labelled images per class."""

    folder: Path
    results: dict[str, Any]
    """What results.json in `folder` holds: for each model top-1 in % by number of labels, with intervals."""


@dataclass(frozen=True)
class Head:
    """A linear classifier that was fitted on a frozen teacher. A recipe names `folder` as `teacher.head`."""

    folder: Path
    top1: float
    """Of the teacher with this head on the validation images, in %."""
    card: dict[str, Any]
    """What head.json in `folder` holds."""


@dataclass(frozen=True)
class Comparison:
    """A comparison of methods, students and seeds."""

    folder: Path
    report: Path
    summary: dict[str, Any]
    """What summary.json in `folder` holds; `students` has top-1 and paired gains of every row."""
    failed: list[dict[str, Any]] = field(default_factory=list)
    """The runs that failed, with their errors."""


@dataclass(frozen=True)
class Export:
    """Exported files, each with the largest difference of its logits from the student's."""

    student: Path
    top1: float
    """Of the exported checkpoint at its last validation, in %."""
    differences: dict[Path, float]
    onnx: Path | None = None


@dataclass(frozen=True)
class Report:
    """A written page."""

    path: Path
    left_out: list[str]
    """What could not be shown, and why."""


@dataclass(frozen=True)
class Cost:
    """What one training step costs."""

    gmacs: float
    """Multiply-adds of a step, in billions an image."""
    memory_mb: float
    """Peak memory of a step, counted."""
    details: dict[str, Any]
    """What `scalekd cost --json` prints: parts, projectors, plain feature distillation beside it, ratios."""


@dataclass(frozen=True)
class Plan:
    """How long a recipe takes. Intervals are (low, high)."""

    hours: tuple[float, float]
    gpu_hours: tuple[float, float]
    runs: list[dict[str, Any]]
    """For each run (an assistant's, then the student's) what `scalekd plan --json` prints."""


@dataclass(frozen=True)
class Method:
    """A distillation method, as `losses` of a recipe names it."""

    name: str
    summary: str
    needs_teacher: bool
    needs_targets: bool
    options: dict[str, Any]
    """Option name -> default."""
