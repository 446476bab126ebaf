"""Figures of answers to sets of labels: mAP, F1 at a threshold that is chosen on them, and a table by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from scalekd.common.text import printable

SET_FIGURES = {"map": "mAP", "f1_macro": "macro F1", "f1_micro": "micro F1"}
LONGEST = 32  # characters of a class name in a table
MOST_CLASSES = 30  # lines of a table
THRESHOLDS = torch.arange(1, 100, dtype=torch.float64) / 100


class Scores(NamedTuple):
    """What a model says of some images, on the CPU."""

    logits: Tensor  # (N, classes) float32
    truth: Tensor  # (N, classes) bool


class Counts(NamedTuple):
    """For each threshold and class, (thresholds, classes) float64."""

    right: Tensor  # images with the class whose probability is at least the threshold
    found: Tensor  # images whose probability is at least the threshold
    images: Tensor  # images with the class


def figures_of(scores: Scores, threshold: float | None = None) -> dict[str, float]:
    """{"map": %, "f1_macro": %, "f1_micro": %, "threshold", "loss": nats, "images": count}.

    mAP is the mean of the average precisions of the classes; it and macro F1 leave out classes that no image has. The
    loss is the binary cross entropy, averaged over classes and images.

    threshold: at or above this probability a class counts as predicted. By default that of `best_threshold`.
    """
    chosen = best_threshold(scores) if threshold is None else threshold
    macro, micro = (figure.item() for figure in f1_of(counts_at(scores, torch.tensor([chosen]).double())))
    truth = scores.truth.double()
    loss = nn.functional.binary_cross_entropy_with_logits(scores.logits.double(), truth).item()
    return {
        "map": mean_average_precision(scores),
        "f1_macro": 100 * macro,
        "f1_micro": 100 * micro,
        "threshold": chosen,
        "loss": loss,
        "images": len(truth),
    }


def mean_average_precision(scores: Scores) -> float:
    """mAP in %, over the classes that an image has."""
    return 100 * float(np.nanmean(average_precisions(scores)))


def average_precisions(scores: Scores) -> list[float]:
    """The average precision of each class, in [0, 1]; NaN for a class that no image has."""
    logits, truth = scores.logits.numpy(), scores.truth.numpy()
    return [average_precision(logits[:, c], truth[:, c]) for c in range(truth.shape[1])]


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """The mean over the positives of the precision among all images that score at least as high as the positive.

    This is the sum over thresholds of (the gain in recall) x (the precision), without interpolation, so equal scores
    count as one threshold and the order of the images has no influence.

    Args:
        scores: (N,).
        truth: (N,) bool. NaN is returned if all are False.
    """
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], truth[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)  # last image of each threshold
    right = np.cumsum(hits)[ends]
    gains = np.diff(right, prepend=0)
    return float((gains * right / (ends + 1)).sum() / truth.sum())


def precision_influences(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The derivatives of `average_precision` in the weights of the images, (N,), at weight 1 each. Their sum is 0.

    With p_i the precision among the N_i images that score at least as high as positive i, and P positives, that of image j is
    [y_j * (p_j - AP) + the sum over the positives i that score at most as high as j of (y_j - p_i) / N_i] / P.

    Args:
        scores: (N,).
        truth: (N,) bool. At least one is True.
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], truth[order].astype(np.float64)
    first = np.searchsorted(-ordered, -ordered, side="left")  # of the images with an equal score
    count = np.searchsorted(-ordered, -ordered, side="right")  # images that score at least as high
    precision = np.cumsum(hits)[count - 1] / count
    below = np.cumsum((hits / count)[::-1])[::-1][first]
    weighted = np.cumsum((hits * precision / count)[::-1])[::-1][first]
    own = hits * (precision - (hits * precision).sum() / hits.sum())
    found = np.empty_like(ordered, dtype=np.float64)
    found[order] = (own + hits * below - weighted) / hits.sum()
    return found


def map_change(scores: Scores, before: Scores) -> tuple[float, float]:
    """The difference in mAP between two models on the same images, in points, and half of its 95 % interval.

    The variance is the sum over the images of the squared derivatives of the difference in their weights, the
    infinitesimal jackknife (Efron, 1982): what a bootstrap over the images tends to. For top-1 it is the usual formula.
    """
    truth = scores.truth.numpy()
    classes = np.flatnonzero(truth.any(axis=0))
    slopes = np.zeros(len(truth))
    for c in classes:
        for sign, logits in ((1, scores.logits), (-1, before.logits)):
            slopes += sign * precision_influences(logits.numpy()[:, c], truth[:, c]) / len(classes)
    change = mean_average_precision(scores) - mean_average_precision(before)
    return change, 100 * 1.96 * float(np.sqrt((slopes**2).sum()))


def counts_at(scores: Scores, thresholds: Tensor) -> Counts:
    """The counts at these thresholds, ascending (K,) float64."""
    passed = torch.bucketize(scores.logits.double().sigmoid(), thresholds, right=True)  # number of thresholds <= p
    classes = passed.shape[1]
    steps = len(thresholds) + 1
    cells = passed + steps * torch.arange(classes)

    def at_least(chosen: Tensor) -> Tensor:
        counts = torch.bincount(chosen.flatten(), minlength=steps * classes).view(classes, steps)
        return counts.flip(1).cumsum(1).flip(1)[:, 1:].T.double()

    return Counts(at_least(cells[scores.truth]), at_least(cells), scores.truth.sum(0).double())


def f1_of(counts: Counts) -> tuple[Tensor, Tensor]:
    """Macro and micro F1 in [0, 1], (thresholds,) each. Macro F1 is the mean over the classes that an image has."""
    by_class = f1_by_class(counts)[:, counts.images > 0]
    right, found = counts.right.sum(1), counts.found.sum(1)
    return by_class.mean(1), 2 * right / (found + counts.images.sum())


def f1_by_class(counts: Counts) -> Tensor:
    """F1 of each threshold and class in [0, 1]: 2 * right / (found + images); 0 if both are 0."""
    return 2 * counts.right / (counts.found + counts.images).clamp(min=1)


def best_threshold(scores: Scores) -> float:
    """The threshold among 0.01, 0.02, ..., 0.99 with the largest macro F1; of several the middle one."""
    macro, _ = f1_of(counts_at(scores, THRESHOLDS))
    best = torch.nonzero(macro == macro.max()).flatten()
    return round(THRESHOLDS[best[len(best) // 2]].item(), 2)


def class_table(scores: Scores, classes: Sequence[str], threshold: float) -> list[dict[str, Any]]:
    """For each class that an image has: images, and ap, precision, recall and f1 in % at the threshold; the worst first.

    The precision of a class that is never predicted is None.
    """
    counts = counts_at(scores, torch.tensor([threshold]).double())
    precisions, f1 = average_precisions(scores), f1_by_class(counts)[0]
    rows = []
    for i, name in enumerate(classes):
        images, found, right = (counts.images[i].item(), counts.found[0, i].item(), counts.right[0, i].item())
        if images:
            row = {"class": name, "images": int(images), "ap": 100 * precisions[i]}
            row |= {"precision": 100 * right / found if found else None, "recall": 100 * right / images}
            rows.append(row | {"f1": 100 * f1[i].item()})
    return sorted(rows, key=lambda row: (row["ap"], row["class"]))


def class_lines(rows: Sequence[Mapping[str, Any]], more: str) -> list[str]:
    """A `class_table` as text, at most `MOST_CLASSES` of its rows.

    more: where the other rows are, for the last line.
    """
    names = [printable(row["class"]) for row in rows[:MOST_CLASSES]]
    names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..." for name in names]
    width = max(5, *map(len, names))
    lines = [f"{'class':{width}}  images    AP %  precision %  recall %    F1 %"]
    for name, row in zip(names, rows):
        precision = "-" if row["precision"] is None else f"{row['precision']:.2f}"
        lines.append(
            f"{name:{width}}  {row['images']:6}  {row['ap']:6.2f}  {precision:>11}  {row['recall']:8.2f}  {row['f1']:6.2f}"
        )
    return lines + [f"... and {len(rows) - MOST_CLASSES} better ones ({more})"] * (len(rows) > MOST_CLASSES)
