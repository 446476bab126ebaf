"""`reviewkd`: knowledge review."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, MapShape, Shapes

from .projectors import Resample
from .shared import check_features, check_stages, full_precision, stage_map


class ReviewKD(nn.Module):
    """`reviewkd`: teach each stage together with what the student's later stages have made of it.

    Chen et al., CVPR 2021 (arXiv:2104.09044). From the last stage to the first, an attention based fusion
    (`Fusion`) mixes the student's map of a stage with what came of the stages after it, and its output, brought to
    the teacher's grid, is compared with the teacher's map of that stage by `hierarchical_distance`. One term per
    stage, `s1`, ...; `alpha` applied.

    Args:
        stages: stages 1 to 4, in any order; stage 4 is the map after the final norm. Default all.
        alpha: weight of each stage. Default 1, that of the authors' ImageNet code.
        width: channels in which stages are mixed. Default 256; the authors' ImageNet code has 512 for
            ResNet-18 and 256 for MobileNet.

    Raises:
        ValueError: no teacher, a model without maps, an option out of range.
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
        teacher = check_features(student, teacher, alpha, "mean")
        check_stages("reviewkd", stages)
        if width < 1:
            raise ValueError(f"reviewkd: width is {width}; it must be positive")
        self.stages = tuple(sorted(stages, reverse=True))
        self.alpha = alpha
        self.fusions = nn.ModuleDict()
        for stage in self.stages:
            shapes = stage_map(student, stage), stage_map(teacher, stage)
            self.fusions[f"s{stage}"] = Fusion(*shapes, width, last=stage == self.stages[0])

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per stage, last stage first, `alpha` applied. Targets are not looked at."""
        assert teacher is not None
        losses = {}
        review = None
        for stage in self.stages:
            mimic, review = self.fusions[f"s{stage}"](stage_map(student, stage), review)
            distance = hierarchical_distance(mimic, stage_map(teacher, stage).detach())
            losses[f"s{stage}"] = self.alpha * distance
        return losses


class Fusion(nn.Module):
    """The paper's ABF: a stage's map, mixed with the result of the stages after it.

    The map is brought to `width` channels, the earlier result to its grid (nearest neighbour); a 1x1 convolution
    of both and a sigmoid give two weights to each position, and the weighted sum is what the next stage gets.
    A 3x3 convolution of it has the teacher's channels. BatchNorm after both outer convolutions.

    Args:
        student, teacher: map shapes `(ds, h, w)` and `(dt, H, W)`.
        last: there is no stage after this one, and so nothing to mix.
    """

    def __init__(self, student: MapShape, teacher: MapShape, width: int, last: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student[0], width, 1, bias=False), nn.BatchNorm2d(width))
        self.weigh = None if last else nn.Conv2d(2 * width, 2, 1)
        self.resample = Resample(teacher[1:])
        self.expand = nn.Sequential(nn.Conv2d(width, teacher[0], 3, padding=1, bias=False), nn.BatchNorm2d(teacher[0]))

    def forward(self, x: Tensor, review: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(B, ds, h, w)` and the later stages' `(B, width, *, *)` to `(B, dt, H, W)` and `(B, width, h, w)`."""
        x = self.reduce(x)
        if self.weigh is not None:
            assert review is not None
            review = F.interpolate(review, x.shape[2:], mode="nearest")
            own, later = torch.sigmoid(self.weigh(torch.cat([x, review], dim=1))).split(1, dim=1)
            x = own * x + later * review
        return self.expand(self.resample(x)), x


def hierarchical_distance(a: Tensor, t: Tensor) -> Tensor:
    """HCL: the mean squared difference of two maps `(B, D, H, W)` at several scales, in float32 at least.

    At full size with weight 1, and averaged over cells to 4x4, 2x2 and 1x1, those that are coarser than the map,
    with weights 1/2, 1/4, 1/8 in turn; divided by the sum of the weights. A grid that is narrower than a scale
    keeps its own size in that direction.
    """
    a, t = full_precision(a), full_precision(t)
    H, W = a.shape[2:]
    total, weight, weights = F.mse_loss(a, t), 1.0, 1.0
    for size in (4, 2, 1):
        if size < max(H, W):
            grid = min(size, H), min(size, W)
            weight /= 2
            weights += weight
            # pooling is linear: the difference is pooled once, where the authors pool both maps
            total = total + weight * F.adaptive_avg_pool2d(a - t, grid).square().mean()
    return total / weights
