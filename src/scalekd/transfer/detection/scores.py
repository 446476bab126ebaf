"""COCO's average precision of boxes and masks, computed by faster-coco-eval.

faster-coco-eval computes the same as pycocotools in C++ and installs without a compiler; torchmetrics would call one of
the two. Masks are kept as run lengths, so the results of a whole validation set fit in memory and can be sent between
processes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.transfer.tasks import TASKS

from .coco import Coco
from .masks import mask_tools

AREAS = ("ap", "ap_small", "ap_medium", "ap_large")  # in the order of COCO's area ranges


class Detections(NamedTuple):
    """The N objects found in one image, in pixels of its file."""

    picture: int  # index in `Coco.pictures`
    boxes: NDArray[np.float64]  # (N, 4): left, top, width, height, as in COCO
    labels: NDArray[np.int64]  # (N,), from 1
    scores: NDArray[np.float64]  # (N,)
    masks: list[dict[str, Any]] | None  # COCO's compressed RLE; None of a detector without masks


def detections(prediction: dict[str, Tensor], picture: int) -> Detections:
    """Converts a prediction of `Detector.forward` for one image. Mask pixels are those with probability >= 0.5."""
    boxes = prediction["boxes"].detach().cpu().double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    labels, scores = prediction["labels"].cpu().numpy(), prediction["scores"].detach().cpu().double().numpy()
    if "masks" not in prediction:
        return Detections(picture, boxes.numpy(), labels, scores, None)
    # transposed on the device, mostly a GPU, because runs go down the columns
    masks = (prediction["masks"].detach()[:, 0] >= 0.5).to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    runs = mask_tools().encode(masks.transpose(2, 1, 0)) if len(masks) else []
    return Detections(picture, boxes.numpy(), labels, scores, runs)


def merged(results: Sequence[Detections]) -> list[Detections]:
    """The results of all processes in the order of pictures, each picture once."""
    by_picture = {result.picture: result for part in parallel.gather(list(results)) for result in part}
    return [by_picture[picture] for picture in sorted(by_picture)]


def average_precision(coco: Coco, results: Sequence[Detections]) -> dict[str, dict[str, Any]]:
    """COCO's average precision: `{"box": ..., "mask": ...}`, without `mask` if the results have none.

    Each has `ap` (mean over IoU 0.5 to 0.95), `ap50`, `ap75`, `ap_small` (below 32x32 pixels), `ap_medium`, `ap_large`
    (above 96x96), and `classes` with the `ap` of each class. Values are in [0, 1], or None without objects. At most 100
    objects per image count. Detections in crowd regions are not errors.

    Images without a result, which could not be read, are skipped. Raises `UserError` if the extra is missing.
    """
    evaluator, dataset = _tools()
    read = {result.picture for result in results}
    kinds = {"box": "bbox"} if any(result.masks is None for result in results) else {"box": "bbox", "mask": "segm"}
    return {
        kind: _scores(coco, evaluator, dataset(_truth(coco, read)), _entries(results, kind), iou_type)
        for kind, iou_type in kinds.items()
    }


def _tools() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise UserError(TASKS["detection"].missing) from None
    return COCOeval_faster, COCO


def _truth(coco: Coco, pictures: Collection[int]) -> dict[str, Any]:
    """The ground truth in COCO's format, for the pictures with these indices."""
    annotations: list[dict[str, Any]] = []
    for i, picture in enumerate(coco.pictures):
        for instance in picture.instances if i in pictures else ():
            annotations.append(
                {
                    "id": len(annotations) + 1,  # the evaluator uses 0 for "no match"
                    "image_id": i,
                    "category_id": instance.label,
                    "bbox": list(instance.box),
                    "segmentation": instance.mask,
                    "iscrowd": int(instance.crowd),
                    "area": instance.area,
                }
            )
    _fill_areas(annotations, coco)
    return {
        "images": [
            {"id": i, "height": p.height, "width": p.width} for i, p in enumerate(coco.pictures) if i in pictures
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(coco.classes, 1)],
        "annotations": annotations,
    }


def _fill_areas(annotations: list[dict[str, Any]], coco: Coco) -> None:
    """Sets the area of the mask, or else of the box, where the file has none; the classes small, medium and large depend
    on it."""
    rle = mask_tools()
    for entry in annotations:
        if entry["area"] is None:
            picture = coco.pictures[entry["image_id"]]
            runs = entry["segmentation"]
            if runs is None:
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]
                continue
            if isinstance(runs, list):
                runs = rle.merge(rle.frPyObjects(runs, picture.height, picture.width))
            elif isinstance(runs["counts"], list):
                runs = rle.frPyObjects(runs, picture.height, picture.width)
            entry["area"] = float(rle.area(runs))


def _entries(results: Sequence[Detections], kind: str) -> list[dict[str, Any]]:
    """COCO's results format; mask entries have no box, so that an object's size is that of its mask."""
    entries = []
    for result in results:
        shapes = [{"bbox": box.tolist()} for box in result.boxes]
        if kind == "mask":
            shapes = [{"segmentation": mask} for mask in result.masks or []]
        entries += [
            {"image_id": result.picture, "category_id": int(label), "score": float(score)} | shape
            for label, score, shape in zip(result.labels, result.scores, shapes)
        ]
    return entries


def _scores(coco: Coco, evaluator: Any, truth: Any, entries: list[dict[str, Any]], iou_type: str) -> dict[str, Any]:
    evaluation = evaluator(truth, truth.loadRes(entries), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])  # (10 IoUs, 101 recalls, classes, 4 areas, 3 maxDets)
    precision = precision[..., -1]
    scores = {name: _mean(precision[..., area]) for area, name in enumerate(AREAS)}
    scores |= {"ap50": _mean(precision[0, ..., 0]), "ap75": _mean(precision[5, ..., 0])}
    return scores | {"classes": {name: _mean(precision[:, :, k, 0]) for k, name in enumerate(coco.classes)}}


def _mean(values: NDArray[np.float64]) -> float | None:
    """The mean of the values that are not -1, which COCO uses where there is no object."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else None


def percent(share: float | None) -> float | None:
    """A share in [0, 1] as %; None stays None."""
    return None if share is None else 100 * share
