"""`srrl`: softmax regression representation learning (Yang et al., 2021)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_weights, full_precision


class SRRL(nn.Module):
    """`srrl`: the teacher's classifier should give the same logits for the student's features as for its own.

    Yang et al., ICLR 2021 (openreview ZzwDy_wiWv). The student's final map `(B, ds, h, w)` goes through a 1x1
    convolution to the width P of the input of the teacher's classifier and a BatchNorm, and is averaged over its grid:
    `x`, `(B, P)`. With the classifier's own input `y`, `(B, P)`, and the frozen classifier W, two terms:

        fm = alpha * mean over P of (x - y)^2                    feature matching
        sr = beta  * mean over classes of (W(x) - W(y))^2        softmax regression

    averaged over the batch. The paper writes squared norms; the means are those of the authors' code. Grids and the
    student's classes may differ from the teacher's. `y` is the classifier's input in the teacher's forward pass: the
    pooled map, or the class token of a ViT that classifies from it.

    Args:
        alpha: weight of `fm`. Default 1, as in the authors' ImageNet code.
        beta: weight of `sr`. Default 1, as in the authors' ImageNet code.
        relu: add a ReLU after the BatchNorm, as in the authors' code, whose teachers are ResNets. Default False, because
            the features of a ViT may be negative, which a ReLU could not match.

    Raises:
        ValueError: no teacher, a model without maps, a teacher whose logits are not the output of one classifier on one
            feature (no classes, two heads), a negative weight, or both 0.
    """

    needs_classifier = True

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        relu: bool = False,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        if teacher.classes < 1 or teacher.pooled < 1:
            raise ValueError(
                f"srrl needs a single classifier that gives the teacher's logits, and {teacher.model} has none.\n"
                "Use fd or another feature method, or kd"
            )
        check_weights("srrl", alpha=alpha, beta=beta)
        assert student.final is not None
        self.alpha, self.beta = alpha, beta
        self.connector = nn.Sequential(
            nn.Conv2d(student.final[0], teacher.pooled, 1, bias=False),
            nn.BatchNorm2d(teacher.pooled),
            nn.ReLU() if relu else nn.Identity(),
        )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`fm` and `sr`, weights applied. The targets are not used."""
        assert teacher is not None and teacher.pooled is not None and teacher.classify is not None
        assert student.final is not None
        x = full_precision(self.connector(full_precision(student.final))).mean(dim=(2, 3))
        y = full_precision(teacher.pooled.detach())
        logits = full_precision(teacher.classify(x))
        return {
            "fm": self.alpha * F.mse_loss(x, y),
            "sr": self.beta * F.mse_loss(logits, full_precision(teacher.logits.detach())),
        }
