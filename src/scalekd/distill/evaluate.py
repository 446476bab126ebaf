"""Accuracy on a validation set, by the classifier or by nearest neighbours, and retrieval by the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.data.batches import Batch
from scalekd.heads.knn import knn_predict
from scalekd.heads.retrieval import NEIGHBOURS, figures_of_scores, retrieval_scores
from scalekd.models.features import embedded, with_features
from scalekd.models.inputs import scaled


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    mean: Tensor,
    std: Tensor,
    device: torch.device,
) -> dict[str, float]:
    """{"top1": %, "top5": %, "loss": mean cross entropy in nats, "images": count}, over all processes.

    The mode of the model, training or eval, is restored.

    Args:
        mean, std: `(1, C, 1, 1)`, the normalisation of the model's input for pixels in [0, 1].

    Raises:
        UserError: none of the images can be read.
    """
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    for logits, targets in _passed(model, model, batches, mean, std, device):
        sums += _sums(logits.float(), targets)
    return _shares(sums)


@torch.inference_mode()
def evaluate_features(
    model: nn.Module, batches: Iterable[Batch], mean: Tensor, std: Tensor, device: torch.device
) -> dict[str, float]:
    """{"top1": %, "top5": %, "images": count, "neighbours": k} of a model without a classifier, over all processes.

    Each image is classified by its k nearest neighbours among the other images, by their pooled features (`knn_predict`,
    with its weights and temperature). k is 20, or the number of other images if that is smaller.

    Args:
        mean, std: as for `evaluate`.

    Raises:
        UserError: fewer than two images, or features that are not finite.
    """
    parts = [_kept(pooled, targets) for pooled, targets in _passed(model, model, batches, mean, std, device)]
    return _by_neighbours(*_gathered(parts, device))


@torch.inference_mode()
def evaluate_retrieval(
    model: nn.Module, batches: Iterable[Batch], mean: Tensor, std: Tensor, device: torch.device, classifier: bool
) -> dict[str, float]:
    """The figures of `evaluate` or, without a classifier, of `evaluate_features` by the embeddings; and those of retrieval.

    The images query each other by their embeddings: `figures_of_scores` of `retrieval_scores`, over all processes.

    Args:
        mean, std: as for `evaluate`.
        classifier: whether the model has one.

    Raises:
        UserError: as the two functions.
    """
    both = with_features(model) if classifier else partial(embedded, model)
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    parts = []
    for found, targets in _passed(model, both, batches, mean, std, device):
        if classifier:
            sums += _sums(found[0].float(), targets)
        parts.append(_kept(found[1] if classifier else found, targets))
    embeddings, targets = _gathered(parts, device)
    figures = _shares(sums) if classifier else _by_neighbours(embeddings, targets)
    itself = torch.arange(len(targets), device=device)
    return figures | figures_of_scores(retrieval_scores(embeddings, targets, embeddings, targets, itself))


def _passed(
    model: nn.Module,
    call: Callable[[Tensor], Any],
    batches: Iterable[Batch],
    mean: Tensor,
    std: Tensor,
    device: torch.device,
) -> Iterator[tuple[Any, Tensor]]:
    """What `call` gives for the normalised images of each batch, with the model in eval mode, and the targets."""
    was_training = model.training
    model.eval()
    for batch in batches:
        pixels = scaled(batch.images.to(device, non_blocking=True))
        yield call((pixels - mean) / std), batch.targets.to(device, non_blocking=True)
    model.train(was_training)


def _sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Images that are right, those with their class among the first five, the sum of cross entropies, and images."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(targets), device=logits.device)]).double()


def _shares(sums: Tensor) -> dict[str, float]:
    top1, top5, loss_sum, count = parallel.sum_over_processes(sums).tolist()
    if not count:
        raise UserError("none of the validation images can be read; repair them, or set another data.val")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count, "images": count}


def _kept(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return features.float().cpu().clone(), targets.cpu()  # not a view that keeps all tokens


def _gathered(parts: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and targets of all processes. Raises `UserError` for fewer than two, and for features that are not finite."""
    parts = [part for process in parallel.gather(parts) for part in process]
    if sum(len(targets) for _, targets in parts) < 2:
        raise UserError("validation by nearest neighbours needs two or more readable images; set another data.val")
    features, targets = (torch.cat(tensors).to(device) for tensors in zip(*parts))
    if not features.isfinite().all():
        raise UserError("the student's features of the validation images are not finite; lower optim.lr")
    return features, targets


def _by_neighbours(features: Tensor, targets: Tensor) -> dict[str, float]:
    votes = knn_predict(features, targets, features, k=NEIGHBOURS, classes=int(targets.max()) + 1, leave_one_out=True)
    best = votes.topk(min(5, votes.shape[1]), dim=1)
    hits = (best.indices == targets[:, None]) & (best.values > 0)  # a class without votes is not a prediction
    count = len(targets)
    return {
        "top1": 100 * hits[:, 0].sum().item() / count,
        "top5": 100 * hits.sum().item() / count,
        "images": count,
        "neighbours": min(NEIGHBOURS, count - 1),
    }
