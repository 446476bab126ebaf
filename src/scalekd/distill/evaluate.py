"""Top-1 and top-5 on a validation set, by the model's classifier or by its features' nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.data.batches import Batch
from scalekd.heads.knn import knn_predict

NEIGHBOURS = 20


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    mean: Tensor,
    std: Tensor,
    device: torch.device,
) -> dict[str, float]:
    """{"top1": %, "top5": %, "loss": mean cross-entropy, "images": count}, over all processes.

    mean, std: (1, C, 1, 1) of the model's input for pixels in [0, 1].
    The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    for batch in batches:
        pixels = batch.images.to(device, non_blocking=True).float() / 255
        targets = batch.targets.to(device, non_blocking=True)
        logits = model((pixels - mean) / std).float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(targets), device=device)]).double()
    model.train(was_training)
    top1, top5, loss_sum, count = parallel.sum_over_processes(sums).tolist()
    if not count:
        raise UserError("none of the validation images can be read; mend them, or name another data.val")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count, "images": count}


@torch.inference_mode()
def evaluate_features(
    model: nn.Module, batches: Iterable[Batch], mean: Tensor, std: Tensor, device: torch.device
) -> dict[str, float]:
    """{"top1": %, "top5": %, "images": count, "neighbours": k} of a model without a classifier, over all processes.

    Every image is classified by the k nearest of the others, of what the model's pooling gives (`knn_predict`, with its
    weights and temperature; k is 20, or all others where there are fewer). mean, std: as for `evaluate`.
    Raises `UserError` for fewer than two images, and for features that are not finite.
    """
    was_training = model.training
    model.eval()
    found = []
    for batch in batches:
        pixels = batch.images.to(device, non_blocking=True).float() / 255
        pooled = model((pixels - mean) / std).float().cpu().clone()  # not a view that keeps all tokens
        found.append((pooled, batch.targets))
    model.train(was_training)
    of_all = [pair for of_one in parallel.gather(found) for pair in of_one]
    if sum(len(targets) for _, targets in of_all) < 2:
        raise UserError("validation by neighbours needs two readable images or more; name another data.val")
    features, targets = (torch.cat(parts).to(device) for parts in zip(*of_all))
    if not features.isfinite().all():
        raise UserError("the student's features of the validation images are not finite")
    votes = knn_predict(features, targets, features, k=NEIGHBOURS, classes=int(targets.max()) + 1, leave_one_out=True)
    best = votes.topk(min(5, votes.shape[1]), dim=1)
    hits = (best.indices == targets[:, None]) & (best.values > 0)  # a class without a vote was not named
    count = len(targets)
    return {
        "top1": 100 * hits[:, 0].sum().item() / count,
        "top5": 100 * hits.sum().item() / count,
        "images": count,
        "neighbours": min(NEIGHBOURS, count - 1),
    }
