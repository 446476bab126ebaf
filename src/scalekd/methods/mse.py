"""`mse`: the squared error of the last map, without a projector (WideLast and Lift)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .projectors import Resample
from .shared import check_features, check_positive, full_precision


class MSE(nn.Module):
    """`mse`: the mean squared error to the teacher's last map, for a student with the teacher's channels.

    As in the release of WideLast and Lift (arXiv:2511.15572), whose students are `vit_wide_last` and `vit_lift` here.
    The student's map is resampled to the teacher's grid (see `Resample`). Both maps are the output of the last block or
    stage, before a final norm. If the channels differ, neighbouring channels of the wider map are averaged
    (`adaptive_avg_pool3d`), as in the release: the baseline that its students improve on.

    Args:
        lifted: the student's map is the one after its final norm, which in `vit_lift` is the lifted one.
        alpha: weight. Default 0.2, as in the release.

    Raises:
        ValueError: no teacher, a model without maps, or `alpha` out of range.
    """

    def __init__(self, student: Shapes, teacher: Shapes | None, *, lifted: bool = False, alpha: float = 0.2) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_positive("mse", alpha=alpha)
        assert student.final is not None
        self.channels = min((student.final if lifted else student.maps[3])[0], teacher.maps[3][0])
        self.lifted = lifted
        self.alpha = alpha
        self.resample = Resample(teacher.maps[3][1:])

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """The loss `mse`, `alpha` applied. The targets are not used."""
        assert teacher is not None
        ours = student.final if self.lifted else student.maps[3]
        assert ours is not None
        x = self.narrowed(self.resample(full_precision(ours)))
        y = self.narrowed(full_precision(teacher.maps[3].detach()))
        return {"mse": self.alpha * (x - y).square().mean()}

    def narrowed(self, x: Tensor) -> Tensor:
        """`(B, D, H, W)` with as many channels as the narrower map."""
        return x if x.shape[1] == self.channels else F.adaptive_avg_pool3d(x, (self.channels, None, None))
