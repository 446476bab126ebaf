"""Return types of the Python interface (`scalekd.api`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path
    top1: float | None
    """Top-1 accuracy of the exported student on the validation images, in %. For a student without a classifier,
    the accuracy of nearest neighbours in its features. None with sets of labels, whose figure is `metrics["map"]`."""
    metrics: dict[str, float]
    """All numbers in `summary`: top1, top5, best_top1, seconds, steps, ..."""
    student: Path
    """The exported student, a .safetensors file; its card, a .json file, is next to it."""
    report: Path
    summary: dict[str, Any]
    """The content of summary.json in `folder`."""


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a student: top-1 and top-5 accuracy in %, mean cross-entropy, number of images.

    With sets of labels, top1 and top5 are None, and mAP, macro and micro F1 at `threshold` (in %) and `classes` are set."""

    top1: float | None
    top5: float | None
    loss: float
    images: int
    data_description: dict[str, Any] = field(default_factory=dict)
    """What was evaluated on: images, classes, and what was left out."""
    map: float | None = None
    f1_macro: float | None = None
    f1_micro: float | None = None
    threshold: float | None = None
    """The probability from which on a class counts as predicted: that of the student's card."""
    classes: list[dict[str, Any]] = field(default_factory=list)
    """For each class with images: class, images, ap, precision, recall and f1 in %, the worst average precision first."""


@dataclass(frozen=True)
class Retrieval:
    """How well a student's embeddings find images of the same class, by cosine similarity."""

    figures: dict[str, float]
    """In %: recall_at_1, recall_at_5, recall_at_10, map_at_r, and knn, the accuracy of the 20 nearest images' vote."""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals over the queries: of mAP@R by bootstrap, of the others Wilson's."""
    queries: int
    left_out: int
    """Images that are not among the queries, because there is no image of their class to find."""
    gallery: int
    """Images that are searched."""
    in_both: int
    """Queries that are in a gallery of its own too; they do not find themselves."""
    skipped: dict[str, str] = field(default_factory=dict)
    """The images that cannot be read, and why."""
    data_description: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """The classes that a student sees in one image, the most probable first.

    A student of sets of labels sees the classes whose probability reaches the threshold, which may be none.
    """

    image: str
    """The file, or the archive and the file in it."""
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    """From 0 to 1, the softmax of the student's logits; with sets of labels their sigmoids."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of a student, in the order of the images."""

    images: list[Prediction]
    skipped: dict[str, str] = field(default_factory=dict)
    """The images that cannot be read, and why."""
    notes: list[str] = field(default_factory=list)
    """What seems wrong with the images, such as folders that are named for other classes."""
    threshold: float | None = None
    """With sets of labels, the probability from which on an image has a class."""


@dataclass(frozen=True)
class Embeddings:
    """The pooled features of images, in their order."""

    features: np.ndarray[Any, np.dtype[np.float32]]
    """(N, D) float32."""
    images: list[str]
    """N names: files, or archives and the files in them."""
    skipped: dict[str, str] = field(default_factory=dict)
    """The images that cannot be read, and why."""


@dataclass(frozen=True)
class Pushed:
    """A folder for the Hugging Face Hub."""

    repo: str
    files: dict[str, int]
    """Name -> size in bytes."""
    url: str | None
    """The page of the model; None if nothing was sent."""


@dataclass(frozen=True)
class Probe:
    """Accuracy of classifiers (linear, k nearest neighbours) on frozen features, by number of labelled images per class."""

    folder: Path
    results: dict[str, Any]
    """The content of results.json in `folder`: top-1, or mAP with sets of labels, in % of each model by number of labels,
    with intervals."""


@dataclass(frozen=True)
class Head:
    """A linear classifier fitted on a frozen teacher. Set `teacher.head` in a recipe to `folder` to use it."""

    folder: Path
    top1: float | None
    """Top-1 accuracy of the teacher with this head on the validation images, in %; None with sets of labels."""
    card: dict[str, Any]
    """The content of head.json in `folder`."""
    map: float | None = None
    """With sets of labels, the mAP on the validation images, in %."""


