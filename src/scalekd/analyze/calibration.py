"""What a classifier said of each image, and whether its confidence can be trusted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS = 15  # as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599


class Answers:
    """Predictions, their confidence and the loss, image by image."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    def add(self, logits: Tensor, targets: Tensor, teacher: Tensor | None = None) -> None:
        """logits (B, classes), targets (B,); teacher: its logits, for agreement and KL(teacher || student) in nats."""
        log = logits.double().log_softmax(1)
        confidence, predicted = log.max(1)
        nll = -log.gather(1, targets[:, None]).squeeze(1)
        kl, agreed = torch.full_like(nll, torch.nan), torch.zeros_like(predicted)
        if teacher is not None:
            theirs = teacher.double().log_softmax(1)
            kl = (theirs.exp() * (theirs - log)).sum(1)
            agreed = predicted == theirs.argmax(1)
        self._batches.append(tuple(t.cpu() for t in (predicted, confidence.exp(), nll, targets, kl, agreed)))

    def columns(self) -> dict[str, Any]:
        """(images,) each: predicted, confidence, nll, target, kl, agreed, right."""
        names = ("predicted", "confidence", "nll", "target", "kl", "agreed")
        found = {name: torch.cat(values).numpy() for name, values in zip(names, zip(*self._batches))}
        return found | {"right": found["predicted"] == found["target"]}

    def result(self, beside_teacher: bool) -> dict[str, Any]:
        """Plain data: shares in %, `nll` and `kl` in nats."""
        c = self.columns()
        found = {"top1": 100 * float(c["right"].mean()), "nll": float(c["nll"].mean())}
        if beside_teacher:
            found |= {"agreement": 100 * float(c["agreed"].mean()), "kl": float(c["kl"].mean())}
        return found | calibration(c["confidence"], c["right"])


def calibration(confidence: Any, right: Any) -> dict[str, Any]:
    """Expected calibration error in %, and the bins of a reliability diagram.

    confidence (N,): the largest probability. right (N,): whether that class is the true one. 15 bins of one width, each
    open below and closed above. The error is |accuracy - mean confidence|, averaged over bins by their images.
    """
    confidence, right = np.asarray(confidence, float), np.asarray(right, float)
    place = np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")
    counts = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, weights=v, minlength=BINS) for v in (confidence, right)]
    gaps = np.abs(sums[1] - sums[0])  # of sums: times the bin's images already
    bins = [
        {"from": i / BINS, "to": (i + 1) / BINS, "images": int(n)}
        | ({"confidence": float(c / n), "accuracy": float(r / n)} if n else {"confidence": None, "accuracy": None})
        for i, (n, c, r) in enumerate(zip(counts, *sums))
    ]
    return {"ece": 100 * float(gaps.sum() / len(confidence)), "bins": bins}


def class_gains(before: dict[str, Any], after: dict[str, Any], classes: list[str]) -> list[dict[str, Any]]:
    """`Answers.columns` of two models on the same images to top-1 by class in %, the largest gain first.

    half_width: of the 95 % interval of the gain, 1.96 standard errors of the images' paired differences; None for a
    class of one image. Classes without an image are left out.
    """
    found = []
    for i, name in enumerate(classes):
        of_class = before["target"] == i
        n = int(of_class.sum())
        if not n:
            continue
        a, b = (100.0 * c["right"][of_class] for c in (before, after))
        half = 1.96 * float((b - a).std(ddof=1)) / n**0.5 if n > 1 else None
        row = {"class": name, "images": n, "before": float(a.mean()), "after": float(b.mean())}
        found.append(row | {"gain": float((b - a).mean()), "half_width": half})
    return sorted(found, key=lambda row: (-row["gain"], row["class"]))
