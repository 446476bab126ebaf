"""`ofd`: overhaul of feature distillation (Heo et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalekd.models.stages import Features, MapShape, Shapes

from .projectors import Resample
from .shared import check_features, check_positive, check_stages, full_precision, stage_map


class OFD(nn.Module):
    """`ofd`: match the teacher's positive responses; where the teacher is negative, being negative is enough.

    Heo et al., ICCV 2019 (arXiv:1904.01866). The teacher's map `(B, dt, H, W)` is cut off at a negative margin
    (`margin_relu`). The student's is resampled to the teacher's grid (see `Resample`) and goes through a 1x1
    convolution `ds -> dt` and BatchNorm. `partial_distance` compares the two. One term per stage, `s1`, ...: `alpha /
    2^(4 - stage)` x the sum over channels and positions, averaged over the batch.

    The paper's margin of a channel is its mean negative response, computed from the statistics of the teacher's
    BatchNorm before the ReLU. A ViT has no such layer, and a stage's map may come after it. The margin here is the mean
    of the channel's negative values in the batch, or 0 if there are none. If a teacher's stages end in a ReLU (ResNet),
    all margins are 0; the paper uses the map before that ReLU.

    Args:
        stages: stages 1 to 4; stage 4 is the map after the final norm. Default all.
        alpha: weight of stage 4; half of it for stage 3, and so on, as in the authors' code. Default 1e-4, as in their
            ImageNet code, whose largest grid is 56x56 (their CIFAR-100 code: 1e-3).

    Raises:
        ValueError: no teacher, a model without maps, or an option out of range.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        stages: tuple[int, ...] = (1, 2, 3, 4),
        alpha: float = 1e-4,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_positive("ofd", alpha=alpha)
        check_stages("ofd", stages)
        self.weights = {stage: alpha / 2 ** (4 - stage) for stage in stages}
        self.regressors = nn.ModuleDict(
            {f"s{stage}": regressor(stage_map(student, stage), stage_map(teacher, stage)) for stage in stages}
        )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per stage, weights applied. The targets are not used."""
        assert teacher is not None
        losses = {}
        for stage, weight in self.weights.items():
            mimic = self.regressors[f"s{stage}"](stage_map(student, stage))
            target = margin_relu(stage_map(teacher, stage).detach())
            losses[f"s{stage}"] = weight * partial_distance(mimic, target)
        return losses


def margin_relu(t: Tensor) -> Tensor:
    """`max(t, m)`, `(B, D, H, W)`, with `m` the mean of a channel's negative values; in float32 or float64."""
    t = full_precision(t)
    negative = t < 0
    count = negative.sum(dim=(0, 2, 3), keepdim=True)
    margin = t.clamp(max=0).sum(dim=(0, 2, 3), keepdim=True) / count.clamp(min=1)
    return torch.maximum(t, margin)


def partial_distance(s: Tensor, t: Tensor) -> Tensor:
    """`(s - t)^2` summed except where `s <= t <= 0`, divided by the batch size; in float32 or float64."""
    s, t = full_precision(s), full_precision(t)
    counts = (s > t) | (t > 0)
    return ((s - t).square() * counts).sum() / len(s)


def regressor(student: MapShape, teacher: MapShape) -> nn.Sequential:
    """The layers from the student's map `(B, ds, h, w)` to the teacher's shape, `(B, dt, H, W)`."""
    return nn.Sequential(
        Resample(teacher[1:]), nn.Conv2d(student[0], teacher[0], 1, bias=False), nn.BatchNorm2d(teacher[0])
    )
