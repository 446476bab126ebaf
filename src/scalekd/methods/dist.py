"""`dist`: distillation from a stronger teacher (Huang et al., 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_logits, check_positive, check_weights, full_precision

EPS = 1e-6  # a vector shorter than this, after subtracting its mean, has no direction


class DIST(nn.Module):
    """`dist`: correlate the probabilities with the teacher's, over the classes and over the images.

    Huang et al., NeurIPS 2022 (arXiv:2205.10536). With the probabilities at temperature tau, `(B, classes)`, and
    Pearson's correlation r, two terms:

        inter = beta  * tau^2 * mean over images of   1 - r(the student's row, the teacher's row)
        intra = gamma * tau^2 * mean over classes of  1 - r(the student's column, the teacher's column)

    Only the relations between a strong teacher's probabilities are matched, not their values. The columns span the
    batch of one process in one forward pass, so `intra` depends on its size; for one image it is gamma * tau^2, without
    a gradient. For a row or column that hardly varies (length below 1e-6 after subtracting its mean), r is 0 and has no
    gradient. The authors' code adds 1e-8 to the product of both lengths instead. This lowers r of small columns, and
    its gradient is near 1e8 for a student with equal logits, such as a timm Mixer at the start.

    Args:
        beta: weight of `inter`. Default 1.
        gamma: weight of `intra`. Default 1. Both defaults are those of vanillaKD's release. The authors' ImageNet runs
            have 2 for both and a cross entropy of weight 1: set `weight: 2` for the method.
        tau: temperature, positive. Default 1, the authors' for ImageNet (4 for CIFAR-100).

    Raises:
        ValueError: no teacher, a teacher without classes or with another number than the student; one class; a negative
            weight, or both 0; a `tau` that is not positive.
    """

    needs_maps = False
    one_label = "it compares softmax probabilities, which add up to 1; use kd with probabilities=sigmoid"

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
        check_weights("dist", beta=beta, gamma=gamma)
        check_positive("dist", tau=tau)
        self.beta, self.gamma, self.tau = beta, gamma, tau

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`inter` and `intra`, weights applied. The targets are not used."""
        assert teacher is not None
        s = (full_precision(student.logits) / self.tau).softmax(dim=1)
        t = (full_precision(teacher.logits.detach()) / self.tau).softmax(dim=1)
        scale = self.tau**2
        return {
            "inter": self.beta * scale * (1 - correlation(s, t, dim=1)).mean(),
            "intra": self.gamma * scale * (1 - correlation(s, t, dim=0)).mean(),
        }


def correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation of two matrices along `dim`; 0 without a gradient where one of the vectors hardly varies."""
    a, b = (x - x.mean(dim=dim, keepdim=True) for x in (a, b))
    dot = (a * b).sum(dim=dim)
    for x in (a, b):
        length = torch.linalg.vector_norm(x, dim=dim)
        dot = dot / length.masked_fill(length < EPS, torch.inf)
    return dot
