"""`rkd`: relational knowledge distillation (Park et al., 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_weights, pooled


class RKD(nn.Module):
    """`rkd`: match the distances and angles between the images of a batch in feature space.

    Park et al., CVPR 2019 (arXiv:1904.05068), RKD-DA. x is the final map averaged over its grid, `(B, D)`, so
    channels and grids may differ. With the Huber loss h (delta 1), two terms:

        distance: h(d(t) - d(s)) of  d_ij  = |x_i - x_j| / mean of |x_i - x_j|     over pairs
        angle:    h(a(t) - a(s)) of  a_ijk = cos of the angle at x_j to x_i, x_k   over triplets

    The paper sums over different images. Here, as in the authors' and vanillaKD's code, terms are averaged over all B^2
    pairs and B^3 triplets, including those that repeat an image (0 for both models), and the mean distance is over
    pairs with a non-zero distance. The batch is that of one process in one forward pass; distances need two images,
    angles three. Each model needs `B * B * D` and `B * B * B` numbers.

    Args:
        distance: weight of the distances. Default 25.
        angle: weight of the angles. Default 50. Both defaults are those of vanillaKD's release.

    Raises:
        ValueError: no teacher, a model without maps, a negative weight, or both 0.
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
        check_features(student, teacher)
        check_weights("rkd", distance=distance, angle=angle)
        self.distance, self.angle = distance, angle

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`distance` and `angle`, weights applied. The targets are not used."""
        assert teacher is not None
        distances_s, cosines_s = relations(pooled(student))
        distances_t, cosines_t = relations(pooled(teacher).detach())
        return {
            "distance": self.distance * F.smooth_l1_loss(distances_s, distances_t),
            "angle": self.angle * F.smooth_l1_loss(cosines_s, cosines_t),
        }


def relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances divided by their mean, `[i, j]`, and cosines of the angle at the first image, `[j, i, k]`, of `(B, D)`.

    They are 0 without a gradient for images at the same point. They are computed from differences, not from products of
    x, in which small differences would be lost to rounding.
    """
    with torch.autocast(x.device.type, enabled=False):
        difference, length = differences(x)
        unit = difference / length.masked_fill(length == 0, torch.inf)[:, :, None]
        return relative(length), unit @ unit.transpose(1, 2)


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x_i - x_j` at `[j, i]`, and its length, of `(B, D)`."""
    difference = x[None] - x[:, None]
    return difference, torch.linalg.vector_norm(difference, dim=2)


def relative(length: Tensor) -> Tensor:
    """Distances `(B, B)` divided by the mean of those that are not 0."""
    mean = length.sum() / (length > 0).sum().clamp(min=1)
    return length / mean.masked_fill(mean == 0, torch.inf)
