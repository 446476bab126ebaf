"""`mgd`: masked generative distillation (Yang et al., 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from scalekd.models.stages import Features, MapShape, Shapes

from .projectors import Resample
from .shared import check_choice, check_features, check_positive, check_stages, full_precision, stage_map


class MGD(nn.Module):
    """`mgd`: generate the teacher's map from the student's map with random parts masked.

    Yang et al., ECCV 2022 (arXiv:2205.01529). The student's map `(B, ds, h, w)` is resampled to the teacher's grid (see
    `Resample`), aligned by a 1x1 convolution `ds -> dt` if the channels differ, masked with zeros at random, and passed
    through two 3x3 convolutions `dt -> dt` with a ReLU between. One term per stage, `s4`, ...: `alpha` x the squared
    difference to the teacher's map `(B, dt, H, W)`, summed over channels and positions, averaged over the batch. The
    mask comes from torch's global generator.

    Args:
        stages: stages 1 to 4; stage 4 is the map after the final norm. Default the last, as in the paper's
            classification.
        alpha: weight of each stage. Default 7e-5, as in the authors' ImageNet code, for 7x7 grids.
        mask_ratio: probability of masking a position or a channel, in [0, 1). Default 0.5, as documented in the
            authors' classification code.
        mask: `position` masks all channels of a position, as in the paper. `channel` masks a channel at all positions,
            as in the authors' ImageNet configurations, with `mask_ratio` 0.15.

    Raises:
        ValueError: no teacher, a model without maps, or an option out of range.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        stages: tuple[int, ...] = (4,),
        alpha: float = 7e-5,
        mask_ratio: float = 0.5,
        mask: Literal["position", "channel"] = "position",
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_positive("mgd", alpha=alpha)
        check_stages("mgd", stages)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mgd: mask_ratio is {mask_ratio} and must be in [0, 1)")
        check_choice("mgd", "mask", mask, ("position", "channel"))
        self.stages = tuple(stages)
        self.alpha = alpha
        self.mask_ratio = mask_ratio
        self.mask = mask
        self.align = nn.ModuleDict()
        self.generate = nn.ModuleDict()
        for stage in stages:
            s, t = stage_map(student, stage), stage_map(teacher, stage)
            self.align[f"s{stage}"] = align(s, t)
            self.generate[f"s{stage}"] = nn.Sequential(
                nn.Conv2d(t[0], t[0], 3, padding=1), nn.ReLU(), nn.Conv2d(t[0], t[0], 3, padding=1)
            )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per stage, `alpha` applied. The targets are not used."""
        assert teacher is not None
        losses = {}
        for stage in self.stages:
            name = f"s{stage}"
            masked = self.masked(self.align[name](stage_map(student, stage)))
            distance = full_precision(self.generate[name](masked)) - full_precision(stage_map(teacher, stage).detach())
            losses[name] = self.alpha * distance.square().sum() / len(distance)
        return losses

    def masked(self, x: Tensor) -> Tensor:
        """`x`, `(B, D, H, W)`, with random positions or channels set to 0."""
        B, D, H, W = x.shape
        shape = (B, 1, H, W) if self.mask == "position" else (B, D, 1, 1)
        # unlike dropout, the remaining values are not scaled up
        return x * (torch.rand(shape, device=x.device) >= self.mask_ratio)


def align(student: MapShape, teacher: MapShape) -> nn.Module:
    """Resamples to the teacher's grid, and projects to its channels if they differ."""
    same = student[0] == teacher[0]
    return nn.Sequential(Resample(teacher[1:]), nn.Identity() if same else nn.Conv2d(student[0], teacher[0], 1))
