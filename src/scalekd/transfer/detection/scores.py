"""COCO's average precision of boxes and masks, by faster-coco-eval.

Its C++ does what pycocotools does and needs no compiler to install; torchmetrics would call one of the two. Results are
kept as runs, not pixels, so those of a whole validation set fit in memory and can be sent between processes.
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


class Found(NamedTuple):
    """What was found in one image, N objects, in the pixels of its file."""

    picture: int  # its place in `Coco.pictures`
    boxes: NDArray[np.float64]  # (N, 4): left, top, width, height, as COCO has them
    labels: NDArray[np.int64]  # (N,), from 1
    scores: NDArray[np.float64]  # (N,)
    masks: list[dict[str, Any]]  # COCO's RLE, compressed


def found(prediction: dict[str, Tensor], picture: int) -> Found:
    """Of a detector's prediction for one image (`Detector.forward`). A pixel is in a mask from probability 0.5 on."""
    boxes = prediction["boxes"].detach().cpu().double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    # turned where they are, a GPU as a rule: runs go down the columns
    masks = (prediction["masks"].detach()[:, 0] >= 0.5).to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    runs = mask_tools().encode(masks.transpose(2, 1, 0)) if len(masks) else []
    labels, scores = prediction["labels"].cpu().numpy(), prediction["scores"].detach().cpu().double().numpy()
    return Found(picture, boxes.numpy(), labels, scores, runs)


def merged(results: Sequence[Found]) -> list[Found]:
    """The results of all processes, by picture, each picture once."""
    every = {result.picture: result for part in parallel.gather(list(results)) for result in part}
    return [every[picture] for picture in sorted(every)]


def average_precision(coco: Coco, results: Sequence[Found]) -> dict[str, dict[str, Any]]:
    """`{"box": ..., "mask": ...}`, each with `ap` (mean over IoU 0.5 to 0.95), `ap50`, `ap75`, `ap_small` (below 32x32
    pixels), `ap_medium`, `ap_large` (above 96x96), and `classes`, the `ap` of each; shares in [0, 1], None where there
    is no object. At most 100 objects an image count. Crowd regions are ignored: what lies in them is no error.

    An image without a result, which could not be read, is left out. Raises `UserError` without the extra.
    """
    evaluator, dataset = _tools()
    seen = {result.picture for result in results}
    return {
        kind: _scores(coco, evaluator, dataset(_truth(coco, seen)), _entries(results, kind), iou_type)
        for kind, iou_type in (("box", "bbox"), ("mask", "segm"))
    }


def _tools() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise UserError(TASKS["detection"].missing) from None
    return COCOeval_faster, COCO


def _truth(coco: Coco, seen: Collection[int]) -> dict[str, Any]:
    """In COCO's format, of the pictures whose places are in `seen`."""
    annotations: list[dict[str, Any]] = []
    for place, picture in enumerate(coco.pictures):
        for instance in picture.instances if place in seen else ():
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 would mean that nothing was matched
                    "image_id": place,
                    "category_id": instance.label,
                    "bbox": list(instance.box),
                    "segmentation": instance.mask,
                    "iscrowd": int(instance.crowd),
                    "area": instance.area,
                }
            )
    _fill_areas(annotations, coco)
    return {
        "images": [{"id": i, "height": p.height, "width": p.width} for i, p in enumerate(coco.pictures) if i in seen],
        "categories": [{"id": label, "name": name} for label, name in enumerate(coco.classes, 1)],
        "annotations": annotations,
    }


def _fill_areas(annotations: list[dict[str, Any]], coco: Coco) -> None:
    """Of the masks, where the file has none: small, medium and large depend on it."""
    rle = mask_tools()
    for entry in annotations:
        if entry["area"] is None:
            picture = coco.pictures[entry["image_id"]]
            runs = entry["segmentation"]
            if isinstance(runs, list):
                runs = rle.merge(rle.frPyObjects(runs, picture.height, picture.width))
            elif isinstance(runs["counts"], list):
                runs = rle.frPyObjects(runs, picture.height, picture.width)
            entry["area"] = float(rle.area(runs))


def _entries(results: Sequence[Found], kind: str) -> list[dict[str, Any]]:
    """In COCO's results format; without boxes for masks, so that an object's size is that of its mask."""
    return [
        {"image_id": result.picture, "category_id": int(label), "score": float(score)}
        | ({"bbox": box.tolist()} if kind == "box" else {"segmentation": mask})
        for result in results
        for label, score, box, mask in zip(result.labels, result.scores, result.boxes, result.masks)
    ]


def _scores(coco: Coco, evaluator: Any, truth: Any, entries: list[dict[str, Any]], iou_type: str) -> dict[str, Any]:
    run = evaluator(truth, truth.loadRes(entries), iou_type)
    run.evaluate()
    run.accumulate()
    precision = np.asarray(run.eval["precision"])  # (10 IoUs, 101 recalls, classes, 4 areas, 3 limits of detections)
    precision = precision[..., -1]
    scores = {name: _mean(precision[..., area]) for area, name in enumerate(AREAS)}
    scores |= {"ap50": _mean(precision[0, ..., 0]), "ap75": _mean(precision[5, ..., 0])}
    return scores | {"classes": {name: _mean(precision[:, :, k, 0]) for k, name in enumerate(coco.classes)}}


def _mean(values: NDArray[np.float64]) -> float | None:
    """Of those that are not -1, COCO's mark for what has no object."""
    there = values[values > -1]
    return float(there.mean()) if there.size else None


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
