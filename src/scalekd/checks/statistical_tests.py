"""Statistical tests on labelled images for a wrong class order or wrong normalisation of a teacher.

Each test returns its result as text for the pre-flight, or None. "Clearly better" means significant at level `CLEAR` in
an exact two-sided sign test over the images that exactly one of the two classifiers gets right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn
from torch.nn import functional as F

from scalekd.heads.features import pooled
from scalekd.heads.knn import knn_predict
from scalekd.models.inputs import Statistics, per_channel, scaled

from .model import shown

CLEAR = 0.01  # p-value
NEIGHBOURS = 10
KNOWN: dict[str, Statistics] = {
    "ImageNet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "Inception": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "no normalisation": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "CLIP": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


class Sample(NamedTuple):
    images: Tensor  # (N, C, H, W) uint8, at the teacher's input size, before normalisation
    targets: Tensor  # (N,); with sets of labels (N, classes) of 0 and 1

    def every(self, step: int) -> Sample:
        """Every `step`-th image."""
        return Sample(self.images[::step], self.targets[::step])


@torch.inference_mode()
def logits_of(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor) -> Tensor:
    """Logits (N, classes), float32, on the CPU. mean, std: (1, C, 1, 1) for pixels in [0, 1], on the model's device."""
    return torch.cat([model(x).float().cpu() for x in _inputs(sample, mean, std)])


def other_order(logits: Tensor, targets: Tensor, names: Sequence[str]) -> str | None:
    """Text if the outputs predict the classes clearly better in another order, else None.

    Finds the one-to-one assignment of outputs to classes with the most hits on one half of the images and evaluates it
    on the other half, in both directions. So outputs that do not separate the classes give no evidence, whatever the
    number of classes.
    """
    predicted = logits.argmax(1)
    hits, before = _hits_in_best_order(predicted, targets), predicted == targets
    if not clearly_more(hits, before):
        return None
    moved = [(a, b) for a, b in _assignment(predicted, targets) if a != b and _pairs(predicted, targets, a, b) > 1]
    moved.sort(key=lambda pair: -_pairs(predicted, targets, *pair))
    pairs = ", ".join(f"output {names[a]} predicts {names[b]}" for a, b in moved[:3])
    return (
        f"Its classes seem to be in another order: with the best order for half of the images, {percent(hits)} of "
        f"the other half are correct instead of {percent(before)} ({pairs}{', and more' * (len(moved) > 3)})"
    )


def is_order(logits: Tensor, targets: Tensor, rows: Sequence[int]) -> bool:
    """Whether this order of the outputs is clearly better than theirs, and not clearly worse than the best order."""
    predicted, reordered = logits.argmax(1), logits[:, list(rows)].argmax(1) == targets
    best = _hits_in_best_order(predicted, targets)
    return clearly_more(reordered, predicted == targets) and not clearly_more(best, reordered)


def _hits_in_best_order(predicted: Tensor, targets: Tensor) -> Tensor:
    """(N,) bool: correct predictions with the assignment of outputs to classes that fits the other half best."""
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))  # labels may alternate
    hits = torch.zeros(len(targets), dtype=torch.bool)
    for half in (0, 1):
        tested, fitted = shuffled[half::2], shuffled[1 - half :: 2]
        assigned = dict(_assignment(predicted[fitted], targets[fitted]))
        hits[tested] = torch.tensor([assigned.get(int(p), int(p)) for p in predicted[tested]]) == targets[tested]
    return hits


