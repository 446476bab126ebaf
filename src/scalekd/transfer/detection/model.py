"""Mask R-CNN (arXiv:1703.06870), torchvision's, with its FPN on any timm backbone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from scalekd.common.errors import UserError
from scalekd.data.transforms import Statistic
from scalekd.transfer.pyramid import STRIDES, Pyramid

BOX_GRID = 7  # positions along a side of what torchvision pools for the box head


class PyramidFPN(nn.Module):
    """`Pyramid` under torchvision's FPN: x `(B, C, H, W)` to five maps `(B, width, ...)` of the strides 4 to 64."""

    def __init__(self, pyramid: Pyramid, width: int):
        super().__init__()
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(pyramid.channels, width, LastLevelMaxPool())
        self.out_channels = width  # where torchvision looks

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.pyramid(x))))


class Detector(nn.Module):
    """What is trained; `student` is torchvision's `MaskRCNN`, and all of what is deployed.

    pyramid: with the backbone. classes: without the background. mean, std: the backbone's, for pixels in [0, 1].
    short, long: pixels of an image's sides in evaluation, in proportion: the short one, unless the long one got longer
    than `long`. Training images come resized (`detection_data.Scales`). A backbone of one size takes only what fits:
    `limit` pixels, the longest side of any image, is then also what evaluation images are resized to; else None.
    anchors: pixels, the side of an anchor at each of the five strides; smaller for smaller objects than COCO's.
    freeze_norms: batch norms of the backbone keep the statistics that they came with, as usual for a pre-trained one in
    batches of a few images; their scales and shifts are trained. Not for a backbone from scratch.
    width: channels of the FPN and of the mask head; the box head has four times as many. 256 is the usual one.
    regions: of an image, how many the box head learns from, a quarter of them on objects where there are as many.
    proposals: of an image, how many the box head chooses among, in training and in evaluation.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        classes: int,
        mean: Statistic,
        std: Statistic,
        *,
        short: int = 800,
        long: int = 1333,
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        freeze_norms: bool = True,
        width: int = 256,
        regions: int = 512,
        proposals: tuple[int, int] = (2000, 1000),
    ):
        super().__init__()
        self.freeze_norms = freeze_norms
        self.limit: int | None = None
        if pyramid.canvas is not None:
            # a batch is padded to whole strides, and must still fit
            self.limit = min(pyramid.canvas) // STRIDES[-1] * STRIDES[-1]
            if self.limit == 0:
                raise UserError(f"a backbone of {pyramid.canvas} pixels is too small for a detector: 32 are needed")
            short = long = self.limit
        self.student = MaskRCNN(
            PyramidFPN(pyramid, width),
            box_head=TwoMLPHead(width * BOX_GRID**2, 4 * width),
            box_predictor=FastRCNNPredictor(4 * width, classes + 1),
            mask_head=MaskRCNNHeads(width, [width] * 4, 1),
            mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
            min_size=short,
            max_size=long,
            image_mean=list(mean),
            image_std=list(std),
            size_divisible=STRIDES[-1],
            box_batch_size_per_image=regions,
            rpn_post_nms_top_n_train=proposals[0],
            rpn_post_nms_top_n_test=proposals[1],
            rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in anchors), ((0.5, 1.0, 2.0),) * len(anchors)),
            _skip_resize=True,  # in training only
        )
        for pool in (self.student.roi_heads.box_roi_pool, self.student.roi_heads.mask_roi_pool):
            _tell_levels(pool)

    @property
    def backbone(self) -> nn.Module:
        """The timm model, cut down to its maps; for `decay.layer_groups`."""
        return self.student.backbone.pyramid.backbone

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        if self.freeze_norms:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """images: `(C, H, W)` each, uint8, of any sizes (up to `limit` in training).

        In training, with targets (`boxes`, `labels`, `masks`, as of `DetectionBatch`): the losses `rpn_class`,
        `rpn_box`, `class`, `box`, `mask`, scalars, and `total`, their sum. In evaluation: for each image, in its own
        pixels and by falling score, `boxes` (N, 4) left, top, right, bottom; `labels` (N,) from 1; `scores` (N,);
        `masks` (N, 1, H, W), probabilities.
        """
        device = next(self.parameters()).device
        pixels = [image.to(device).float() / 255 for image in images]
        if not self.training:
            return self.student(pixels)
        assert targets is not None, "in training, targets are needed"
        wanted = [{k: t[k].to(device) for k in ("boxes", "labels", "masks")} for t in targets]
        losses = self.student(pixels, wanted)
        terms = {ours: losses[theirs] for theirs, ours in LOSSES.items()}
        return terms | {"total": torch.stack(list(terms.values())).sum()}


def _tell_levels(pool: Any) -> None:
    """The strides of the FPN's maps. torchvision works them out from the first images that come, and keeps them: after
    low ones (of 33 to 45 pixels in height, say) it would look for all boxes in wrong places."""
    pool.scales = [1 / stride for stride in STRIDES]
    first, last = (stride.bit_length() - 1 for stride in (STRIDES[0], STRIDES[-1]))
    pool.map_levels = initLevelMapper(first, last, pool.canonical_scale, pool.canonical_level)


LOSSES = {
    "loss_objectness": "rpn_class",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}
