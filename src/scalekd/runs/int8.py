"""Compares students in different formats on the same images, and finishes a quantised run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError
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
    same: int = 0  # the same class as the first model
    lost: int = 0  # right in the first model, wrong here
    won: int = 0
    largest_difference: float = 0.0  # of logits
    squares: float = 0.0  # sum of the squared differences of logits
    finite: bool = True

    @property
    def top1(self) -> float | None:
        return 100 * self.right / self.labelled if self.labelled else None

    def row(self) -> dict[str, Any]:
        """Accuracy and agreement in %, with the half width of the 95 % interval of the paired difference."""
        row: dict[str, Any] = {"images": self.images, "agreement": 100 * self.same / self.images}
        if self.labelled:
            n, change = self.labelled, (self.won - self.lost) / self.labelled
            spread = math.sqrt(max(0.0, (self.won + self.lost) / n - change**2) / n)
            row |= {"top1": self.top1, "change": 100 * change, "change_interval": 100 * 1.96 * spread}
        return row | {"largest_difference": self.largest_difference}


@torch.inference_mode()
def compare_answers(
    models: Mapping[str, nn.Module], batches: Iterable[Batch], mean: Tensor, std: Tensor
) -> dict[str, Answers]:
    """The answers of every model on the same images; the first one is the reference. All run on the CPU.

    Raises `UserError` if no image can be read, or the reference gives numbers that are not finite.
    """
    found = {name: Answers() for name in models}
    for batch in batches:
        images = (scaled(batch.images) - mean) / std
        first = None
        for name, model in models.items():
            logits = model(images).float()
            first = logits if first is None else first
            _add(found[name], logits, first, batch.targets)
    if not all(answers.images for answers in found.values()):
        raise UserError("`data`: none of the images can be read")
    if not next(iter(found.values())).finite:
        raise UserError("the student's outputs are not finite: its run diverged or its file is damaged; train it again")
    return found


def _add(answers: Answers, logits: Tensor, first: Tensor, targets: Tensor) -> None:
    chosen, reference = logits.argmax(1), first.argmax(1)
    answers.images += len(logits)
    answers.same += int((chosen == reference).sum())
    answers.finite &= bool(logits.isfinite().all())
    answers.largest_difference = max(answers.largest_difference, (logits - first).abs().max().item())
    answers.squares += (logits - first).square().sum().item()
    right, before = chosen[: len(targets)] == targets, reference[: len(targets)] == targets
    answers.labelled += len(targets)
    answers.right += int(right.sum())
    answers.lost += int((before & ~right).sum())
    answers.won += int((right & ~before).sum())


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
    seen = compare_answers(models, _first(batches, CHECKED), *card_statistics(card, device))["file"]
    student.put_on(run.device)
    agreement = {
        "images": seen.images,
        "same_class": 100 * seen.same / seen.images,
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
