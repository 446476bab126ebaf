"""Top-1 and top-5 accuracy on a validation set, by the classifier or by nearest neighbours of the features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.data.batches import Batch
from scalekd.heads.knn import knn_predict
from scalekd.models.inputs import scaled

NEIGHBOURS = 20


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
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    for batch in batches:
        pixels = scaled(batch.images.to(device, non_blocking=True))
        targets = batch.targets.to(device, non_blocking=True)
        logits = model((pixels - mean) / std).float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(targets), device=device)]).double()
    model.train(was_training)
    top1, top5, loss_sum, count = parallel.sum_over_processes(sums).tolist()
    if not count:
        raise UserError("none of the validation images can be read; repair them, or set another data.val")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count, "images": count}


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
    was_training = model.training
    model.eval()
    parts = []
    for batch in batches:
        pixels = scaled(batch.images.to(device, non_blocking=True))
        pooled = model((pixels - mean) / std).float().cpu().clone()  # not a view that keeps all tokens
        parts.append((pooled, batch.targets))
    model.train(was_training)
    parts = [part for process in parallel.gather(parts) for part in process]
    if sum(len(targets) for _, targets in parts) < 2:
        raise UserError("validation by nearest neighbours needs two or more readable images; set another data.val")
    features, targets = (torch.cat(tensors).to(device) for tensors in zip(*parts))
    if not features.isfinite().all():
        raise UserError("the student's features of the validation images are not finite; lower optim.lr")
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
