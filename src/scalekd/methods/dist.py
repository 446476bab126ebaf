"""`dist`: distillation from a stronger teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_logits, full_precision

EPS = 1e-6  # a vector shorter than this, its mean taken off, has no direction


class DIST(nn.Module):
    """`dist`: probabilities that rise and fall with the teacher's, over classes and over images.

    Huang et al., NeurIPS 2022 (arXiv:2205.10536). With the probabilities at temperature tau, `(B, classes)`, and
    Pearson's correlation r, two terms:

        inter = beta  * tau^2 * mean over images of   1 - r(the student's row, the teacher's row)
        intra = gamma * tau^2 * mean over classes of  1 - r(the student's column, the teacher's column)

    A strong teacher's probabilities need not be met, only their relations. The columns are of the batch that one
    process has in one forward pass, so `intra` depends on its size; for one image it is gamma * tau^2, without a
    gradient. Where a row or column hardly varies (length below 1e-6, its mean taken off), r is 0 and
    has no gradient. (The authors' code adds 1e-8 to the product of both lengths, which lowers r of small columns,
    and has a gradient near 1e8 for a student whose logits are all equal, as a timm Mixer's are at the start.)

    Args:
        beta: weight of `inter`. Default 1.
        gamma: weight of `intra`. Default 1. Both as in vanillaKD's release; the authors' ImageNet runs have 2
            for both beside a cross entropy of weight 1: give the method `weight: 2`.
        tau: temperature, positive. Default 1, the authors' for ImageNet (4 for CIFAR-100).

    Raises:
        ValueError: no teacher, a teacher without classes, or not the student's number of classes; one class;
            a weight negative, or both 0; `tau` not positive.
    """

    needs_maps = False

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        check_logits("dist", student, teacher)
        if student.classes < 2:
            raise ValueError("dist needs two classes or more. Use bkd")
        if not (beta >= 0 and gamma >= 0 and beta + gamma > 0):
            raise ValueError(f"dist: beta is {beta} and gamma {gamma}; neither can be negative, and one is positive")
        if not tau > 0:
            raise ValueError(f"dist: tau is {tau}; it must be positive")
        self.beta, self.gamma, self.tau = beta, gamma, tau

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`inter` and `intra`, weights applied. Targets are not looked at."""
        assert teacher is not None
        s = (full_precision(student.logits) / self.tau).softmax(dim=1)
        t = (full_precision(teacher.logits.detach()) / self.tau).softmax(dim=1)
        scale = self.tau**2
        return {
            "inter": self.beta * scale * (1 - correlation(s, t, dim=1)).mean(),
            "intra": self.gamma * scale * (1 - correlation(s, t, dim=0)).mean(),
        }


def correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's, of matrices along `dim`; 0 without a gradient where one of the two vectors hardly varies."""
    a, b = (x - x.mean(dim=dim, keepdim=True) for x in (a, b))
    dot = (a * b).sum(dim=dim)
    for x in (a, b):
        length = torch.linalg.vector_norm(x, dim=dim)
        dot = dot / length.masked_fill(length < EPS, torch.inf)
    return dot
