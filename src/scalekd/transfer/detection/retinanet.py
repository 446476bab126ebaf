"""RetinaNet (arXiv:1708.02002) of torchvision on a `Pyramid`: boxes in one stage, which ONNX runtimes can run whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from scalekd.transfer.pyramid import Pyramid

from .neck import PyramidFPN

DETECTIONS = 100  # objects per image, as many as COCO counts
LOSSES = {"classification": "class", "bbox_regression": "box"}


def make_retinanet(pyramid: Pyramid, classes: int, *, anchors: Sequence[int], width: int, **transform: Any) -> RetinaNet:
    """The model with its FPN of the strides 8 to 128. Arguments: those of `Detector`; `transform` is torchvision's.

    The pyramid starts at stride 8. Each position has nine anchors: three sizes, a third of an octave apart, in three
    shapes, as in the paper.
    """
    sizes = tuple(tuple(int(side * 2 ** (third / 3)) for third in range(3)) for side in anchors)
    return RetinaNet(
        PyramidFPN(pyramid, width, LastLevelP6P7(width, width)),
        classes + 1,  # label 0 is never used: labels are those of Mask R-CNN
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        detections_per_img=DETECTIONS,
        **transform,
    )
