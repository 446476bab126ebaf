"""`reviewkd`: knowledge review (Chen et al., 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, MapShape, Shapes

from .projectors import Resample
from .shared import check_features, check_positive, check_stages, full_precision, stage_map


class ReviewKD(nn.Module):
    """`reviewkd`: match each stage of the teacher with a fusion of the student's same and later stages.

    Chen et al., CVPR 2021 (arXiv:2104.09044). From the last stage to the first, an attention based fusion
    (`Fusion`) mixes the student's map of a stage with the result of the later stages. Its output, resampled to the
    teacher's grid, is compared with the teacher's map of that stage by `hierarchical_distance`. One term per stage,
    `s1`, ..., with weight `alpha`.

    Args:
        stages: stages 1 to 4, in any order; stage 4 is the map after the final norm. Default all.
        alpha: weight of each stage. Default 1, as in the authors' ImageNet code.
        width: channels of the fused maps. Default 256; the authors' ImageNet code has 512 for ResNet-18 and 256 for
            MobileNet.

    Raises:
        ValueError: no teacher, a model without maps, or an option out of range.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        stages: tuple[int, ...] = (1, 2, 3, 4),
        alpha: float = 1.0,
        width: int = 256,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_stages("reviewkd", stages)
        check_positive("reviewkd", alpha=alpha, width=width)
        self.stages = tuple(sorted(stages, reverse=True))
        self.alpha = alpha
        self.fusions = nn.ModuleDict()
        for stage in self.stages:
            shapes = stage_map(student, stage), stage_map(teacher, stage)
            self.fusions[f"s{stage}"] = Fusion(*shapes, width, last=stage == self.stages[0])

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per stage, last stage first, `alpha` applied. The targets are not used."""
        assert teacher is not None
        losses = {}
        review = None
        for stage in self.stages:
            mimic, review = self.fusions[f"s{stage}"](stage_map(student, stage), review)
            distance = hierarchical_distance(mimic, stage_map(teacher, stage).detach())
            losses[f"s{stage}"] = self.alpha * distance
        return losses


class Fusion(nn.Module):
    """The paper's ABF (attention based fusion): mixes a stage's map with the result of the later stages.

    The map is projected to `width` channels, and the later result resized to its grid (nearest neighbour). A 1x1
    convolution of both and a sigmoid give two weights per position. The weighted sum goes to the next stage, and
    through a 3x3 convolution to the teacher's channels. BatchNorm follows the first and the last convolution.

    Args:
        student, teacher: map shapes `(ds, h, w)` and `(dt, H, W)`.
        last: there is no later stage to mix with.
    """

    def __init__(self, student: MapShape, teacher: MapShape, width: int, last: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student[0], width, 1, bias=False), nn.BatchNorm2d(width))
        self.weigh = None if last else nn.Conv2d(2 * width, 2, 1)
        self.resample = Resample(teacher[1:])
        self.expand = nn.Sequential(nn.Conv2d(width, teacher[0], 3, padding=1, bias=False), nn.BatchNorm2d(teacher[0]))

    def forward(self, x: Tensor, review: Tensor | None) -> tuple[Tensor, Tensor]:
        """From `(B, ds, h, w)` and the later stages' `(B, width, *, *)` to `(B, dt, H, W)` and `(B, width, h, w)`."""
        x = self.reduce(x)
        if self.weigh is not None:
            assert review is not None
            review = F.interpolate(review, x.shape[2:], mode="nearest")
            own, later = torch.sigmoid(self.weigh(torch.cat([x, review], dim=1))).split(1, dim=1)
            x = own * x + later * review
        return self.expand(self.resample(x)), x


def hierarchical_distance(a: Tensor, t: Tensor) -> Tensor:
    """The paper's HCL: the mean squared difference of two maps `(B, D, H, W)` at several scales.

    At full size with weight 1, and average-pooled to those of 4x4, 2x2 and 1x1 that are coarser than the map, with
    weights 1/2, 1/4, 1/8 in this order; divided by the sum of the weights. A side shorter than a scale is not pooled.
    Computed in float32 or float64.
    """
    a, t = full_precision(a), full_precision(t)
    H, W = a.shape[2:]
    total, weight, weights = F.mse_loss(a, t), 1.0, 1.0
    for size in (4, 2, 1):
        if size < max(H, W):
            grid = min(size, H), min(size, W)
            weight /= 2
            weights += weight
            # pooling is linear, so the difference can be pooled once instead of both maps
            total = total + weight * F.adaptive_avg_pool2d(a - t, grid).square().mean()
    return total / weights