@dataclass(frozen=True)
class Comparison:
    """A comparison of methods, students and seeds."""

    folder: Path
    report: Path
    summary: dict[str, Any]
    """The content of summary.json in `folder`; `students` has the top-1, or with sets of labels the `map`,
    and the paired gain of every row."""
    failed: list[dict[str, Any]] = field(default_factory=list)
    """The runs that failed, with their errors."""


@dataclass(frozen=True)
class FormatFile:
    """A student for another runtime."""

    file: Path
    bytes: int
    ran: bool
    """Whether it was run here and compared."""
    about: str
    """What it was compared on, or why it was not run."""
    largest_difference: float | None = None
    """Of its logits from the student's."""
    student_top1: float | None = None
    """Top-1 accuracy of the student on the same images, in %."""
    top1: float | None = None
    agreement: float | None = None
    """Images with the student's class, in %; with sets of labels, answers that are equal at the threshold, one for each
    image and class."""
    student_map: float | None = None
    """With sets of labels, the student's mAP on the same images, in %."""
    map: float | None = None


@dataclass(frozen=True)
class Export:
    """Exported files."""

    student: Path
    top1: float | None
    """Top-1 accuracy of the exported checkpoint at its last validation, in %; None with sets of labels."""
    differences: dict[Path, float]
    """For each file, the largest absolute difference between its logits, and embeddings of an embedding head, and the
    student's."""
    onnx: Path | None = None
    formats: dict[str, FormatFile] = field(default_factory=dict)
    """The files for other runtimes, by name of the format."""
    map: float | None = None
    """With sets of labels, the checkpoint's mAP in %."""
    chosen_by: tuple[str, float] = ("top1", 0.0)
    """The metric that chooses the run's best checkpoint (`train.best_by`), and its value in % at this one."""


@dataclass(frozen=True)
class Quantized:
    """The int8 files of a student."""

    file: Path
    """student.int8.onnx in the run's folder."""
    way: str
    """How it was made: `qat` (trained with the teacher), `qat-labels` or `ptq` (calibrated); the first of them that there
    is."""
    rows: dict[str, dict[str, Any]]
    """For `float32` and each way: top1 (or map) and agreement with float32 in %, bytes, latency_ms by batch size, ..."""
    details: dict[str, Any]
    """The content of quantize.json in the run's folder."""


@dataclass(frozen=True)
class Report:
    """A report on disk."""

    path: Path
    left_out: list[str]
    """The parts that are missing from the report, and why."""


@dataclass(frozen=True)
class Cost:
    """The cost of one training step."""

    gmacs: float
    """Multiply-adds of a step, in billions per image."""
    memory_mb: float
    """Peak memory of a step in MB, counted rather than measured."""
    details: dict[str, Any]
    """The output of `scalekd cost --json`: parts, projectors, plain feature distillation for comparison, ratios."""


@dataclass(frozen=True)
class Plan:
    """Estimated time of a recipe, as intervals (low, high)."""

    hours: tuple[float, float]
    gpu_hours: tuple[float, float]
    runs: list[dict[str, Any]]
    """The output of `scalekd plan --json` for each run: the assistants', then the student's."""


@dataclass(frozen=True)
class Advice:
    """Which recipe and losses suit a situation, by comparisons that were measured."""

    recipe: str
    overrides: list[str]
    """For `train`, in addition to your own arguments."""
    command: str
    """The same as a command."""
    expected: dict[str, Any] | None
    """`gain` over no teacher in points of top-1, `ci95`, half of its 95 % interval, and `seeds`, in the comparison that is
    closest to your situation; None if nothing was measured."""
    reasons: list[str]
    details: dict[str, Any]
    """The output of `scalekd advise --json`."""


@dataclass(frozen=True)
class Method:
    """A distillation method that `losses` in a recipe can name."""

    name: str
    summary: str
    needs_teacher: bool
    needs_targets: bool
    options: dict[str, Any]
    """Option name -> default."""
