"""`srrl`: softmax regression representation learning."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, full_precision


class SRRL(nn.Module):
    """`srrl`: the student's feature should be classified by the teacher's classifier as the teacher's own is.

    Yang et al., ICLR 2021 (openreview ZzwDy_wiWv). The student's final map `(B, ds, h, w)` goes through a 1x1
    convolution to the width P of what the teacher's classifier is given and a BatchNorm, and is averaged over
    its grid: `x`, `(B, P)`. With the teacher's own `y`, `(B, P)`, and its frozen classifier W, two terms:

        fm = alpha * mean over P of (x - y)^2                    feature matching
        sr = beta  * mean over classes of (W(x) - W(y))^2        softmax regression

    averaged over the batch. The paper writes squared norms; the means are those of the authors' code. Grids do
    not matter, nor do the student's classes. `y` is what the classifier is given in the teacher's forward pass: the
    pooled map, or the class token of a ViT that classifies from it.

    Args:
        alpha: weight of `fm`, beta: weight of `sr`. Default 1 and 1, the authors' ImageNet code.
        relu: a ReLU after the BatchNorm, as in the authors' code, whose teachers are ResNets. Default False: the
            features of a ViT are of either sign, and those below zero could not be met.

    Raises:
        ValueError: no teacher, a model without maps, a teacher whose logits are not what one classifier gives for
            one feature (no classes, two heads), a weight negative, or both 0.
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
        teacher = check_features(student, teacher, 1.0, "mean")
        if teacher.classes < 1 or teacher.pooled < 1:
            raise ValueError(
                f"srrl needs the teacher's classifier, and {teacher.model} has none that gives its logits alone.\n"
                "Use fd or another feature method, or kd"
            )
        if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
            raise ValueError(f"srrl: alpha is {alpha} and beta {beta}; neither can be negative, and one is positive")
        assert student.final is not None
        self.alpha, self.beta = alpha, beta
        self.connector = nn.Sequential(
            nn.Conv2d(student.final[0], teacher.pooled, 1, bias=False),
            nn.BatchNorm2d(teacher.pooled),
            nn.ReLU() if relu else nn.Identity(),
        )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`fm` and `sr`, weights applied. Targets are not looked at."""
        assert teacher is not None and teacher.pooled is not None and teacher.classify is not None
        assert student.final is not None
        x = full_precision(self.connector(full_precision(student.final))).mean(dim=(2, 3))
        y = full_precision(teacher.pooled.detach())
        logits = full_precision(teacher.classify(x))
        return {
            "fm": self.alpha * F.mse_loss(x, y),
            "sr": self.beta * F.mse_loss(logits, full_precision(teacher.logits.detach())),
        }
