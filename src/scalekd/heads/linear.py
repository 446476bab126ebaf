"""Fits a linear classifier on fixed features, and chooses its strength, temperature and threshold on held-out images.

Everything is full-batch and in float64: the same features give the same head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalekd.common.errors import UserError
from scalekd.data.targets import Target, classes_in, rarest

from .scores import (
    UNCHOSEN_THRESHOLD,
    all_right,
    are_sets,
    before_and_after,
    best_temperature,
    cost,
    rank,
    scores,
    threshold_for,
)

STRENGTHS = tuple(10 ** (k / 2) for k in range(8, -5, -1))  # L2 penalties tried, from 10^4 to 10^-2
UNCHOSEN = 10.0  # the strength if no image can be held out: the middle of the grid
PARTS = 5  # folds of the labelled images
CROSS_VALIDATED = 2000  # up to this many images every fold is held out once; above, only the first
FLAT = 1e-6  # a fit has converged if no entry of the mean loss's gradient is larger; above 10 times this, an error
ROUGH = 1e-5  # the same for the fits that choose the strength
FLATTER = 1e-8  # where the final fit stops if it gets there in `POLISH` steps; about the limit of rounding
POLISH = 200  # steps beyond `FLAT`: with many classes and a weak penalty, `FLATTER` would take thousands
TELL_EVERY = 5.0  # seconds between lines on the progress


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
    """The strength and temperature of a head, for sets of classes its threshold, and the held-out scores behind them."""

    strength: float
    temperature: float
    held_out: dict[str, Any]  # `scores` before and after the temperature; {} if no image could be held out
    tried: list[dict[str, float]]  # per strength: strength, held-out nll and top1 or map
    threshold: float | None = None  # the probability from which on an image has a class
    all_right: bool = False  # no held-out image has a wrong answer, so the temperature is not chosen


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

    With sets of classes, logistic regression of each class: CE is the sum of the classes' binary cross entropies.

    z are the standardised features; the bias is not penalised. scikit-learn's C is 1 / strength.

    Args:
        features: (N, D), any float type.
        targets: (N,), in 0 .. classes - 1, or (N, classes) of 0 and 1.
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
    return cost(z @ weight.T + bias, targets) + strength / (2 * len(z)) * (weight * unit).square().sum()


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

    With sets of classes, the strength has the highest held-out mAP, and the threshold the highest macro F1.

    Up to `CROSS_VALIDATED` images every fold is held out once and the held-out logits of all folds are scored together;
    the temperature is fitted to the same logits. With one image per class no image can be held out: the result is
    `UNCHOSEN`, temperature 1 and threshold 0.5.

    features: (N, D), targets: (N,) or (N, C), of labelled training images only. tell: gets a line on the progress every
    few seconds.
    """
    parts = held_out_parts(listed(targets), seed)
    parts = parts if len(targets) <= CROSS_VALIDATED else parts[:1]
    truth = targets[torch.tensor([i for part in parts for i in part], dtype=torch.long, device=targets.device)]
    if not parts or (are_sets(targets) and not truth.any()):
        return Choice(UNCHOSEN, 1.0, {}, [], UNCHOSEN_THRESHOLD if are_sets(targets) else None)
    strength, logits, tried = _search(features, targets, truth, parts, classes, tell)
    # if all are correct, the likelihood grows with 1/T without bound: the temperature is undefined
    right = all_right(logits, truth)
    temperature = 1.0 if right else best_temperature(logits, truth)
    threshold = threshold_for(logits / temperature, truth)
    held_out = before_and_after(logits, truth, temperature, threshold)
    return Choice(strength, temperature, held_out, tried, threshold, right)


def _search(
    features: Tensor,
    targets: Tensor,
    truth: Tensor,
    parts: list[list[int]],
    classes: int,
    tell: Callable[[str], None] | None,
) -> tuple[float, Tensor, list[dict[str, float]]]:
    """The best strength, its logits for the held-out images of all parts, and the scores of all strengths tried.

    They are tried from the strongest on. The search ends when the likelihood, and with sets of classes also mAP, gets
    worse: from there they only get worse, and weak penalties are slow to fit.

    truth: the targets of the parts, one part after the other.
    """
    fits: list[Linear | None] = [None] * len(parts)
    everything = torch.arange(len(targets), device=targets.device)
    helds = [torch.tensor(part, device=targets.device) for part in parts]
    rests = [everything[~torch.isin(everything, held)] for held in helds]
    axes = [principal_axes(features[rest]) for rest in rests]
    tried, best, chosen, best_logits = list[dict[str, float]](), dict[str, float](), UNCHOSEN, torch.empty(0)
    shown = time.perf_counter()
    for number, strength in enumerate(STRENGTHS, 1):
        logits = []
        for k, (held, rest) in enumerate(zip(helds, rests)):
            if tell and time.perf_counter() - shown > TELL_EVERY:
                shown = time.perf_counter()
                tell(
                    f"  strength {strength:.3g} ({number} of at most {len(STRENGTHS)}), fit {k + 1} of {len(parts)}"
                    + (f", best so far {_told(best)}" if best else "")
                )
            fits[k] = linear = fit(axes[k], targets[rest], classes, strength, fits[k], ROUGH)
            logits.append(linear(features[held]))
        score = scores(torch.cat(logits), truth)
        likelier = not tried or score["nll"] < min(row["nll"] for row in tried)
        tried.append({"strength": strength} | {key: score[key] for key in ("nll", "top1", "map") if key in score})
        if not best or rank(score) > rank(best):
            best, chosen, best_logits = score, strength, torch.cat(logits)
        elif not likelier:
            break
    return chosen, best_logits, tried


def _told(score: dict[str, float]) -> str:
    return f"mAP {score['map']:.2f} %" if "map" in score else f"{score['nll']:.4f} nats"


def listed(targets: Tensor) -> list[Target]:
    """Targets (N,) or (N, C) as classes or sets of classes."""
    if are_sets(targets):
        return [tuple(row.nonzero().flatten().tolist()) for row in targets]
    return list(targets.tolist())


def held_out_parts(targets: Sequence[Target], seed: int) -> list[list[int]]:
    """Up to `PARTS` disjoint, non-empty lists of indices, stratified by class, or by the rarest class of each image.

    Of each class, the first image in the seed's order is in none of them, so every fit has images of every class.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
    strata = rarest(targets)
    kept: set[int] = set()
    count: dict[int, int] = {}
    parts: list[list[int]] = [[] for _ in range(PARTS)]
    for i in order:
        if not kept.issuperset(classes := classes_in(targets[i])):
            kept.update(classes)
            continue
        turn = count[strata[i]] = count.get(strata[i], -1) + 1
        parts[turn % PARTS].append(i)
    return [sorted(part) for part in parts if part]
