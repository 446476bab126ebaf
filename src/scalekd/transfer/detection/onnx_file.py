"""Writes a trained RetinaNet as one ONNX file, from the pixels of an image to its boxes, and compares the two."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from scalekd.common.errors import UserError
from scalekd.models.inputs import scaled
from scalekd.models.student_file import onnx_runtime, save_onnx
from scalekd.transfer.pyramid import Size

from .model import Detector

INPUT, OUTPUTS = "image", ("boxes", "scores", "labels")
IMAGES = 2  # random images that are compared
NEAR_PIXELS, NEAR_SCORE = 0.1, 1e-3  # boxes and scores that differ by less are equal
NEAR_OVERLAP = 0.01  # so much below the threshold of NMS, rounding may decide
TIMED = 5  # runs of which the median time is told
Objects = tuple[Tensor, Tensor, Tensor]  # boxes (N, 4), scores (N,), labels (N,)


class Written(NamedTuple):
    """What `write_onnx` found."""

    compared: int  # objects that the detector found in the compared images
    equal: int  # those that the file found too; the others are ties, see `explained`
    milliseconds: float  # per image under onnxruntime on this CPU


class OneSize(nn.Module):
    """A detector for images of one size, without a branch that depends on the pixels: what is exported.

    `(1, C, H, W)` uint8 to the 100 best objects after non-maximum suppression, best first, as `OUTPUTS`: boxes (N, 4) left,
    top, right, bottom in the image's pixels, float32; scores (N,); labels (N,) int64 from 1. These are the objects of
    `Detector.forward`, which leaves out those with a score of 0.05 or less, and more.

    Args:
        detector: a `Detector` with a RetinaNet, in evaluation mode.
        size: (height, width) in pixels of the images.

    Raises:
        UserError: if resizing would leave no short side.
    """

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor
    anchors: Tensor  # (A, 4) of all levels
    model: Any

    def __init__(self, detector: Detector, size: Size):
        super().__init__()
        self.model, self.size = detector.student, size
        transform = self.model.transform
        scale = min(min(transform.min_size) / min(size), transform.max_size / max(size))
        # as in torchvision's GeneralizedRCNNTransform
        self.resized = (math.floor(size[0] * scale), math.floor(size[1] * scale))
        if min(self.resized) < 1:
            raise UserError(f"images of {size[0]}x{size[1]} pixels are too narrow: resizing would leave no short side")
        unit = transform.size_divisible
        self.canvas = tuple(math.ceil(side / unit) * unit for side in self.resized)
        self.classes: int = self.model.head.classification_head.num_classes
        for name in ("mean", "std"):
            values = torch.tensor(getattr(transform, f"image_{name}")).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        anchors, self.counts = self._anchors()
        self.register_buffer("anchors", anchors, persistent=False)

    def _anchors(self) -> tuple[Tensor, list[int]]:
        """The anchors of all levels, (A, 4), and how many each level has."""
        pixels = torch.zeros(1, self.mean.shape[1], *self.canvas)
        with torch.no_grad():
            maps = list(self.model.backbone(pixels).values())
        (anchors,) = self.model.anchor_generator(ImageList(pixels, [self.resized]), maps)
        each = self.model.anchor_generator.num_anchors_per_location()
        return anchors, [m.shape[-2] * m.shape[-1] * n for m, n in zip(maps, each)]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = (scaled(image) - self.mean) / self.std
        if self.resized != self.size:
            pixels = F.interpolate(pixels, self.resized, mode="bilinear", align_corners=False)
        pixels = F.pad(pixels, (0, self.canvas[1] - self.resized[1], 0, self.canvas[0] - self.resized[0]))
        outputs = self.model.head(list(self.model.backbone(pixels).values()))
        parts = [
            self._best(*level)
            for level in zip(
                torch.split(outputs["cls_logits"][0], self.counts),
                torch.split(outputs["bbox_regression"][0], self.counts),
                torch.split(self.anchors, self.counts),
            )
        ]
        boxes, scores, labels = (torch.cat(part) for part in zip(*parts))
        # NMS within each class: objects of different classes are moved apart
        apart = boxes + (labels * (max(self.resized) + 1)).to(boxes)[:, None]
        kept = nms(apart, scores, self.model.nms_thresh)[: self.model.detections_per_img]
        ratio = torch.tensor([self.size[1] / self.resized[1], self.size[0] / self.resized[0]]).repeat(2)
        return boxes[kept] * ratio.to(boxes), scores[kept], labels[kept]

    def _best(self, logits: Tensor, shifts: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best objects of a level: boxes within the resized image, scores, labels. logits: (A, classes)."""
        scores = logits.sigmoid().flatten()
        scores, places = scores.topk(min(self.model.topk_candidates, scores.shape[0]))
        at = places // self.classes
        boxes = self.model.box_coder.decode_single(shifts[at], anchors[at])
        return clip_boxes_to_image(boxes, self.resized), scores, places % self.classes + 1


