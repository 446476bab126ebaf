"""Fits a linear classifier on fixed features, chooses its strength and temperature on held-out images, and scores it.

Everything is full-batch and in float64: the same features give the same head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalekd.common.errors import UserError

STRENGTHS = tuple(10 ** (k / 2) for k in range(8, -5, -1))  # L2 penalties tried, from 10^4 to 10^-2
UNCHOSEN = 10.0  # the strength if no image can be held out: the middle of the grid
PARTS = 5  # folds of the labelled images
CROSS_VALIDATED = 2000  # up to this many images every fold is held out once; above, only the first
FLAT = 1e-6  # a fit has converged if no entry of the mean loss's gradient is larger; above 10 times this, an error
ROUGH = 1e-5  # the same for the fits that choose the strength
FLATTER = 1e-8  # where the final fit stops if it gets there in `POLISH` steps; about the limit of rounding
POLISH = 200  # steps beyond `FLAT`: with many classes and a weak penalty, `FLATTER` would take thousands
TEMPERATURES = (1 / 20, 20.0)  # range of the search
TELL_EVERY = 5.0  # seconds between lines on the progress
BINS = 15  # bins of the calibration error


@dataclass(frozen=True)
class Linear:
    """logits = features @ weight.T + bias, for unstandardised features."""

    weight: Tensor  # (C, D) float64
    bias: Tensor  # (C,)

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) to (N, C), float64."""
        return features.double() @ self.weight.T + self.bias


@dataclass(frozen=True)
class Choice:
    """The strength and temperature of a head, and the held-out scores behind them."""

    strength: float
    temperature: float
    held_out: dict[str, Any]  # `scores` before and after the temperature; {} if no image could be held out
    tried: list[dict[str, float]]  # per strength: strength, held-out nll and top1


@dataclass(frozen=True)
class PrincipalAxes:
    """Standardised features in their principal axes. Computed once for the fits of all strengths."""

    z: Tensor  # (N, R) float64, R at most N and D
    spread: Tensor  # (R,): the mean square of each column of z
    axes: Tensor  # (D, R), orthonormal: z = (features - mean) / std @ axes
    mean: Tensor  # (D,)
    std: Tensor  # (D,)


def principal_axes(features: Tensor) -> PrincipalAxes:
    """features: (N, D), any float type. Raises `UserError` for features that are not finite."""
    if not features.isfinite().all():
        raise UserError("some features are not finite; check the model's weights, mean and std")
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-12 * (1 + mean.abs()), std, 1.0)  # a constant feature becomes zeros
    z = (x - mean) / std
    if len(z) < z.shape[1]:  # N images span at most N axes; the penalty makes weights outside their span zero
        lengths, axes = torch.linalg.svd(z, full_matrices=False)[1:]
        spread, axes = lengths.square() / len(z), axes.T
    else:
        spread, axes = torch.linalg.eigh(z.T @ z / len(z))
    return PrincipalAxes(z @ axes, spread, axes, mean, std)


def fit(
    features: Tensor | PrincipalAxes,
    targets: Tensor,
    classes: int,
    strength: float,
    start: Linear | None = None,
    flat: float = FLATTER,
) -> Linear:
    """Multinomial logistic regression: minimises  sum_i CE(W z_i + b, y_i) + strength / 2 * ||W||^2.

    z are the standardised features; the bias is not penalised. scikit-learn's C is 1 / strength.

    Args:
        features: (N, D), any float type.
        targets: (N,), in 0 .. classes - 1.
        start: a fit on the same features to start from.
        flat: largest gradient entry at which to stop.

    Returns W and b for the features as given, with the standardisation folded in. Raises `UserError` for features that
    are not finite, and if L-BFGS does not converge.
    """
    known = features if isinstance(features, PrincipalAxes) else principal_axes(features)
    mean, std, axes = known.mean, known.std, known.axes
    # In the principal axes and these units the loss has about the same curvature in all directions, so L-BFGS needs
    # dozens of steps instead of hundreds; 0.1 is about p (1 - p). A rotation does not change the penalty.
    unit = (0.1 / (0.1 * known.spread.clamp(min=0) + strength / len(known.z))).sqrt()
    z = known.z * unit
    parameters = torch.zeros(classes, z.shape[1] + 1, dtype=torch.float64, device=z.device)
    if start is not None:
        weight, bias = start.weight * std @ axes / unit, start.bias + start.weight @ mean
        parameters = torch.cat([weight, bias[:, None]], dim=1)
    slope = _minimise(parameters, lambda: _loss(parameters, z, unit, targets, strength), flat)
    if slope > 10 * FLAT:
        raise UserError(
            f"the fit with strength {strength:g} did not converge: its gradient is {slope:.1e}, above {10 * FLAT:g}. "
            "If some features are far larger than others, check mean and std"
        )
    weight, bias = parameters.detach()[:, :-1], parameters.detach()[:, -1]
    weight = (weight * unit) @ axes.T / std
    return Linear(weight, bias - weight @ mean)


def _loss(parameters: Tensor, z: Tensor, unit: Tensor, targets: Tensor, strength: float) -> Tensor:
    """The penalised loss over N, so that step sizes and gradients do not depend on N. parameters: (C, R + 1)."""
    weight, bias = parameters[:, :-1], parameters[:, -1]
    return F.cross_entropy(z @ weight.T + bias, targets) + strength / (2 * len(z)) * (weight * unit).square().sum()


