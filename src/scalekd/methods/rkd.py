"""`rkd`: relational knowledge distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, pooled


class RKD(nn.Module):
    """`rkd`: distances and angles between the images of a batch, as the teacher sees them.

    Park et al., CVPR 2019 (arXiv:1904.05068), RKD-DA. x is the final map averaged over its grid, `(B, D)`, so neither
    channels nor grids of the two models need to be the same. With the Huber loss h (delta 1), two terms:

        distance: h(d(t) - d(s)) of  d_ij  = |x_i - x_j| / mean of |x_i - x_j|     over pairs
        angle:    h(a(t) - a(s)) of  a_ijk = cos of the angle at x_j to x_i, x_k   over triplets

    The paper sums over different images. Here as in the authors' and vanillaKD's code: averaged over all B^2 pairs
    and B^3 triplets, those that name an image twice included (0 for both models), and the mean distance is of pairs
    that are apart. The batch is that of one process in one forward pass: from two images on there are distances, from
    three on angles. `B * B * D` and `B * B * B` numbers of each model are held.

    Args:
        distance: weight of the distances. Default 25.
        angle: weight of the angles. Default 50. Both as in vanillaKD's release.

    Raises:
        ValueError: no teacher, a model without maps, a weight negative, or both 0.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        distance: float = 25.0,
        angle: float = 50.0,
    ) -> None:
        super().__init__()
        check_features(student, teacher, 1.0, "mean")
        if not (distance >= 0 and angle >= 0 and distance + angle > 0):
            raise ValueError(
                f"rkd: distance is {distance} and angle {angle}; neither can be negative, and one is positive"
            )
        self.distance, self.angle = distance, angle

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`distance` and `angle`, weights applied. Targets are not looked at."""
        assert teacher is not None
        distances_s, cosines_s = relations(pooled(student))
        distances_t, cosines_t = relations(pooled(teacher).detach())
        return {
            "distance": self.distance * F.smooth_l1_loss(distances_s, distances_t),
            "angle": self.angle * F.smooth_l1_loss(cosines_s, cosines_t),
        }


def relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(B, D)` to distances over their mean, `[i, j]`, and cosines of the angle at the first image, `[j, i, k]`.

    0 for images in one place, and no gradient from there. Differences, not products of x, as those of images
    close to each other would drown in rounding.
    """
    with torch.autocast(x.device.type, enabled=False):
        difference = x[None] - x[:, None]  # [j, i] is x_i - x_j
        length = torch.linalg.vector_norm(difference, dim=2)
        apart = length > 0
        mean = length.sum() / apart.sum().clamp(min=1)
        unit = difference / length.masked_fill(~apart, torch.inf)[:, :, None]
        return length / mean.masked_fill(mean == 0, torch.inf), unit @ unit.transpose(1, 2)
