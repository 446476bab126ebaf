"""Collects a classifier's predictions and computes accuracy, agreement, calibration and gains by class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS = 15  # as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599


class Answers:
    """Predictions, confidence and loss by image."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    def add(self, logits: Tensor, targets: Tensor, teacher: Tensor | None = None) -> None:
        """Adds a batch. logits: (B, classes). targets: (B,). teacher: its logits, for agreement and KL(teacher || student)."""
        log = logits.double().log_softmax(1)
        confidence, predicted = log.max(1)
        nll = -log.gather(1, targets[:, None]).squeeze(1)
        kl, agreed = torch.full_like(nll, torch.nan), torch.zeros_like(predicted)
        if teacher is not None:
            teacher_log = teacher.double().log_softmax(1)
            kl = (teacher_log.exp() * (teacher_log - log)).sum(1)
            agreed = predicted == teacher_log.argmax(1)
        self._batches.append(tuple(t.cpu() for t in (predicted, confidence.exp(), nll, targets, kl, agreed)))

    def columns(self) -> dict[str, Any]:
        """Arrays (images,): predicted, confidence, nll, target, kl, agreed, right."""
        names = ("predicted", "confidence", "nll", "target", "kl", "agreed")
        columns = {name: torch.cat(values).numpy() for name, values in zip(names, zip(*self._batches))}
        return columns | {"right": columns["predicted"] == columns["target"]}

    def result(self, with_teacher: bool) -> dict[str, Any]:
        """Plain data: `top1`, `agreement` and `ece` in %, `nll` and `kl` in nats."""
        c = self.columns()
        figures = {"top1": 100 * float(c["right"].mean()), "nll": float(c["nll"].mean())}
        if with_teacher:
            figures |= {"agreement": 100 * float(c["agreed"].mean()), "kl": float(c["kl"].mean())}
        return figures | calibration(c["confidence"], c["right"])


def calibration(confidence: Any, right: Any) -> dict[str, Any]:
    """The expected calibration error (ECE) in %, and the bins of a reliability diagram (Guo et al., ICML 2017).

    confidence: (N,), the largest probability. right: (N,), whether that class is the true one. 15 bins of equal width,
    each open below and closed above. ECE is |accuracy - mean confidence|, averaged over bins, weighted by their images.
    """
    confidence, right = np.asarray(confidence, float), np.asarray(right, float)
    bin_index = np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")
    counts = np.bincount(bin_index, minlength=BINS)
    sums = [np.bincount(bin_index, weights=v, minlength=BINS) for v in (confidence, right)]
    gaps = np.abs(sums[1] - sums[0])  # differences of sums, so already weighted by the images of the bin
    bins = [
        {"from": i / BINS, "to": (i + 1) / BINS, "images": int(n)}
        | ({"confidence": float(c / n), "accuracy": float(r / n)} if n else {"confidence": None, "accuracy": None})
        for i, (n, c, r) in enumerate(zip(counts, *sums))
    ]
    return {"ece": 100 * float(gaps.sum() / len(confidence)), "bins": bins}


def class_gains(before: dict[str, Any], after: dict[str, Any], classes: list[str]) -> list[dict[str, Any]]:
    """Top-1 by class in % of two models on the same images, the largest gain first.

    before, after: `Answers.columns`. half_width: half of the gain's 95 % interval, 1.96 standard errors of the paired
    differences of the images; None for a class with one image. Classes without images are left out.
    """
    rows = []
    for i, name in enumerate(classes):
        of_class = before["target"] == i
        n = int(of_class.sum())
        if not n:
            continue
        a, b = (100.0 * c["right"][of_class] for c in (before, after))
        half = 1.96 * float((b - a).std(ddof=1)) / n**0.5 if n > 1 else None
        row = {"class": name, "images": n, "before": float(a.mean()), "after": float(b.mean())}
        rows.append(row | {"gain": float((b - a).mean()), "half_width": half})
    return sorted(rows, key=lambda row: (-row["gain"], row["class"]))
