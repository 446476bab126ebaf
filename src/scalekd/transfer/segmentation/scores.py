"""From logits to classes, on whole images or through a sliding window; confusion matrix, IoU and accuracies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.markdown import table_row
from scalekd.data.batches import Batch

from .pairs import IGNORED

Inference = Callable[[nn.Module, Tensor], Tensor]  # model, x (B, C, H, W) normalised -> logits (B, K, H, W)

# ---------------------------------------------------------------- inference


def whole(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def sliding(
    model: nn.Module, x: Tensor, crop: tuple[int, int] = (512, 512), stride: tuple[int, int] = (341, 341)
) -> Tensor:
    """Logits (B, K, H, W): the mean over all windows that a pixel is in.

    crop, stride: (height, width) in pixels. The last window of a row or column is moved back so that it ends with the
    image; a side shorter than the crop has one window of its own length. Defaults: those of
    mmsegmentation's UPerNet with ConvNeXt on ADE20K, two thirds of the crop.
    """
    height, width = x.shape[-2:]
    summed: Tensor | None = None
    times = torch.zeros(1, 1, height, width, device=x.device)
    for top in _starts(height, crop[0], stride[0]):
        for left in _starts(width, crop[1], stride[1]):
            place = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            logits = model(x[place]).float()
            if summed is None:
                summed = logits.new_zeros(len(x), logits.shape[1], height, width)
            summed[place] += logits
            times[place] += 1
    assert summed is not None  # there is always a window
    return summed / times


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin so that all of `length` is covered."""
    if not 0 < stride <= crop:
        raise UserError(f"sliding windows of {crop} pixels need a stride from 1 to {crop}, not {stride}")
    last = max(0, length - crop)
    return [*range(0, last, stride), last]


def inference(mode: str, crop: tuple[int, int], stride: tuple[int, int] | None = None) -> Inference:
    """`whole`, or `sliding` with this crop; a stride of two thirds of it unless given. Raises `UserError`."""
    if mode not in ("whole", "sliding"):
        raise UserError(f"inference is whole or sliding, not {mode}")
    if mode == "whole":
        return whole
    return partial(sliding, crop=crop, stride=stride or (max(1, 2 * crop[0] // 3), max(1, 2 * crop[1] // 3)))


def classes_of(logits: Tensor, size: tuple[int, int], at_once: int = 8) -> Tensor:
    """Logits (B, K, h, w) to the likeliest class of each pixel at (height, width) `size`: (B, H, W) int64.

    A few classes are enlarged at a time: a photo's logits of 150 classes would fill 7 GB.
    """
    best: Tensor | None = None
    where = torch.zeros(0)
    for first in range(0, logits.shape[1], at_once):
        part = logits[:, first : first + at_once]
        values, places = F.interpolate(part, size, mode="bilinear", align_corners=False).max(1)
        if best is None:
            best, where = values, places
        else:
            better = values > best
            best, where = torch.where(better, values, best), torch.where(better, places + first, where)
    return where


# ---------------------------------------------------------------- what the predictions are worth


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(K, K) int64 pixel counts: row is the true class, column the predicted one. Ignored pixels are left out.

    predicted, truth: integers of one shape; truth's classes from 0, or `IGNORED`.
    """
    counted = truth != IGNORED
    both = classes * truth[counted].long() + predicted[counted].long()
    return torch.bincount(both, minlength=classes**2).view(classes, classes)


def scores(matrix: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """{"miou", "pixel_accuracy", "mean_accuracy": %, "pixels", "classes_counted", "per_class": [...]}.

    IoU of a class: pixels that are it and were called it / pixels that are it or were called it. Accuracy of a class:
    the share of its pixels that were called it. A class that is neither in the truth nor predicted has no IoU (None)
    and is left out of mIoU; one that is not in the truth has no accuracy and is left out of the mean accuracy.
    Raises `UserError` when there is no pixel with a class.
    """
    counts = matrix.double().cpu()
    hits, true, called = counts.diagonal(), counts.sum(1), counts.sum(0)
    pixels = int(true.sum())
    if not pixels:
        raise UserError("no pixel of the validation masks has a class; all are ignored")
    union = true + called - hits
    iou, accuracy = 100 * hits / union, 100 * hits / true  # nan where there is nothing
    per_class = [
        {
            "class": name,
            "iou": float(iou[c]) if union[c] else None,
            "accuracy": float(accuracy[c]) if true[c] else None,
            "pixels": int(true[c]),
        }
        for c, name in enumerate(names)
    ]
    return {
        "miou": float(iou[union > 0].mean()),
        "pixel_accuracy": 100 * float(hits.sum()) / pixels,
        "mean_accuracy": float(accuracy[true > 0].mean()),
        "pixels": pixels,
        "classes_counted": int((union > 0).sum()),
        "per_class": per_class,
    }


def table(result: dict[str, Any]) -> str:
    """`scores` as a Markdown table, the classes in their own order."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = [(r["class"], r["iou"], r["accuracy"], r["pixels"]) for r in result["per_class"]]
    rows.append((f"mean of {result['classes_counted']}", result["miou"], result["mean_accuracy"], result["pixels"]))
    lines = ["| class | IoU % | accuracy % | pixels |", "|---|---|---|---|"]
    return "\n".join([*lines, *(table_row([name, shown(a), shown(b), str(n)]) for name, a, b, n in rows)]) + "\n"


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    mean: Tensor,
    std: Tensor,
    device: torch.device,
    names: Sequence[str],
    how: Inference = whole,
) -> dict[str, Any]:
    """`scores` over all processes. Logits are enlarged to the masks' own size, as they are before any resizing.

    mean, std: (1, C, 1, 1) of the model's input for pixels in [0, 1]. The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    matrix = torch.zeros(len(names), len(names), dtype=torch.int64, device=device)
    for batch in batches:
        pixels = batch.images.to(device, non_blocking=True).float() / 255
        truth = batch.targets.to(device, non_blocking=True)
        logits = how(model, (pixels - mean) / std)
        predicted = classes_of(logits.float(), (truth.shape[-2], truth.shape[-1]))
        matrix += confusion_matrix(predicted, truth, len(names))
    model.train(was_training)
    return scores(parallel.sum_over_processes(matrix), names)
