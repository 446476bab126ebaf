"""`at`: attention transfer (Zagoruyko and Komodakis, 2017)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_positive, check_stages, full_precision


class AttentionTransfer(nn.Module):
    """`at`: match the spatial attention of each stage's map, where its activations are large.

    Zagoruyko and Komodakis, ICLR 2017 (arXiv:1612.03928), eq. 2 with p = 2 and the map F^2_sum. The attention
    of a map `(B, D, h, w)` is its energy, the mean over channels of the squared values, scaled to length 1 over
    the positions of an image, `(B, h*w)`. Student and teacher may differ in channels and in grid: both energies
    are average-pooled to the smaller height and the smaller width of the two. One term per stage, `s1`, ...:
    `alpha` x the squared difference of the attentions, averaged over positions and images.

    Args:
        stages: stages 1 to 4. Default all, the four groups of the authors' ImageNet code. Stage 4 is here the map
            before the final norm, because a LayerNorm gives all positions nearly the same energy.
        alpha: weight of each stage. Default 1000, the authors' `--beta 1e+3`. Eq. 2 of the paper halves its beta.

    Raises:
        ValueError: no teacher, a model without maps, an invalid stage, an `alpha` that is not positive, or a stage
            with a common grid of 1x1.
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
        teacher = check_features(student, teacher)
        check_positive("at", alpha=alpha)
        check_stages("at", stages)
        self.alpha = alpha
        self.grids: dict[int, tuple[int, int]] = {}
        for stage in stages:
            (_, h, w), (_, H, W) = student.maps[stage - 1], teacher.maps[stage - 1]
            self.grids[stage] = (min(h, H), min(w, W))
            if self.grids[stage] == (1, 1):  # a single value, scaled to length 1, is always 1
                raise ValueError(
                    f"at: the common grid of stage {stage} has one position, whose attention is constant.\n"
                    "Use other stages, or a larger data.image_size"
                )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per stage, `alpha` applied. The targets are not used."""
        assert teacher is not None
        losses = {}
        for stage, grid in self.grids.items():
            s, t = student.maps[stage - 1], teacher.maps[stage - 1].detach()
            distance = attention(s, grid) - attention(t, grid)
            losses[f"s{stage}"] = self.alpha * distance.square().mean()
        return losses


def attention(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention of a map `(B, D, h, w)` on a coarser or equal grid: vectors of length 1, `(B, H*W)`."""
    energy = full_precision(x).square().mean(dim=1, keepdim=True)  # squares would overflow in half precision
    return F.normalize(F.adaptive_avg_pool2d(energy, grid).flatten(1))