def write_onnx(detector: Detector, card: dict[str, Any], size: Size, path: Path) -> Written:
    """Writes `path` for images of `size` (height, width) in pixels, and compares it under onnxruntime with the detector.

    The file holds the card, with the key `input_size`, in its metadata.
    Raises `UserError` for a detector with masks, if the extra is missing, if the file cannot be written, and if it finds
    other objects that no tie explains: then it is removed.
    """
    if detector.has_masks:
        raise UserError(
            "a Mask R-CNN cannot be exported to ONNX: its mask head runs on as many regions as it finds. Train with "
            "detector.kind=retinanet"
        )
    runtime = onnx_runtime(exporting=True)
    model = OneSize(detector.eval(), size).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(card["mean"]), *size)
    images = [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for _ in range(IMAGES)]
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            model, (images[0],), dynamo=True, input_names=[INPUT], output_names=[*OUTPUTS], verbose=False
        )
        expected: list[Objects] = [model(image) for image in images]
    assert program is not None
    save_onnx(program, path, card | {"input_size": list(size)})
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compared = same = missed = 0
    for image, wanted in zip(images, expected):
        boxes, scores, labels = map(torch.from_numpy, session.run(None, {INPUT: image.numpy()}))
        found, overlap = (boxes, scores, labels), detector.student.nms_thresh - NEAR_OVERLAP
        compared += len(wanted[1])
        same += int(equal(wanted, found).sum())
        missed += int((~(equal(wanted, found) | explained(wanted, found, overlap))).sum())
    if missed:
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path}: {missed} of {compared} objects of the detector are not found under onnxruntime; the file was removed. "
            "Use detector.safetensors, or other versions of onnxruntime and onnxscript"
        )
    return Written(compared, same, _milliseconds(session, images[0]))


def equal(wanted: Objects, found: Objects) -> Tensor:
    """`(N,)`: which of the wanted objects were found, in any order."""
    boxes = (wanted[0][:, None] - found[0][None]).abs().amax(dim=2) < NEAR_PIXELS
    scores = (wanted[1][:, None] - found[1][None]).abs() < NEAR_SCORE
    return (boxes & scores & (wanted[2][:, None] == found[2][None])).any(dim=1)


def explained(wanted: Objects, found: Objects, overlap: float) -> Tensor:
    """`(N,)`: which of the wanted objects rounding may replace, because of equal scores.

    Their score is that of the last object found; or an object that was found, of the same class and with a score at least
    as high, overlaps them by `overlap` or more, so that NMS keeps only one of the two.
    """
    last = wanted[1] < found[1].min() + NEAR_SCORE if len(found[1]) else torch.zeros_like(wanted[1], dtype=torch.bool)
    rivals = (wanted[2][:, None] == found[2][None]) & (found[1][None] > wanted[1][:, None] - NEAR_SCORE)
    return last | (rivals & (box_iou(wanted[0], found[0]) >= overlap)).any(dim=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torchvision and onnxscript say of their own inner workings."""
    folding = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = folding.level
    folding.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        folding.setLevel(level)


def _milliseconds(session: Any, image: Tensor) -> float:
    times = []
    for _ in range(TIMED):
        began = time.perf_counter()
        session.run(None, {INPUT: image.numpy()})
        times.append(1000 * (time.perf_counter() - began))
    return median(times)
