"""A linear classifier on fixed features: fitted, its strength and temperature chosen on held-out images, scored.

Everything is full batch and in float64: with the same features, the same head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalekd.common.errors import UserError

STRENGTHS = tuple(10 ** (k / 2) for k in range(8, -5, -1))  # 10^4 to 10^-2, from strong to weak
UNCHOSEN = 10.0  # where nothing can be held out: the middle of the grid
PARTS = 5  # the labelled images are dealt into so many parts
BY_TURNS = 2000  # up to so many images each part is held out in its turn; above, only the first
FLAT = (
    1e-6  # the largest entry of the gradient of the mean loss at which a fit has converged; refused above 10 times it
)
FLATTER = 1e-8  # what the fit that is kept goes on to; about where rounding ends it
TEMPERATURES = (1 / 20, 20.0)  # between these one is looked for
BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Linear:
    """logits = features @ weight.T + bias, for the features as they come from the model."""

    weight: Tensor  # (C, D) float64
    bias: Tensor  # (C,)

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) to (N, C), float64."""
        return features.double() @ self.weight.T + self.bias


@dataclass(frozen=True)
class Choice:
    strength: float
    temperature: float
    held_out: dict[str, Any]  # images, and the scores before and after the temperature; {} if nothing could be held out
    tried: list[dict[str, float]]  # strength, held-out nll and top1


@dataclass(frozen=True)
class Turned:
    """Features standardised and along their principal axes: what the fits of all strengths have in common."""

    z: Tensor  # (N, R) float64, R at most N and D
    spread: Tensor  # (R,): the mean square of each column of z
    axes: Tensor  # (D, R), orthonormal: z = (features - mean) / std @ axes
    mean: Tensor  # (D,)
    std: Tensor  # (D,)


def turned(features: Tensor) -> Turned:
    """features: (N, D), any float type. Raises `UserError` for features that are not finite."""
    if not features.isfinite().all():
        raise UserError("the features are not finite; look at the model's weights, mean and std")
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-12 * (1 + mean.abs()), std, 1.0)  # a feature that never changes stays, as zeros
    z = (x - mean) / std
    if len(z) < z.shape[1]:  # N images span N axes; a penalised weight has no part outside of them
        lengths, axes = torch.linalg.svd(z, full_matrices=False)[1:]
        spread, axes = lengths.square() / len(z), axes.T
    else:
        spread, axes = torch.linalg.eigh(z.T @ z / len(z))
    return Turned(z @ axes, spread, axes, mean, std)


def fit(
    features: Tensor | Turned,
    targets: Tensor,
    classes: int,
    strength: float,
    start: Linear | None = None,
    flat: float = FLATTER,
) -> Linear:
    """Multinomial logistic regression: least of  sum_i CE(W z_i + b, y_i) + strength / 2 * ||W||^2.

    features: (N, D), any float type; z is each feature less its mean, over its standard deviation. The bias is not
    penalised. scikit-learn's C is 1 / strength. start: a fit of the same features to begin at. flat: the gradient
    to stop at. Returns W and b for the features as given, standardisation folded in. Raises `UserError` for features
    that are not finite, and if L-BFGS does not get to a flat place.
    """
    known = features if isinstance(features, Turned) else turned(features)
    mean, std, axes = known.mean, known.std, known.axes
    # Along the features' principal axes, and in these units, the loss curves about alike in all directions, so a
    # few dozen steps do where plain features need hundreds; 0.1 is about p (1 - p). The penalty does not mind turns.
    unit = (0.1 / (0.1 * known.spread.clamp(min=0) + strength / len(known.z))).sqrt()
    z = known.z * unit
    parameters = torch.zeros(classes, z.shape[1] + 1, dtype=torch.float64, device=z.device)
    if start is not None:
        weight, bias = start.weight * std @ axes / unit, start.bias + start.weight @ mean
        parameters = torch.cat([weight, bias[:, None]], dim=1)
    parameters.requires_grad_(True)

    def loss() -> Tensor:
        weight, bias = parameters[:, :-1], parameters[:, -1]
        # over the count: sizes of steps and of the gradient then do not depend on it
        return F.cross_entropy(z @ weight.T + bias, targets) + strength / (2 * len(z)) * (weight * unit).square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(3):  # a line search that gives up near the end goes on with a fresh memory
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=2000,
            history_size=20,
            tolerance_grad=flat,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)
        closure()
        assert parameters.grad is not None
        slope = parameters.grad.abs().max().item()
        if slope <= flat:
            break
    if slope > 10 * FLAT:
        raise UserError(
            f"the fit with strength {strength:g} did not converge: its gradient is {slope:.1e}, wanted is "
            f"{10 * FLAT:g}. Are some features far larger than others? Look at mean and std"
        )
    weight, bias = parameters.detach()[:, :-1], parameters.detach()[:, -1]
    weight = (weight * unit) @ axes.T / std
    return Linear(weight, bias - weight @ mean)


