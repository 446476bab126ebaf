"""`mgd`: masked generative distillation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from scalekd.models.stages import Features, MapShape, Shapes

from .projectors import Resample
from .shared import check_features, check_stages, full_precision, stage_map


class MGD(nn.Module):
    """`mgd`: generate the teacher's map from the student's, parts of which are hidden.

    Yang et al., ECCV 2022 (arXiv:2205.01529). The student's map `(B, ds, h, w)` is brought to the
    teacher's grid (averaged over cells where it shrinks, bilinear where it grows), aligned by a 1x1 convolution
    `ds -> dt` where the channels differ, masked with zeros at random, and put through two 3x3 convolutions
    `dt -> dt` with a ReLU between. One term per stage, `s4`, ...: `alpha` x the squared difference to the
    teacher's map `(B, dt, H, W)`, summed over channels and positions, averaged over the batch. The mask comes
    from torch's global generator.

    Args:
        stages: stages 1 to 4; stage 4 is the map after the final norm. Default the last, as in the paper's
            classification.
        alpha: weight of each stage. Default 7e-5, that of the authors' ImageNet code, for 7x7 grids.
        mask_ratio: chance that a position, or a channel, is hidden, in [0, 1). Default 0.5, as the authors'
            classification code documents it.
        mask: `position` hides all channels of a position, as the paper has it. `channel` hides a channel at
            all positions, as the authors' ImageNet configurations do, with `mask_ratio` 0.15.

    Raises:
        ValueError: no teacher, a model without maps, an option out of range.
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
        teacher = check_features(student, teacher, alpha, "sum")
        check_stages("mgd", stages)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mgd: mask_ratio is {mask_ratio}; it is in [0, 1)")
        if mask not in ("position", "channel"):
            raise ValueError(f"mgd: mask is {mask!r}; it can be 'position' or 'channel'")
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
        """One scalar per stage, `alpha` applied. Targets are not looked at."""
        assert teacher is not None
        losses = {}
        for stage in self.stages:
            name = f"s{stage}"
            seen = self._hide(self.align[name](stage_map(student, stage)))
            distance = full_precision(self.generate[name](seen)) - full_precision(stage_map(teacher, stage).detach())
            losses[name] = self.alpha * distance.square().sum() / len(distance)
        return losses

    def _hide(self, x: Tensor) -> Tensor:
        B, D, H, W = x.shape
        shape = (B, 1, H, W) if self.mask == "position" else (B, D, 1, 1)
        # not scaled up as dropout is: what is left keeps its values
        return x * (torch.rand(shape, device=x.device) >= self.mask_ratio)


def align(student: MapShape, teacher: MapShape) -> nn.Module:
    """To the teacher's grid, and to its channels where the student's differ."""
    same = student[0] == teacher[0]
    return nn.Sequential(Resample(teacher[1:]), nn.Identity() if same else nn.Conv2d(student[0], teacher[0], 1))
