"""`rsd`: redundancy suppression (Zhang et al., 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_positive, full_precision, pooled

EPS = 1e-5  # added to the standard deviations, as in the authors' code


class RSD(nn.Module):
    """`rsd`: each projected channel of the student correlates with its channel of the teacher, and with no other.

    Zhang et al., ICCV 2025 (arXiv:2507.21844). The student's final map, averaged over positions, `(B, ds)`, goes through
    a linear layer to `expansion * ds` channels, BatchNorm, GELU and a linear layer to the teacher's dt channels, both
    without bias. With the correlations `P`, `(dt, dt)`, of these and of the teacher's pooled channels over the batch,
    two terms:

        invariance    = alpha * sum over channels of (1 - P_ii)^2
        decorrelation = alpha * kappa * sum over pairs i, j of different channels of P_ij^2

    The correlations span the batch of one process in one forward pass. Both models' pooled features are means of the
    final map; the authors take the classifier's input, which in a ViT is the class token.

    Args:
        alpha: weight of both terms. Default 0.1, as in the authors' code.
        kappa: factor of `decorrelation`. Default 0.01, as in the authors' code.
        expansion: width of the hidden layer, as a multiple of ds. Default 2, as in the authors' code.

    Raises:
        ValueError: no teacher, a model without maps, or an option out of range.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        alpha: float = 0.1,
        kappa: float = 0.01,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_positive("rsd", alpha=alpha, kappa=kappa, expansion=expansion)
        assert student.final is not None and teacher.final is not None
        self.alpha, self.kappa = alpha, kappa
        ds, dt = student.final[0], teacher.final[0]
        self.projector = nn.Sequential(
            nn.Linear(ds, expansion * ds, bias=False),
            nn.BatchNorm1d(expansion * ds),
            nn.GELU(),
            nn.Linear(expansion * ds, dt, bias=False),
        )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`invariance` and `decorrelation`, weights applied. The targets are not used."""
        assert teacher is not None
        s = standardized(full_precision(self.projector(pooled(student))))
        t = standardized(pooled(teacher).detach())
        with torch.autocast(s.device.type, enabled=False):
            correlations = t.T @ s / len(s)
        own = correlations.diagonal()
        others = correlations.square().sum() - own.square().sum()
        return {
            "invariance": self.alpha * (1 - own).square().sum(),
            "decorrelation": self.alpha * self.kappa * others,
        }


def standardized(x: Tensor) -> Tensor:
    """`(B, D)` with mean 0 and standard deviation 1 over the batch; a channel that does not vary is 0."""
    return (x - x.mean(dim=0)) / (x.std(dim=0, correction=0) + EPS)
