"""`at`: attention transfer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_stages, full_precision


class AttentionTransfer(nn.Module):
    """`at`: match where the energy of each stage's map lies.

    Zagoruyko and Komodakis, ICLR 2017 (arXiv:1612.03928), eq. 2 with p = 2 and the map F^2_sum. The attention
    of a map `(B, D, h, w)` is its energy, the mean over channels of the squared values, scaled to length 1 over
    the positions of an image, `(B, h*w)`. Student and teacher may differ in channels and in grid: each energy
    is averaged over cells to the smaller height and the smaller width of the two. One term per stage, `s1`, ...:
    `alpha` x the squared difference of the attentions, averaged over positions and images.

    Args:
        stages: stages 1 to 4. Default all, the four groups of the authors' ImageNet code. Stage 4 is the raw map
            here, not the one after the final norm: a LayerNorm gives all positions nearly the same energy.
        alpha: weight of each stage. Default 1000, the authors' `--beta 1e+3`; the paper's beta, which its eq. 2
            halves.

    Raises:
        ValueError: no teacher, a model without maps, a stage out of range or given twice, `alpha` not
            positive, a stage where the common grid is 1x1.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        stages: tuple[int, ...] = (1, 2, 3, 4),
        alpha: float = 1000.0,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher, alpha, "mean")
        check_stages("at", stages)
        self.alpha = alpha
        self.grids: dict[int, tuple[int, int]] = {}
        for stage in stages:
            (_, h, w), (_, H, W) = student.maps[stage - 1], teacher.maps[stage - 1]
            self.grids[stage] = (min(h, H), min(w, W))
            if self.grids[stage] == (1, 1):  # one number, scaled to length 1, is always 1
                raise ValueError(
                    f"at: one position is left of stage {stage}, and its attention is always the same.\n"
                    "Name other stages, or use a larger data.image_size"
                )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per stage, `alpha` applied. Targets are not looked at."""
        assert teacher is not None
        losses = {}
        for stage, grid in self.grids.items():
            s, t = student.maps[stage - 1], teacher.maps[stage - 1].detach()
            distance = attention(s, grid) - attention(t, grid)
            losses[f"s{stage}"] = self.alpha * distance.square().mean()
        return losses


def attention(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """`(B, D, h, w)` to vectors of length 1, `(B, H*W)`, in float32 at least. The grid is no finer than the map's."""
    energy = full_precision(x).square().mean(dim=1, keepdim=True)  # in half precision squares would overflow
    return F.normalize(F.adaptive_avg_pool2d(energy, grid).flatten(1))
