"""RetinaNet (arXiv:1708.02002) of torchvision on a `Pyramid`: boxes in one stage, which ONNX runtimes can run whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from scalekd.transfer.pyramid import Pyramid

from .neck import PyramidFPN

DETECTIONS = 100  # objects per image, as many as COCO counts
LOSSES = {"classification": "class", "bbox_regression": "box"}


class LabelsFromOne(RetinaNet):
    """torchvision's RetinaNet with the labels 1, 2, ... of `Coco`, and an output for each of them.

    torchvision's own labels start at 0, for which its models of COCO have an output without a class.
    """

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if targets is not None:
            targets = [target | {"labels": target["labels"] - 1} for target in targets]
        result = super().forward(images, targets)
        return result if self.training else [found | {"labels": found["labels"] + 1} for found in result]


def make_retinanet(
    pyramid: Pyramid, classes: int, *, anchors: Sequence[int], width: int, **transform: Any
) -> LabelsFromOne:
    """The model with its FPN of the strides 8 to 128. Arguments: those of `Detector`; `transform` is torchvision's.

    The pyramid starts at stride 8. Each position has nine anchors: three sizes, a third of an octave apart, in three
    shapes, as in the paper.
    """
    sizes = tuple(tuple(int(side * 2 ** (third / 3)) for third in range(3)) for side in anchors)
    return LabelsFromOne(
        PyramidFPN(pyramid, width, LastLevelP6P7(width, width)),
        classes,
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        detections_per_img=DETECTIONS,
        **transform,
    )
