"""Evaluates the models of a report on images with sets of labels: mAP and F1, and a table by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.common.set_figures import SET_FIGURES, Scores, average_precisions, class_table, figures_of
from scalekd.distill.run import DistillationRun
from scalekd.models.inputs import scaled
from scalekd.models.normalised import Normalised

from .evaluate import MOST_IMAGES, MOST_SECONDS, STUDENT, TEACHER, compared
from .page import NONE, section, table
from .predictions import worst_and_best
from .svg import escape


@dataclass
class SeenSets:
    """The results. Keys of `figures` and `precisions`: STUDENT, TEACHER, and the labels of baselines."""

    images: int
    of_images: int
    threshold: float
    figures: dict[str, dict[str, float]]  # of each model, `figures_of`
    classes: list[dict[str, Any]]  # `class_table` of the student, with the teacher's `teacher_ap`
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def look_at_sets(
    run: DistillationRun,
    deployed: nn.Module,
    threshold: float | None,
    baselines: Mapping[str, Normalised] | None = None,
    *,
    most: int = MOST_IMAGES,
    seconds: float = MOST_SECONDS,
) -> SeenSets:
    """As `look`, for images with sets of labels; without maps and examples.

    threshold: of the student; by default, as for the others, the best on these images. Raises `UserError` if none of them
    has a label.
    """
    found = compared(run, deployed, baselines, most)
    logits: dict[str, list[Tensor]] = {label: [] for label in found.models}
    truth: list[Tensor] = []
    for batch in found.batches(run, seconds):
        pixels = scaled(batch.images.to(run.device))
        truth.append(batch.targets > 0.5)
        for label, models in found.models.items():
            each = [model.features(pixels, maps=False).logits.float() for model in models]
            logits[label].append(torch.stack(each).mean(0).cpu())
    if not any(part.any() for part in truth):
        count = sum(map(len, truth))
        raise UserError(
            f"none of the {count} validation images of the report has a label, so there is no mAP; raise `images` for more"
        )
    scores = {label: Scores(torch.cat(parts), torch.cat(truth)) for label, parts in logits.items()}
    figures = {label: figures_of(s, threshold if label == STUDENT else None) for label, s in scores.items()}
    rows = class_table(scores[STUDENT], run.classes, figures[STUDENT]["threshold"])
    if TEACHER in scores:
        precisions = dict(zip(run.classes, average_precisions(scores[TEACHER])))
        rows = [row | {"teacher_ap": 100 * precisions[row["class"]]} for row in rows]
    seen = len(scores[STUDENT].truth)
    return SeenSets(seen, len(run.val_images), figures[STUDENT]["threshold"], figures, rows, found.notes)


def set_sections(seen: SeenSets) -> list[str]:
    """The sections of the page: the models compared, and the classes."""
    count = f"{seen.images:,} of {seen.of_images:,}" if seen.images < seen.of_images else f"{seen.images:,}"
    note = f"On {count} validation images, the same for all models. {' '.join(seen.notes)}".rstrip()
    note += (
        f" The student predicts the classes whose probability is at least {seen.threshold:g}, the threshold with the largest "
        "macro F1 on the validation images; another model has the best one on these images. F1 is therefore somewhat better "
        "than on new images. mAP needs no threshold."
    )
    rows = [
        [label, *(f"{figures[key]:.2f}" for key in SET_FIGURES), f"{figures['threshold']:g}"]
        for label, figures in seen.figures.items()
    ]
    head = ["model", *(f"{name} (%)" for name in SET_FIGURES.values()), "threshold"]
    return [section("Sets of labels", table(head, rows, "numbers"), escape(note)), _classes(seen)]


def _classes(seen: SeenSets) -> str:
    shown, note = worst_and_best(seen.classes, "Sorted by average precision (AP), the worst first.")
    taught = TEACHER in seen.figures
    head = ["class", "images", "AP", "precision", "recall", "F1", *["teacher's AP"] * taught]
    rows = []
    for row in shown:
        rows.append(
            [row["class"], str(row["images"]), *class_cells(row), *[f"{row.get('teacher_ap', 0):.1f}"] * taught]
        )
    note += f" Precision, recall and F1 at threshold {seen.threshold:g}."
    return section("Classes (%)", table(head, rows, "numbers"), note)


def class_cells(row: Mapping[str, Any]) -> list[str]:
    """AP, precision, recall and F1 of a class, in %."""
    return [NONE if row[key] is None else f"{row[key]:.1f}" for key in ("ap", "precision", "recall", "f1")]


def set_numbers(seen: SeenSets) -> dict[str, Any]:
    """The data behind these sections, for report.json."""
    return {
        "images": seen.images,
        "of_images": seen.of_images,
        "notes": seen.notes,
        "threshold": seen.threshold,
        "figures": seen.figures,
        "classes": seen.classes,
    }
