"""Mask R-CNN (arXiv:1703.06870) of torchvision, with its FPN on any timm backbone."""

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
from scalekd.models.inputs import scaled
from scalekd.transfer.pyramid import STRIDES, Pyramid

BOX_GRID = 7  # side of the grid that torchvision pools for the box head


class PyramidFPN(nn.Module):
    """torchvision's FPN on a `Pyramid`: x `(B, C, H, W)` to five maps `(B, width, ...)` of the strides 4 to 64."""

    def __init__(self, pyramid: Pyramid, width: int):
        super().__init__()
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(pyramid.channels, width, LastLevelMaxPool())
        self.out_channels = width  # torchvision reads it

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.pyramid(x))))


class Detector(nn.Module):
    """The trained model. `student` is torchvision's `MaskRCNN`, the part that is deployed.

    Args:
        pyramid: contains the backbone.
        classes: without the background.
        mean, std: of the backbone's input, for pixels in [0, 1].
        short, long: pixels. In evaluation the short side is resized to `short`, or the long side to `long` if it would
            be longer. Training images are resized before (`Scales`). For a fixed-size backbone both are replaced by
            `limit`, the longest side in pixels of any image; for others `limit` is None.
        anchors: side of an anchor in pixels at each of the five strides; use smaller ones for objects smaller than
            COCO's.
        freeze_norms: batch norms of the backbone keep their statistics, as is usual for a pre-trained backbone with
            batches of a few images; their scales and shifts are trained. False for a backbone trained from scratch.
        width: channels of the FPN and of the mask head; the box head has four times as many. 256 is usual.
        regions: regions per image that the box head is trained on; a quarter of them contain objects if there are as
            many.
        proposals: proposals per image that reach the box head, in training and in evaluation.

    Raises:
        UserError: if a fixed-size backbone is too small.
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
            # a batch is padded to a multiple of the last stride, and must still fit
            self.limit = min(pyramid.canvas) // STRIDES[-1] * STRIDES[-1]
            if self.limit == 0:
                size = f"{pyramid.canvas[0]}x{pyramid.canvas[1]}"
                raise UserError(f"a backbone for {size} pixels is too small for a detector; use one for 32x32 or more")
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
            _set_strides(pool)

    @property
    def backbone(self) -> nn.Module:
        """The pruned timm model, as `Pyramid.backbone`."""
        return self.student.backbone.pyramid.backbone

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        if self.freeze_norms:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """images: each `(C, H, W)` uint8, of any size (in training up to `limit`).

        In training, with `targets` (`boxes`, `labels`, `masks` as in `DetectionBatch`), returns the scalar losses
        `rpn_class`, `rpn_box`, `class`, `box`, `mask`, and `total`, their sum. In evaluation, returns for each image,
        in its pixels and by descending score: `boxes` (N, 4) left, top, right, bottom; `labels` (N,) from 1; `scores`
        (N,); `masks` (N, 1, H, W), probabilities.
        """
        device = next(self.parameters()).device
        pixels = [scaled(image.to(device)) for image in images]
        if not self.training:
            return self.student(pixels)
        assert targets is not None, "training needs targets"
        wanted = [{k: t[k].to(device) for k in ("boxes", "labels", "masks")} for t in targets]
        losses = self.student(pixels, wanted)
        terms = {ours: losses[theirs] for theirs, ours in LOSSES.items()}
        return terms | {"total": torch.stack(list(terms.values())).sum()}


def _set_strides(pool: Any) -> None:
    """Sets the strides of the FPN's maps. torchvision estimates them from the first images and keeps them: after small
    images, such as 33 to 45 pixels high, it would pool all boxes from wrong positions."""
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
