"""Mask R-CNN (arXiv:1703.06870) of torchvision on a `Pyramid`: boxes and masks in two stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from scalekd.transfer.pyramid import STRIDES, Pyramid

from .neck import PyramidFPN

BOX_GRID = 7  # side of the grid that torchvision pools for the box head
LOSSES = {
    "loss_objectness": "rpn_class",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}


def make_mask_rcnn(
    pyramid: Pyramid,
    classes: int,
    *,
    anchors: Sequence[int],
    width: int,
    regions: int,
    proposals: tuple[int, int],
    **transform: Any,
) -> MaskRCNN:
    """The model with its FPN of the strides 4 to 64. Arguments: those of `Detector`; `transform` is torchvision's."""
    model = MaskRCNN(
        PyramidFPN(pyramid, width, LastLevelMaxPool()),
        box_head=TwoMLPHead(width * BOX_GRID**2, 4 * width),
        box_predictor=FastRCNNPredictor(4 * width, classes + 1),
        mask_head=MaskRCNNHeads(width, [width] * 4, 1),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
        box_batch_size_per_image=regions,
        rpn_post_nms_top_n_train=proposals[0],
        rpn_post_nms_top_n_test=proposals[1],
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in anchors), ((0.5, 1.0, 2.0),) * len(anchors)),
        **transform,
    )
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        _set_strides(pool)
    return model


def _set_strides(pool: Any) -> None:
    """Sets the strides of the FPN's maps. torchvision estimates them from the first images and keeps them: after small
    images, such as 33 to 45 pixels high, it would pool all boxes from wrong positions."""
    pool.scales = [1 / stride for stride in STRIDES]
    first, last = (stride.bit_length() - 1 for stride in (STRIDES[0], STRIDES[-1]))
    pool.map_levels = initLevelMapper(first, last, pool.canonical_scale, pool.canonical_level)
