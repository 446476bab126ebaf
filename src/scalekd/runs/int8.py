"""Compares students in different formats on the same images, and finishes a quantised run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.common.set_figures import Scores, map_change, mean_average_precision
from scalekd.data.batches import Batch
from scalekd.distill.run import DistillationRun
from scalekd.models.inputs import card_statistics, scaled
from scalekd.models.int8.fake import FakeQuantised
from scalekd.models.int8.file import INT8, int8_of, unrounded, write_int8
from scalekd.models.open_student import OnnxStudent

from .quantized_recipe import LABELS, TEACHER

CHECKED = 256  # validation images on which an int8 file is compared with the student that was trained


@dataclass
class Answers:
    """What a model gave for some images, beside what the first model gave."""

    images: int = 0
    labelled: int = 0
    right: int = 0
    same: int = 0  # the same class as the first model; with sets of labels, answers that are the same
    compared: int = 0  # images; with sets of labels, answers: one for each image and class
    lost: int = 0  # right in the first model, wrong here
    won: int = 0
    largest_difference: float = 0.0  # of logits
    squares: float = 0.0  # sum of the squared differences of logits
    finite: bool = True
    logits: list[Tensor] = field(default_factory=list)  # with sets of labels, of the labelled images
    figures: dict[str, float] = field(
        default_factory=dict
    )  # top1 or map, change and change_interval; {} without labels

    @property
    def agreement(self) -> float:
        """Images with the first model's class, in %; with sets of labels, equal answers at the threshold."""
        return 100 * self.same / self.compared

    @property
    def figure(self) -> float | None:
        """Top-1, or mAP with sets of labels, in %; None without labels."""
        return self.figures.get("map", self.figures.get("top1"))

    def row(self) -> dict[str, Any]:
        """Accuracy and agreement in %, with the half width of the 95 % interval of the paired difference."""
        row: dict[str, Any] = {"images": self.images, "agreement": self.agreement}
        return row | self.figures | {"largest_difference": self.largest_difference}


@torch.inference_mode()
def compare_answers(
    models: Mapping[str, nn.Module], batches: Iterable[Batch], mean: Tensor, std: Tensor, threshold: float | None = None
) -> dict[str, Answers]:
    """The answers of every model on the same images; the first one is the reference. All run on the CPU.

    threshold: with sets of labels, the probability from which on an image has a class.

    Raises `UserError` if no image can be read, or the reference gives numbers that are not finite.
    """
    found = {name: Answers() for name in models}
    truth = []
    for batch in batches:
        images = (scaled(batch.images) - mean) / std
        first = None
        for name, model in models.items():
            logits = model(images).float()
            first = logits if first is None else first
            _add(found[name], logits, first)
            if threshold is None:
                _add_classes(found[name], logits, first, batch.targets)
            else:
                _add_sets(found[name], logits, first, len(batch.targets), threshold)
        truth.append(batch.targets)
    if not all(answers.images for answers in found.values()):
        raise UserError("`data`: none of the images can be read")
    if not next(iter(found.values())).finite:
        raise UserError("the student's outputs are not finite: its run diverged or its file is damaged; train it again")
    if threshold is None:
        for answers in found.values():
            _top1(answers)
    elif any(targets.any() for targets in truth):
        has = torch.cat([targets for targets in truth if len(targets)]) > 0.5
        scores = {name: Scores(torch.cat(answers.logits), has) for name, answers in found.items()}
        before = next(iter(scores.values()))
        for name, answers in found.items():
            change, interval = map_change(scores[name], before)
            mean_precision = mean_average_precision(scores[name])
            answers.figures = {"map": mean_precision, "change": change, "change_interval": interval}
    return found


def _add(answers: Answers, logits: Tensor, first: Tensor) -> None:
    answers.images += len(logits)
    answers.finite &= bool(logits.isfinite().all())
    answers.largest_difference = max(answers.largest_difference, (logits - first).abs().max().item())
    answers.squares += (logits - first).square().sum().item()


def _add_sets(answers: Answers, logits: Tensor, first: Tensor, labelled: int, threshold: float) -> None:
    answers.compared += logits.numel()
    answers.same += int(((logits.sigmoid() >= threshold) == (first.sigmoid() >= threshold)).sum())
    if labelled:
        answers.logits.append(logits[:labelled].cpu())


def _add_classes(answers: Answers, logits: Tensor, first: Tensor, targets: Tensor) -> None:
    chosen, reference = logits.argmax(1), first.argmax(1)
    answers.compared += len(logits)
    answers.same += int((chosen == reference).sum())
    right, before = chosen[: len(targets)] == targets, reference[: len(targets)] == targets
    answers.labelled += len(targets)
    answers.right += int(right.sum())
    answers.lost += int((before & ~right).sum())
    answers.won += int((right & ~before).sum())


def _top1(answers: Answers) -> None:
    """Sets the accuracy in %, and its paired change with the half width of its 95 % interval."""
    if n := answers.labelled:
        change = (answers.won - answers.lost) / n
        spread = math.sqrt(max(0.0, (answers.won + answers.lost) / n - change**2) / n)
        figures = {"top1": 100 * answers.right / n, "change": 100 * change, "change_interval": 100 * 1.96 * spread}
        answers.figures = figures


def threshold_of(card: Mapping[str, Any]) -> float | None:
    """The threshold of a student of sets of labels; None for one class per image. Raises `UserError` if its card has none."""
    if not card.get("multi_label"):
        return None
    if card.get("threshold") is None:
        raise UserError("the student's card has no `threshold`, because its run has not ended; finish it, or export it")
    return float(card["threshold"])


def finish_quantised(run: DistillationRun, folder: Path, card: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Writes the int8 file of a finished quantised run.

    Returns the plain student with its weights before rounding, and how far the file's logits are from those of the
    student that was trained, on validation images.
    """
    student = run.deployed
    assert isinstance(student, FakeQuantised)
    where, file = folder / "student.json", folder / INT8
    quantised = {"way": TEACHER if run.config.all_teachers else LABELS, "of": run.loaded["student"].sha256}
    write_int8(int8_of(student, card, where, run.config.student.cuts), file, card | {"quantized": quantised})
    device = torch.device("cpu")
    student.put_on(device)
    models = {"trained": student, "file": OnnxStudent(file, device)}
    batches = run.eval_batches(64, 0)
    statistics = card_statistics(card, device)
    seen = compare_answers(models, _first(batches, CHECKED), *statistics, threshold_of(card))["file"]
    student.put_on(run.device)
    agreement = {
        "images": seen.images,
        "same_labels" if card.get("multi_label") else "same_class": seen.agreement,
        "largest_difference": seen.largest_difference,
    }
    return unrounded(student, card, where), agreement


def _first(batches: Iterable[Batch], images: int) -> Iterable[Batch]:
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch.images)
        if seen >= images:
            break