def _assignment(predicted: Tensor, targets: Tensor) -> list[tuple[int, int]]:
    """One-to-one pairs (output, class) with the most hits, over those that occur. Ties keep an output's own class."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    occurring = torch.unique(torch.cat([predicted, targets]))
    counts = torch.eye(len(occurring), dtype=torch.float64) / 2
    at = torch.searchsorted(occurring, torch.stack([predicted, targets]))
    counts.index_put_((at[0], at[1]), torch.ones(len(targets), dtype=torch.float64), accumulate=True)
    rows, columns = linear_sum_assignment(-counts.numpy())
    return [(int(occurring[a]), int(occurring[b])) for a, b in zip(rows, columns)]


def _pairs(predicted: Tensor, targets: Tensor, output: int, target: int) -> int:
    """Number of images of class `target` predicted as `output`."""
    return int(((predicted == output) & (targets == target)).sum())


def other_statistics(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor, logits: Tensor) -> str | None:
    """Text if the teacher is clearly more accurate with another mean and std, else None.

    Tries `KNOWN` and the sample's own statistics on every fourth image, which costs about as much as `logits` did. The
    candidate with the lowest loss, if lower than the current one, is then evaluated on all images.

    logits: those of `sample` with the current `mean` and `std`.
    """
    few = sample.every(4)
    tried = [
        (finite_loss(logits_of(model, few, m, s), few.targets), name, m, s)
        for name, m, s in _different(KNOWN | {"of these images": _own(sample)}, mean, std)
    ]
    least, name, m, s = min(tried, key=lambda entry: entry[0])
    if least >= finite_loss(logits[::4], few.targets):
        return None
    before, after = (x.argmax(1) == sample.targets for x in (logits, logits_of(model, sample, m, s)))
    if not clearly_more(after, before):
        return None
    return (
        f"With {shown(m, s)} ({name}), {percent(after)} are correct instead of {percent(before)}: check the mean and std "
        "that it was trained with"
    )


def _different(known: dict[str, Statistics], mean: Tensor, std: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, mean and std (1, C, 1, 1) of those that differ from the current ones."""
    for name, statistics in known.items():
        m, s = (_as_input(values, mean.shape[1]).to(mean) for values in statistics)
        if max((m - mean).abs().max(), (s - std).abs().max()) > 0.02:
            yield name, m, s


def _own(sample: Sample) -> Statistics:
    """Mean and std of the sample's pixels."""
    pixels = scaled(sample.images)
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).clamp(min=0.01).tolist()
    return tuple(mean), tuple(std)


def _as_input(values: Sequence[float], channels: int) -> Tensor:
    """(1, C, 1, 1). The values of three colours are averaged for a greyscale model."""
    tensor = torch.tensor(values)
    return per_channel(tensor if len(tensor) == channels else tensor.mean().expand(channels))


def finite_loss(logits: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy; infinity instead of NaN."""
    loss = F.cross_entropy(logits, targets).item()
    return loss if loss == loss else torch.inf


def by_neighbours(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor) -> Tensor:
    """`neighbours` on the model's pooled features. Raises `UserError` for a model that does not pool."""
    return neighbours(features_of(model, sample, mean, std), sample.targets)


@torch.inference_mode()
def features_of(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor) -> Tensor:
    """Pooled features (N, D), float32, on the CPU. Raises `UserError` for a model that does not pool."""
    return torch.cat([pooled(model, x).float().cpu() for x in _inputs(sample, mean, std)])


def neighbours(features: Tensor, targets: Tensor) -> Tensor:
    """(N,) bool: images that a weighted 10-nearest-neighbour classifier on the other images gets right.

    features: (N, D); standardised here over the sample.
    """
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    classes = int(targets.max()) + 1
    votes = knn_predict(features, targets, features, k=NEIGHBOURS, classes=classes, leave_one_out=True)
    return votes.argmax(1) == targets


def better_features(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor, features: Tensor) -> str | None:
    """Text if `neighbours` is clearly better with another mean and std of `KNOWN`, else None.

    Tries each on half of the images; the best one, if better than the current one, is then evaluated on all images. So
    the cost is at most three times that of `features`. The images' own statistics are not tried: on new images they may
    do better than those that a correct teacher was trained with.

    features: those of `sample` with the current `mean` and `std`.
    """
    half = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[: len(features) // 2]
    few = Sample(sample.images[half], sample.targets[half])
    tried = [(int(by_neighbours(model, few, m, s).sum()), name, m, s) for name, m, s in _different(KNOWN, mean, std)]
    most, name, m, s = max(tried, key=lambda entry: entry[0])
    if most <= int(neighbours(features[half], few.targets).sum()):
        return None
    before, after = neighbours(features, sample.targets), by_neighbours(model, sample, m, s)
    if not clearly_more(after, before):
        return None
    return (
        f"With {shown(m, s)} ({name}), it is {percent(after)} instead of {percent(before)}: check the mean and std that "
        "it was trained with"
    )


def _inputs(sample: Sample, mean: Tensor, std: Tensor) -> Iterator[Tensor]:
    return ((scaled(part.to(mean.device)) - mean) / std for part in sample.images.split(64))


def clearly_more(a: Tensor, b: Tensor) -> bool:
    """Whether a classifier is clearly better than another. a, b: (N,) bool, the images that each gets right."""
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    n = gained + lost
    return gained > lost and 2 * sum(math.comb(n, k) for k in range(lost + 1)) / 2**n < CLEAR


def percent(hits: Tensor) -> str:
    """Share of True, as `91.3 %`."""
    return f"{100 * hits.double().mean().item():.1f} %"
