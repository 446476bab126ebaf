"""Scores of a classifier's logits, and the temperature and threshold that suit them.

Targets are classes, (N,) int64, or sets of classes, (N, C) of 0 and 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from scalekd.common.set_figures import Scores, best_threshold, figures_of

TEMPERATURES = (1 / 20, 20.0)  # range of the search
BINS = 15  # bins of the calibration error
UNCHOSEN_THRESHOLD = 0.5  # if no image can be held out


def are_sets(targets: Tensor) -> bool:
    return targets.dim() == 2


def cost(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the images of the cross entropy, or of the binary cross entropies of all classes, added.

    The sum gives each class the loss of a logistic regression of its own. logits: (N, C).
    """
    if are_sets(targets):
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="sum") / len(logits)
    return F.cross_entropy(logits, targets)


def all_right(logits: Tensor, targets: Tensor) -> bool:
    """Whether every image gets its class, or each of its classes and no other at probability 0.5. logits: (N, C)."""
    if are_sets(targets):
        return bool(((logits > 0) == (targets > 0.5)).all())
    return bool((logits.argmax(1) == targets).all())


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """The T in the range `TEMPERATURES` with the lowest negative log-likelihood of logits / T (N, C).

    Guo et al., On Calibration of Modern Neural Networks, 2017. The likelihood is log-concave in 1/T, so there is one optimum.
    """
    from scipy.optimize import minimize_scalar

    result = minimize_scalar(
        lambda log_t: cost(logits / math.exp(log_t), targets).item(),
        bounds=tuple(map(math.log, TEMPERATURES)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(math.exp(result.x))


def scores(logits: Tensor, targets: Tensor, threshold: float | None = None) -> dict[str, float]:
    """Scores of logits (N, C): {"top1": %, "top5": %, "nll": mean in nats, "ece": %, "images": N}.

    With sets of classes {"map": %, "f1_macro": %, "f1_micro": %, "threshold", "nll", "ece", "images"}, as `figures_of`
    describes them, with its loss as "nll". "ece" is over all answers, N * C of them.
    """
    logits = logits.double()
    if are_sets(targets):
        has = targets > 0.5
        figures = figures_of(Scores(logits.cpu(), has.cpu()), threshold)
        error = calibration_error(logits.sigmoid().flatten(), has.flatten())
        return {"nll": figures.pop("loss"), "ece": 100 * error} | figures
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    confidence = logits.softmax(1).amax(1)
    return {
        "top1": 100 * hits[:, 0].double().mean().item(),
        "top5": 100 * hits.any(1).double().mean().item(),
        "nll": F.cross_entropy(logits, targets).item(),
        "ece": 100 * calibration_error(confidence, hits[:, 0]),
        "images": len(targets),
    }


def rank(score: dict[str, float]) -> tuple[float, ...]:
    """The larger, the better a classifier with these `scores`: by its likelihood; with sets of classes first by mAP."""
    return (score["map"], -score["nll"]) if "map" in score else (-score["nll"],)


def threshold_for(logits: Tensor, targets: Tensor) -> float | None:
    """With sets of classes, the threshold with the largest macro F1, as for a student; else None. logits: (N, C)."""
    return best_threshold(Scores(logits.cpu(), targets.cpu() > 0.5)) if are_sets(targets) else None


def before_and_after(
    logits: Tensor, targets: Tensor, temperature: float, threshold: float | None
) -> dict[str, dict[str, float]]:
    """The scores of logits (N, C) as they are, "before", and divided by the temperature, "after".

    threshold: for the divided ones; the others get the one that separates the same images, so F1 is equal.
    """
    before = threshold and 1 / (1 + math.exp(-temperature * math.log(threshold / (1 - threshold))))
    return {
        "before": scores(logits, targets, before),
        "after": scores(logits / temperature, targets, threshold),
    }


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error (Guo et al., 2017) in [0, 1], with `BINS` bins of equal width, closed at the upper end.

    The mean of |accuracy - mean confidence| over the bins, weighted by their numbers of images. confidence: (N,) in
    [0, 1]; right: (N,) bool.
    """
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64, device=confidence.device)
    # |sum of right - sum of confidence| is the count times the gap
    gaps.index_add_(0, bins, right.double() - confidence.double())
    return (gaps.abs().sum() / len(confidence)).item()
