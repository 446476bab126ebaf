"""The detector that is trained: torchvision's Mask R-CNN or RetinaNet on any timm backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scalekd.common.errors import UserError
from scalekd.data.transforms import Statistic
from scalekd.models.inputs import scaled
from scalekd.transfer.pyramid import STRIDES, Pyramid
from scalekd.transfer.tasks import DetectorKind
from scalekd.transfer.teacher import TeacherTerm

from . import mask_rcnn, retinanet

FINEST: dict[DetectorKind, int] = {"mask-rcnn": 4, "retinanet": 8}  # stride of the finest map that a detector uses


class Detector(nn.Module):
    """The trained model. `student` is torchvision's `MaskRCNN` or `RetinaNet`, the part that is deployed.

    Args:
        pyramid: contains the backbone; its finest stride is `FINEST[kind]`.
        classes: without the background.
        mean, std: of the backbone's input, for pixels in [0, 1].
        kind: which detector.
        short, long: pixels. In evaluation the short side is resized to `short`, or the long side to `long` if it would
            be longer. Training images are resized before (`Scales`). For a fixed-size backbone both are replaced by
            `limit`, the longest side in pixels of any image; for others `limit` is None.
        anchors: side of an anchor in pixels at each of the five strides, from `FINEST[kind]` on; use smaller ones for
            objects smaller than COCO's.
        freeze_norms: batch norms of the backbone keep their statistics, as is usual for a pre-trained backbone with
            batches of a few images; their scales and shifts are trained. False for a backbone trained from scratch.
        width: channels of the FPN and of the heads; Mask R-CNN's box head has four times as many. 256 is usual.
        regions: Mask R-CNN: regions per image that the box head is trained on; a quarter of them contain objects if
            there are as many.
        proposals: Mask R-CNN: proposals per image that reach the box head, in training and in evaluation.

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
        kind: DetectorKind = "mask-rcnn",
        short: int = 800,
        long: int = 1333,
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        freeze_norms: bool = True,
        width: int = 256,
        regions: int = 512,
        proposals: tuple[int, int] = (2000, 1000),
    ):
        super().__init__()
        self.kind, self.freeze_norms = kind, freeze_norms
        self.teacher: TeacherTerm | None = None
        self.limit = _limit(pyramid)
        common: dict[str, Any] = {
            "anchors": anchors,
            "width": width,
            "min_size": self.limit or short,
            "max_size": self.limit or long,
            "image_mean": list(mean),
            "image_std": list(std),
            "size_divisible": STRIDES[-1],
            "_skip_resize": True,  # in training only
        }
        self.student: Any
        if kind == "mask-rcnn":
            self.student = mask_rcnn.make_mask_rcnn(pyramid, classes, regions=regions, proposals=proposals, **common)
        else:
            self.student = retinanet.make_retinanet(pyramid, classes, **common)

    @property
    def backbone(self) -> nn.Module:
        """The pruned timm model, as `Pyramid.backbone`."""
        return self.student.backbone.pyramid.backbone

    @property
    def has_masks(self) -> bool:
        """Whether it predicts masks."""
        return self.kind == "mask-rcnn"

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        if self.freeze_norms:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def leave_out_below(self, score: float) -> None:
        """Makes it leave out objects that score below `score`, if that is more than its own threshold.

        A Mask R-CNN does so before it enlarges masks to the size of the image, which takes most of the memory.
        """
        heads = self.student.roi_heads if self.has_masks else self.student
        heads.score_thresh = max(heads.score_thresh, score)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """images: each `(C, H, W)` uint8, of any size (in training up to `limit`).

        In training, with `targets` (`boxes`, `labels` and, for a Mask R-CNN, `masks` as in `DetectionBatch`), returns
        scalar losses: `rpn_class`, `rpn_box`, `class`, `box`, `mask` of a Mask R-CNN, `class`, `box` of a RetinaNet,
        `teacher` with a teacher, and `total`, their sum. In evaluation, returns for each image, in its pixels and by
        descending score: `boxes` (N, 4) left, top, right, bottom; `labels` (N,) from 1; `scores` (N,); and of a Mask
        R-CNN `masks` (N, 1, H, W), probabilities.
        """
        device = next(self.parameters()).device
        pixels = [scaled(image.to(device)) for image in images]
        if not self.training:
            return self.student(pixels)
        assert targets is not None, "training needs targets"
        keys = ("boxes", "labels", "masks") if self.has_masks else ("boxes", "labels")
        wanted = [{k: t[k].to(device) for k in keys} for t in targets]
        with _outputs_of(self.student.backbone.pyramid) as maps:
            losses = self.student(pixels, wanted)
        names = mask_rcnn.LOSSES if self.has_masks else retinanet.LOSSES
        terms = {ours: losses[theirs] for theirs, ours in names.items()}
        if self.teacher is not None:
            terms["teacher"] = self.teacher(pixels, maps[-1])
        return terms | {"total": torch.stack(list(terms.values())).sum()}


def _limit(pyramid: Pyramid) -> int | None:
    """The longest side in pixels of any image, for a fixed-size backbone. Raises `UserError` if it is too small."""
    if pyramid.canvas is None:
        return None
    # a batch is padded to a multiple of the last stride, and must still fit
    limit = min(pyramid.canvas) // STRIDES[-1] * STRIDES[-1]
    if limit == 0:
        size = f"{pyramid.canvas[0]}x{pyramid.canvas[1]}"
        raise UserError(f"a backbone for {size} pixels is too small for a detector; use one for 32x32 or more")
    return limit


@contextmanager
def _outputs_of(pyramid: nn.Module) -> Iterator[list[Tensor]]:
    """The maps that the pyramid returns within the block, which torchvision's models keep to themselves."""
    maps: list[Tensor] = []
    hook = pyramid.register_forward_hook(lambda module, given, result: maps.extend(result))
    try:
        yield maps
    finally:
        hook.remove()
