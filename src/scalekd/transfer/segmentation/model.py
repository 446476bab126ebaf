"""UPerNet (arXiv:1807.10221) on any timm backbone: the decoder of segmentation_models_pytorch (smp) on a `Pyramid`.

Heads, dropout and loss weights are those of mmsegmentation's configs/_base_/models/upernet_swin.py. Unlike it, smp's
decoder applies a layer norm to each map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalekd.common.errors import UserError
from scalekd.models.inputs import Statistics, default_statistics, per_channel, scaled
from scalekd.transfer.pyramid import Pyramid
from scalekd.transfer.tasks import TASKS
from scalekd.transfer.teacher import TeacherTerm

from .pairs import IGNORED

DROPOUT = 0.1
AUXILIARY_WEIGHT, AUXILIARY_CHANNELS = 0.4, 256
AUXILIARY_STRIDE = 16


class UPerNet(nn.Module):
    """x `(B, C, H, W)`, normalised, to logits `(B, classes, H, W)`. The deployed model.

    pyramid: contains the backbone; `.decoder` and `.classifier` are new. channels: width of the decoder.
    Raises `UserError` if the extra is missing.
    """

    def __init__(self, pyramid: Pyramid, classes: int, channels: int = 512):
        super().__init__()
        self.pyramid = pyramid
        self.decoder = _decoder(pyramid.channels, channels)
        self.classifier = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(channels, classes, 1))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return self.from_maps(self.pyramid(x), x.shape[-2:])

    def from_maps(self, maps: list[Tensor], size: torch.Size) -> Tensor:
        """The pyramid's maps to logits with (height, width) `size`."""
        # smp's decoder ignores the first two maps of an encoder, those of the strides 1 and 2
        return _enlarged(self.classifier(self.decoder([maps[0], maps[0], *maps])), size)


class Segmenter(nn.Module):
    """A `UPerNet` as `.student`, and an auxiliary head for training: convolution, norm, ReLU and classifier on the map
    of stride 16, with loss weight 0.4.

    Args:
        model: a timm model, pruned in place; it becomes part of the student.
        image_size: (height, width) in pixels it was built for.
        classes: number of classes.
        channels: width of the decoder.
        statistics: (mean, std) of the input for pixels in [0, 1]; timm's by default.

    Raises:
        UserError: if the extra is missing or the model gives no maps.
    """

    student_mean: Tensor
    student_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        image_size: tuple[int, int],
        classes: int,
        channels: int = 512,
        statistics: Statistics | None = None,
    ):
        super().__init__()
        for name, values in zip(("mean", "std"), statistics or default_statistics(model)):
            self.register_buffer(f"student_{name}", per_channel(values), persistent=False)
        pyramid = Pyramid(model, image_size)
        self.student = UPerNet(pyramid, classes, channels)
        self.teacher: TeacherTerm | None = None
        self.level = list(pyramid.strides).index(AUXILIARY_STRIDE)
        self.auxiliary = nn.Sequential(
            nn.Conv2d(pyramid.channels[self.level], AUXILIARY_CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(AUXILIARY_CHANNELS),
            nn.ReLU(inplace=True),
            nn.Dropout2d(DROPOUT),
            nn.Conv2d(AUXILIARY_CHANNELS, classes, 1),
        )

    def forward(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """{"ce": ..., "auxiliary": ..., "total": ...}: mean cross-entropy over the pixels that are not ignored; with a
        teacher also "teacher".

        images: (B, C, H, W), uint8, or float in [0, 1]. masks: (B, H, W) classes; 255 is ignored.
        A batch with only ignored pixels has a cross-entropy of 0. Raises `UserError` for one image per process in training.
        """
        if self.training and len(images) == 1 and not any(isinstance(m, nn.SyncBatchNorm) for m in self.modules()):
            raise UserError(
                "UPerNet needs two images per process and step: it normalises a one-pixel map over the batch; raise "
                "train.batch_size"
            )
        pixels = images if images.is_floating_point() else scaled(images)
        maps = self.student.pyramid((pixels - self.student_mean) / self.student_std)
        size = masks.shape[-2:]
        losses = {
            "ce": _cross_entropy(self.student.from_maps(maps, size), masks),
            "auxiliary": AUXILIARY_WEIGHT * _cross_entropy(_enlarged(self.auxiliary(maps[self.level]), size), masks),
        }
        if self.teacher is not None:
            losses["teacher"] = self.teacher(self._unpadded(pixels, masks), maps[-1])
        losses["total"] = torch.stack(list(losses.values())).sum()
        return losses

    def _unpadded(self, pixels: Tensor, masks: Tensor) -> list[Tensor]:
        """Each image without the rows at the bottom and the columns on the right that only fill up a crop: they have the
        mean as colour, to the nearest of 256 values, and no class. Waits for the device."""
        content = (masks != IGNORED) | ((pixels - self.student_mean).abs() > 0.51 / 255).any(dim=1)  # (B, H, W)
        sizes = []
        for side in (2, 1):
            filled = content.any(dim=side)  # (B, H), then (B, W)
            places = torch.arange(1, filled.shape[1] + 1, device=filled.device)
            sizes.append((filled * places).amax(dim=1).clamp(min=1).tolist())
        return [image[:, :height, :width] for image, height, width in zip(pixels, *sizes)]


def _cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    summed = F.cross_entropy(logits.float(), masks.long(), ignore_index=IGNORED, reduction="sum")
    return summed / (masks != IGNORED).sum().clamp(min=1)  # 0 / 0 would make all weights nan


def _enlarged(logits: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _decoder(widths: list[int], channels: int) -> Any:
    """smp's decoder for maps with these channels, initialised as in smp. Raises `UserError` if the extra is missing."""
    try:
        from segmentation_models_pytorch.base.initialization import initialize_decoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError:
        raise UserError(TASKS["segmentation"].missing) from None
    decoder = UPerNetDecoder([0, 0, *widths], decoder_channels=channels)
    initialize_decoder(decoder)
    return decoder
