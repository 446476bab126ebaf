"""Evidence, from a sample of labelled images, that a teacher is not what the recipe takes it for.

Each function says what it found, in words for the pre-flight, or None. "Clearly" is an exact sign test over the images
that one of two answers has right and the other has wrong, at `CLEAR`.
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
from scalekd.models.inputs import Statistics

CLEAR = 0.01  # probability of such a difference, or a larger one, by chance
NEIGHBOURS = 10
KNOWN: dict[str, Statistics] = {
    "ImageNet's": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "0.5 and 0.5": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "0 and 1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "CLIP's": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


class Sample(NamedTuple):
    images: Tensor  # (N, C, H, W) uint8, as the teacher sees them but for mean and std
    targets: Tensor  # (N,)

    def every(self, step: int) -> Sample:
        return Sample(self.images[::step], self.targets[::step])


@torch.inference_mode()
def logits_of(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor) -> Tensor:
    """(N, classes) float32 on the CPU. mean, std: (1, C, 1, 1) for pixels in [0, 1], where the model is."""
    return torch.cat([model(x).float().cpu() for x in _inputs(sample, mean, std)])


def other_order(logits: Tensor, targets: Tensor, names: Sequence[str]) -> str | None:
    """Whether the outputs are right about other classes than those of their place.

    The assignment of outputs to classes with most hits is found on half of the images and tried on the other half,
    both ways; so nothing is found in outputs that do not tell classes apart, however many classes there are.
    """
    predicted = logits.argmax(1)
    hits, before = _hits_in_best_order(predicted, targets), predicted == targets
    if not clearly_more(hits, before):
        return None
    moved = [(a, b) for a, b in _assignment(predicted, targets) if a != b and _pairs(predicted, targets, a, b) > 1]
    moved.sort(key=lambda pair: -_pairs(predicted, targets, *pair))
    pairs = ", ".join(f"its {names[a]} is {names[b]} here" for a, b in moved[:3])
    return (
        f"With its classes in another order, found on one half of the images, {percent(hits)} of the other half are "
        f"right, not {percent(before)}: {pairs}{', and more' * (len(moved) > 3)}"
    )


def is_order(logits: Tensor, targets: Tensor, rows: Sequence[int]) -> bool:
    """Whether the outputs are clearly better when put in this order, and not clearly worse than in the best one."""
    predicted, put = logits.argmax(1), logits[:, list(rows)].argmax(1) == targets
    best = _hits_in_best_order(predicted, targets)
    return clearly_more(put, predicted == targets) and not clearly_more(best, put)


def _hits_in_best_order(predicted: Tensor, targets: Tensor) -> Tensor:
    """(N,) bool: which are right when outputs are assigned to classes as is best on the other half of the images."""
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))  # labels may take turns
    hits = torch.zeros(len(targets), dtype=torch.bool)
    for half in (0, 1):
        here, there = shuffled[half::2], shuffled[1 - half :: 2]
        assigned = dict(_assignment(predicted[there], targets[there]))
        hits[here] = torch.tensor([assigned.get(int(p), int(p)) for p in predicted[here]]) == targets[here]
    return hits


def _assignment(predicted: Tensor, targets: Tensor) -> list[tuple[int, int]]:
    """(output, class) with most hits, one to one, over those that occur; an output keeps its own class in a tie."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    seen = torch.unique(torch.cat([predicted, targets]))
    counts = torch.eye(len(seen), dtype=torch.float64) / 2
    at = torch.searchsorted(seen, torch.stack([predicted, targets]))
    counts.index_put_((at[0], at[1]), torch.ones(len(targets), dtype=torch.float64), accumulate=True)
    rows, columns = linear_sum_assignment(-counts.numpy())
    return [(int(seen[a]), int(seen[b])) for a, b in zip(rows, columns)]


def _pairs(predicted: Tensor, targets: Tensor, output: int, target: int) -> int:
    return int(((predicted == output) & (targets == target)).sum())


