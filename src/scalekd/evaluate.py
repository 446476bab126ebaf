"""Top-1 and top-5 on a validation set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import parallel
from .data import Batch
from .errors import UserError


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