def choose(features: Tensor, targets: Tensor, classes: int, seed: int) -> Choice:
    """The strength with the least held-out negative log likelihood, then the temperature with the least.

    features: (N, D), targets: (N,), both of labelled training images and of nothing else. With few images
    (`BY_TURNS`) every part is held out once and the held-out logits are put together; the temperature is that of
    these logits. With one image of each class nothing can be held out: `UNCHOSEN`, temperature 1.
    """
    parts = held_out_parts(targets.tolist(), seed)
    parts = parts if len(targets) <= BY_TURNS else parts[:1]
    if not parts:
        return Choice(UNCHOSEN, 1.0, {}, [])
    fits: list[Linear | None] = [None] * len(parts)
    everything = torch.arange(len(targets), device=targets.device)
    helds = [torch.tensor(part, device=targets.device) for part in parts]
    rests = [everything[~torch.isin(everything, held)] for held in helds]
    seen = [turned(features[rest]) for rest in rests]
    truth = targets[torch.tensor([i for part in parts for i in part], device=targets.device)]
    tried, best, best_logits = list[dict[str, float]](), math.inf, torch.empty(0)
    for strength in STRENGTHS:
        logits = []
        for k, (held, rest) in enumerate(zip(helds, rests)):
            fits[k] = linear = fit(seen[k], targets[rest], classes, strength, fits[k], FLAT)
            logits.append(linear(features[held]))
        found = torch.cat(logits)
        score = scores(found, truth)
        tried.append({"strength": strength, "nll": score["nll"], "top1": score["top1"]})
        if score["nll"] < best:
            best, best_logits = score["nll"], found
        elif score["nll"] > 1.1 * best:  # it only rises from here, and weak strengths are the slow ones
            break
    chosen = min(tried, key=lambda row: row["nll"])["strength"]
    # where all are right, the likelihood grows with 1/T without end: they say nothing of how sure to be
    all_right = bool((best_logits.argmax(1) == truth).all())
    temperature = 1.0 if all_right else best_temperature(best_logits, truth)
    after = scores(best_logits / temperature, truth)
    return Choice(chosen, temperature, {"before": scores(best_logits, truth), "after": after}, tried)


def held_out_parts(targets: Sequence[int], seed: int) -> list[list[int]]:
    """Up to `PARTS` disjoint lists of indices, each with the classes as evenly as can be; none is empty.

    One image of each class is in none of them, so that every fit has seen every class.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
    seen: dict[int, int] = {}
    parts: list[list[int]] = [[] for _ in range(PARTS)]
    for i in order:
        turn = seen[targets[i]] = seen.get(targets[i], -1) + 1
        if turn:
            parts[(turn - 1) % PARTS].append(i)
    return [sorted(part) for part in parts if part]


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """The T of `TEMPERATURES` with the least negative log likelihood of softmax(logits / T).

    Guo et al., On Calibration of Modern Neural Networks, 2017. The likelihood is log-concave in 1/T: one optimum.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: F.cross_entropy(logits / math.exp(log_t), targets).item(),
        bounds=tuple(map(math.log, TEMPERATURES)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(math.exp(found.x))


def scores(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """{"top1": %, "top5": %, "nll": mean in nats, "ece": %, "images": count} of logits (N, C)."""
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
    """Expected calibration error: over bins of equal width of confidence, the mean of |accuracy - mean confidence|,
    weighted by the images in the bin. confidence: (N,) in [0, 1]; right: (N,) bool. A bin has its upper end.
    """
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64, device=confidence.device)
    # |sum of right - sum of confidence| is the count times the gap
    gaps.index_add_(0, bins, right.double() - confidence.double())
    return (gaps.abs().sum() / len(confidence)).item()