def other_statistics(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor, logits: Tensor) -> str | None:
    """Whether the teacher is clearly better under another mean and std than under those in use, which gave `logits`.

    Tried are `KNOWN` and the sample's own on every fourth image, which costs as much again as `logits` did; what has
    the least loss there is then looked at on all images, if it is less than that in use.
    """
    few = sample.every(4)
    tried = [
        (_loss(logits_of(model, few, m, s), few.targets), name, m, s)
        for name, m, s in _others(KNOWN | {"the images' own": _own(sample)}, mean, std)
    ]
    least, name, m, s = min(tried, key=lambda entry: entry[0])
    if least >= _loss(logits[::4], few.targets):
        return None
    before, after = (x.argmax(1) == sample.targets for x in (logits, logits_of(model, sample, m, s)))
    if not clearly_more(after, before):
        return None
    return (
        f"With mean {_shown(m)}, std {_shown(s)} ({name}) {percent(after)} are right, not {percent(before)}: was it "
        "trained with another mean and std?"
    )


def _others(known: dict[str, Statistics], mean: Tensor, std: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Those that differ from the mean and std in use, shaped as these are."""
    for name, statistics in known.items():
        m, s = (_as_input(values, mean.shape[1]).to(mean) for values in statistics)
        if max((m - mean).abs().max(), (s - std).abs().max()) > 0.02:
            yield name, m, s


def _own(sample: Sample) -> Statistics:
    pixels = sample.images.float() / 255
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).clamp(min=0.01).tolist()
    return tuple(mean), tuple(std)


def _as_input(values: Sequence[float], channels: int) -> Tensor:
    """(1, C, 1, 1); those of three colours averaged for a grey model."""
    tensor = torch.tensor(values)
    return (tensor if len(tensor) == channels else tensor.mean().expand(channels)).view(1, -1, 1, 1)


def _loss(logits: Tensor, targets: Tensor) -> float:
    loss = F.cross_entropy(logits, targets).item()
    return loss if loss == loss else torch.inf


def by_neighbours(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor) -> Tensor:
    """`neighbours` of the model's pooled features. Raises `UserError` for a model that does not pool."""
    return neighbours(features_of(model, sample, mean, std), sample.targets)


@torch.inference_mode()
def features_of(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor) -> Tensor:
    """(N, D) float32 on the CPU, pooled. Raises `UserError` for a model that does not pool."""
    return torch.cat([pooled(model, x).float().cpu() for x in _inputs(sample, mean, std)])


def neighbours(features: Tensor, targets: Tensor) -> Tensor:
    """(N,) bool: which images are of the class of most of their 10 nearest neighbours among the others, weighted.

    features: (N, D), each standardised here over the sample.
    """
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    classes = int(targets.max()) + 1
    votes = knn_predict(features, targets, features, k=NEIGHBOURS, classes=classes, leave_one_out=True)
    return votes.argmax(1) == targets


def better_features(model: nn.Module, sample: Sample, mean: Tensor, std: Tensor, features: Tensor) -> str | None:
    """Whether `neighbours` is clearly better under another of the `KNOWN` means and stds than for these `features`.

    Tried on half of the images; the best of them, if better there than what is in use, is then looked at on all. So it
    costs at most three times what `features` did. The images' own are not among them: new images may suit them better
    than what a right teacher was trained with.
    """
    half = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[: len(features) // 2]
    few = Sample(sample.images[half], sample.targets[half])
    tried = [(int(by_neighbours(model, few, m, s).sum()), name, m, s) for name, m, s in _others(KNOWN, mean, std)]
    most, name, m, s = max(tried, key=lambda entry: entry[0])
    if most <= int(neighbours(features[half], few.targets).sum()):
        return None
    before, after = neighbours(features, sample.targets), by_neighbours(model, sample, m, s)
    if not clearly_more(after, before):
        return None
    return (
        f"With mean {_shown(m)}, std {_shown(s)} ({name}) it is {percent(after)}, not {percent(before)}: was it trained "
        "with another mean and std?"
    )


def _inputs(sample: Sample, mean: Tensor, std: Tensor) -> Iterator[Tensor]:
    return ((part.to(mean.device).float() / 255 - mean) / std for part in sample.images.split(64))


def clearly_more(a: Tensor, b: Tensor) -> bool:
    """a, b: (N,) bool, which images are right."""
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    n = gained + lost
    return gained > lost and 2 * sum(math.comb(n, k) for k in range(lost + 1)) / 2**n < CLEAR


def percent(hits: Tensor) -> str:
    return f"{100 * hits.double().mean().item():.1f} %"


def _shown(values: Tensor) -> str:
    return " ".join(f"{v:.3f}" for v in values.flatten().tolist())
