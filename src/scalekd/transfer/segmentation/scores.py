"""Inference on whole images or with sliding windows; confusion matrix, IoU and accuracies."""

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
from scalekd.models.inputs import scaled

from .pairs import IGNORED

Inference = Callable[[nn.Module, Tensor], Tensor]  # model, x (B, C, H, W) normalised -> logits (B, K, H, W)

# ---------------------------------------------------------------- inference


def whole(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (B, K, H, W) in one forward pass."""
    return model(x)


def sliding(
    model: nn.Module, x: Tensor, crop: tuple[int, int] = (512, 512), stride: tuple[int, int] = (341, 341)
) -> Tensor:
    """Logits (B, K, H, W): the mean over all windows that contain a pixel.

    crop, stride: (height, width) in pixels. The last window of a row or column is moved back to end with the image; a
    side shorter than the crop has one window of its own length. The default stride is two thirds of the crop, as in
    mmsegmentation's UPerNet with ConvNeXt on ADE20K.
    """
    height, width = x.shape[-2:]
    summed: Tensor | None = None
    times = torch.zeros(1, 1, height, width, device=x.device)
    for top in window_starts(height, crop[0], stride[0]):
        for left in window_starts(width, crop[1], stride[1]):
            window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            logits = model(x[window]).float()
            if summed is None:
                summed = logits.new_zeros(len(x), logits.shape[1], height, width)
            summed[window] += logits
            times[window] += 1
    assert summed is not None  # there is at least one window
    return summed / times


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Starts of windows that cover all of `length`."""
    if not 0 < stride <= crop:
        raise UserError(f"sliding windows of {crop} pixels need a stride from 1 to {crop}, not {stride}")
    last = max(0, length - crop)
    return [*range(0, last, stride), last]


def make_inference(mode: str, crop: tuple[int, int], stride: tuple[int, int] | None = None) -> Inference:
    """`whole`, or `sliding` with this crop and stride, by default two thirds of it. Raises `UserError`."""
    if mode not in ("whole", "sliding"):
        raise UserError(f"`inference` must be whole or sliding, not {mode}")
    if mode == "whole":
        return whole
    return partial(sliding, crop=crop, stride=stride or (max(1, 2 * crop[0] // 3), max(1, 2 * crop[1] // 3)))


def classes_of(logits: Tensor, size: tuple[int, int], at_once: int = 8) -> Tensor:
    """Logits (B, K, h, w) to the most likely class of each pixel at (height, width) `size`: (B, H, W) int64.

    Enlarges `at_once` classes at a time: 150 classes of a photo would take 7 GB.
    """
    best: Tensor | None = None
    classes = torch.zeros(0)
    for first in range(0, logits.shape[1], at_once):
        part = logits[:, first : first + at_once]
        values, indices = F.interpolate(part, size, mode="bilinear", align_corners=False).max(1)
        if best is None:
            best, classes = values, indices
        else:
            better = values > best
            best, classes = torch.where(better, values, best), torch.where(better, indices + first, classes)
    return classes


# ---------------------------------------------------------------- scores


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(K, K) int64 pixel counts: rows are true classes, columns predicted ones. Ignored pixels are not counted.

    predicted, truth: integers of one shape; truth's classes from 0, or `IGNORED`.
    """
    counted = truth != IGNORED
    both = classes * truth[counted].long() + predicted[counted].long()
    return torch.bincount(both, minlength=classes**2).view(classes, classes)


def scores(matrix: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """{"miou", "pixel_accuracy", "mean_accuracy": %, "pixels", "classes_counted", "per_class": [...]}.

    matrix: of `confusion_matrix`. The IoU of a class is the number of its pixels predicted as this class, divided by
    the number of pixels that belong to it or were predicted as it; its accuracy is the share of its pixels predicted as
    it. A class in neither truth nor predictions has no IoU (None) and does not count in mIoU; a class that is not in
    the truth has no accuracy and does not count in the mean accuracy. Raises `UserError` if no pixel has a class.
    """
    counts = matrix.double().cpu()
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    pixels = int(true.sum())
    if not pixels:
        raise UserError("all pixels of the validation masks are ignored; use masks with classes")
    union = true + predicted - hits
    iou, accuracy = 100 * hits / union, 100 * hits / true  # nan for classes without pixels
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
    """The result of `scores` as a Markdown table, in the order of classes."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = [(r["class"], r["iou"], r["accuracy"], r["pixels"]) for r in result["per_class"]]
    rows.append((f"mean of {result['classes_counted']}", result["miou"], result["mean_accuracy"], result["pixels"]))
    lines = ["| class | IoU % | accuracy % | pixels |", "|---|---|---|---|"]
    return "\n".join([*lines, *(table_row([name, cell(a), cell(b), str(n)]) for name, a, b, n in rows)]) + "\n"


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    mean: Tensor,
    std: Tensor,
    device: torch.device,
    names: Sequence[str],
    inference: Inference = whole,
) -> dict[str, Any]:
    """`scores` over the batches of all processes. Logits are enlarged to the masks' original size.

    mean, std: (1, C, 1, 1) of the model's input for pixels in [0, 1]. The model's mode is restored.
    """
    was_training = model.training
    model.eval()
    matrix = torch.zeros(len(names), len(names), dtype=torch.int64, device=device)
    for batch in batches:
        pixels = scaled(batch.images.to(device, non_blocking=True))
        truth = batch.targets.to(device, non_blocking=True)
        logits = inference(model, (pixels - mean) / std)
        predicted = classes_of(logits.float(), (truth.shape[-2], truth.shape[-1]))
        matrix += confusion_matrix(predicted, truth, len(names))
    model.train(was_training)
    return scores(parallel.sum_over_processes(matrix), names)
