"""`vkd`: an orthogonal projection to the teacher's normalised features (Miles et al., 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, pooled


class VkD(nn.Module):
    """`vkd`: an orthogonal projection of the student's pooled features matches the teacher's, normalised.

    Miles et al., CVPR 2024 (arXiv:2403.06213). With both models' final maps averaged over positions, `x` `(B, ds)` and
    `y` `(B, dt)`:

        smooth L1 distance of P x and (y - mean of y) / sqrt(variance of y + 1e-5), averaged over batch and channels

    Mean and variance are over the channels of each image, which is the paper's normalisation for classification. P is
    an `OrthogonalProjection`. With dt >= ds it keeps all angles and distances of the student's features, so that it
    cannot learn in the student's place.

    Raises:
        ValueError: no teacher, or a model without maps.
    """

    def __init__(self, student: Shapes, teacher: Shapes | None) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        assert student.final is not None and teacher.final is not None
        self.projector = OrthogonalProjection(student.final[0], teacher.final[0])

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`vkd`. The targets are not used."""
        assert teacher is not None
        y = pooled(teacher).detach()
        with torch.autocast(y.device.type, enabled=False):
            return {"vkd": F.smooth_l1_loss(self.projector(pooled(student)), F.layer_norm(y, y.shape[1:]))}


class OrthogonalProjection(nn.Module):
    """A linear layer `(B, before)` to `(B, after)` whose matrix P, `(after, before)`, stays orthogonal while it is trained.

    `P^T P` is the identity if `after >= before`, and otherwise `P P^T`. The longer side n of a random orthogonal matrix
    X, `(n, k)`, is rotated by the Cayley transform of a skew-symmetric matrix A, as in Wen and Yin (2013):

        (I + A/2)^-1 (I - A/2) X,  A = W X^T - X W^T,  with trainable W, `(n, k)`, zero at the start

    A has rank 2k, so a system of 2k equations is solved (their Lemma 4). The VkD authors' code has torch's
    parametrisation by Householder reflections, whose backward pass takes k steps one after the other, or by the matrix
    exponential if n = k.
    """

    base: Tensor  # (n, k): X

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        n, k = max(before, after), min(before, after)
        self.widens = after >= before
        self.turn = nn.Parameter(torch.zeros(n, k))
        self.register_buffer("base", nn.init.orthogonal_(torch.empty(n, k)))

    def matrix(self) -> Tensor:
        """P, `(after, before)`."""
        u = torch.cat([self.turn, self.base], dim=1)  # A = u v^T
        v = torch.cat([self.base, -self.turn], dim=1)
        system = torch.eye(u.shape[1], dtype=u.dtype, device=u.device) + v.T @ u / 2
        solved, _ = torch.linalg.solve_ex(system, v.T @ self.base)  # not solve, which waits for the device
        turned = self.base - u @ solved
        return turned if self.widens else turned.T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())
