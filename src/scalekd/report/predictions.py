"""Compares the predictions of several models on the same images: accuracy with intervals, by class, confusions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from scalekd.common.intervals import share_interval

from .evaluate import STUDENT, TEACHER, Seen

MOST_CLASSES = 40  # rows of a table; with more classes, the worst and the best


def accuracies(seen: Seen) -> list[dict[str, Any]]:
    """For each model: top-1 with its interval, and the student's gain over it on the same images, with its interval."""
    student = seen.columns[STUDENT]["right"].astype(float)
    rows = []
    for label, columns in seen.columns.items():
        result = seen.results[label]
        row: dict[str, Any] = {"model": label, "top1": result["top1"], "images": seen.images}
        row["interval"] = list(share_interval(result["top1"], seen.images))
        row |= {key: result.get(key) for key in ("nll", "ece", "agreement", "kl")}
        if label != STUDENT:
            row |= difference(columns["right"].astype(float), student)
        rows.append(row)
    return rows


def difference(before: Any, after: Any) -> dict[str, float | None]:
    """The gain of `after` over `before`, both (N,) of 0 and 1, in points; half_width: 1.96 standard errors of its mean."""
    gains = 100 * (after - before)
    half = 1.96 * float(gains.std(ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else None
    return {"gain": float(gains.mean()), "half_width": half}


def by_class(seen: Seen) -> list[dict[str, Any]]:
    """Images, and top-1 in % by model, of every class with images, the student's worst class first."""
    target = seen.columns[STUDENT]["target"]
    counts = np.bincount(target, minlength=len(seen.classes))
    right = {
        label: np.bincount(target, weights=columns["right"], minlength=len(seen.classes))
        for label, columns in seen.columns.items()
    }
    rows = [
        {"class": name, "images": int(n), "top1": {label: 100 * float(r[i] / n) for label, r in right.items()}}
        for i, (name, n) in enumerate(zip(seen.classes, counts))
        if n
    ]
    return sorted(rows, key=lambda row: (row["top1"][STUDENT], row["class"]))


def confusion_matrix(columns: dict[str, Any], classes: int) -> Any:
    """Counts (classes, classes): rows are true classes, columns predictions."""
    return np.bincount(columns["target"] * classes + columns["predicted"], minlength=classes**2).reshape(classes, -1)


def confusions(seen: Seen, most: int) -> list[dict[str, Any]]:
    """The student's `most` most frequent pairs of true and predicted class, with the teacher's count of the same pair."""
    student, teacher = seen.columns[STUDENT], seen.columns.get(TEACHER)
    counts = _wrong_pairs(student)
    teacher_counts = _wrong_pairs(teacher) if teacher else Counter()
    return [
        {
            "class": seen.classes[i],
            "taken_for": seen.classes[j],
            "images": n,
            "of": int((student["target"] == i).sum()),
            "teacher": teacher_counts[i, j] if teacher else None,
        }
        for (i, j), n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    ]


def _wrong_pairs(columns: dict[str, Any]) -> Counter[tuple[int, int]]:
    """(true class, predicted class) -> images. A matrix would be too large with many classes."""
    wrong = ~columns["right"]
    return Counter(zip(columns["target"][wrong].tolist(), columns["predicted"][wrong].tolist()))


def worst_and_best(rows: list[Any], order: str = "Sorted, the worst first.") -> tuple[list[Any], str]:
    """The rows that a table shows, and a sentence that says which. rows: by class, the worst first."""
    if len(rows) <= MOST_CLASSES:
        return rows, order
    half, left = MOST_CLASSES // 2, len(rows) - MOST_CLASSES
    return [
        *rows[:half],
        *rows[-half:],
    ], f"The worst {half} and the best {half}; the {left} between them are not shown."