def _minimise(parameters: Tensor, loss: Callable[[], Tensor], flat: float) -> float:
    """Runs L-BFGS on `parameters` in place. Returns the largest entry of the gradient at the end."""
    parameters.requires_grad_(True)
    aim = max(flat, FLAT)
    for _ in range(3):  # if the line search fails near the end, restart with an empty history
        if (slope := _steps(parameters, loss, aim, 2000)) <= aim:
            break
    return slope if slope <= flat else _steps(parameters, loss, flat, POLISH)


def _steps(parameters: Tensor, loss: Callable[[], Tensor], flat: float, most: int) -> float:
    """At most so many steps of L-BFGS. Returns the largest entry of the gradient."""
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=most,
        history_size=20,
        tolerance_grad=flat,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    assert parameters.grad is not None
    return parameters.grad.abs().max().item()


def choose(
    features: Tensor, targets: Tensor, classes: int, seed: int, tell: Callable[[str], None] | None = None
) -> Choice:
    """Chooses the strength, then the temperature, with the lowest held-out negative log-likelihood.

    Up to `CROSS_VALIDATED` images every fold is held out once and the held-out logits of all folds are scored together;
    the temperature is fitted to the same logits. With one image per class no image can be held out: the result is
    `UNCHOSEN` and temperature 1.

    The strengths are tried from the strongest on. The search ends when the likelihood gets worse: from there it only gets
    worse, and weak penalties are slow to fit.

    features: (N, D), targets: (N,), of labelled training images only. tell: gets a line on the progress every few seconds.
    """
    parts = held_out_parts(targets.tolist(), seed)
    parts = parts if len(targets) <= CROSS_VALIDATED else parts[:1]
    if not parts:
        return Choice(UNCHOSEN, 1.0, {}, [])
    fits: list[Linear | None] = [None] * len(parts)
    everything = torch.arange(len(targets), device=targets.device)
    helds = [torch.tensor(part, device=targets.device) for part in parts]
    rests = [everything[~torch.isin(everything, held)] for held in helds]
    axes = [principal_axes(features[rest]) for rest in rests]
    truth = targets[torch.tensor([i for part in parts for i in part], device=targets.device)]
    tried, best, best_logits = list[dict[str, float]](), math.inf, torch.empty(0)
    shown = time.perf_counter()
    for number, strength in enumerate(STRENGTHS, 1):
        logits = []
        for k, (held, rest) in enumerate(zip(helds, rests)):
            if tell and time.perf_counter() - shown > TELL_EVERY:
                shown = time.perf_counter()
                tell(
                    f"  strength {strength:.3g} ({number} of at most {len(STRENGTHS)}), fit {k + 1} of {len(parts)}"
                    + f", best so far {best:.4f} nats" * math.isfinite(best)
                )
            fits[k] = linear = fit(axes[k], targets[rest], classes, strength, fits[k], ROUGH)
            logits.append(linear(features[held]))
        held_out_logits = torch.cat(logits)
        score = scores(held_out_logits, truth)
        tried.append({"strength": strength, "nll": score["nll"], "top1": score["top1"]})
        if score["nll"] >= best:
            break
        best, best_logits = score["nll"], held_out_logits
    chosen = min(tried, key=lambda row: row["nll"])["strength"]
    # if all are correct, the likelihood grows with 1/T without bound: the temperature is undefined
    all_right = bool((best_logits.argmax(1) == truth).all())
    temperature = 1.0 if all_right else best_temperature(best_logits, truth)
    after = scores(best_logits / temperature, truth)
    return Choice(chosen, temperature, {"before": scores(best_logits, truth), "after": after}, tried)


def held_out_parts(targets: Sequence[int], seed: int) -> list[list[int]]:
    """Up to `PARTS` disjoint, non-empty lists of indices, stratified by class.

    One image of each class is in none of them, so every fit has images of every class.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
    count: dict[int, int] = {}
    parts: list[list[int]] = [[] for _ in range(PARTS)]
    for i in order:
        turn = count[targets[i]] = count.get(targets[i], -1) + 1
        if turn:
            parts[(turn - 1) % PARTS].append(i)
    return [sorted(part) for part in parts if part]


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """The T in the range `TEMPERATURES` with the lowest negative log-likelihood of softmax(logits / T).

    Guo et al., On Calibration of Modern Neural Networks, 2017. The likelihood is log-concave in 1/T, so there is one optimum.
    """
    from scipy.optimize import minimize_scalar

    result = minimize_scalar(
        lambda log_t: F.cross_entropy(logits / math.exp(log_t), targets).item(),
        bounds=tuple(map(math.log, TEMPERATURES)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(math.exp(result.x))


def scores(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Scores of logits (N, C): {"top1": %, "top5": %, "nll": mean in nats, "ece": %, "images": N}."""
    logits = logits.double()
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    confidence = logits.softmax(1).amax(1)
    return {
        "top1": 100 * hits[:, 0].double().mean().item(),
        "top5": 100 * hits.any(1).double().mean().item(),
        "nll": F.cross_entropy(logits, targets).item(),
        "ece": 100 * calibration_error(confidence, hits[:, 0]),
        "images": len(targets),
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
