"""The logits of a model for validation images with sets of labels; common/set_figures.py has their figures."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.set_figures import Scores
from scalekd.data.batches import Batch
from scalekd.models.inputs import scaled


def scores_of(model: nn.Module, batches: Iterable[Batch], mean: Tensor, std: Tensor, device: torch.device) -> Scores:
    """The scores of all images, of all processes. The mode of the model is restored.

    mean, std: `(1, C, 1, 1)`, the normalisation of the model's input for pixels in [0, 1]. Raises `UserError` if none of
    the images can be read, or none has a label.
    """
    was_training = model.training
    model.eval()
    parts = []
    with torch.inference_mode():
        for batch in batches:
            pixels = scaled(batch.images.to(device, non_blocking=True))
            logits = model((pixels - mean) / std).float().cpu()
            parts.append((logits.numpy(), batch.targets.numpy() > 0.5))
    model.train(was_training)
    gathered = [part for process in parallel.gather(parts) for part in process]
    if not gathered:
        raise UserError("none of the validation images can be read; repair them, or set another data.val")
    logits, truth = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*gathered))
    if not truth.any():
        raise UserError("none of the validation images has a label, so there is no mAP; set another data.val")
    return Scores(logits, truth)
