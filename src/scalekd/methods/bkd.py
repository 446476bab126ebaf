"""`bkd`: distillation by binary cross entropy, with each class as a yes/no question (Hao et al., 2023)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_choice, check_logits, full_precision


class BKD(nn.Module):
    """`bkd`: `bce` with the teacher's probabilities as labels.

    The BKD of vanillaKD's authors (Hao et al., NeurIPS 2023, arXiv:2305.15781), as their release computes it. With
    the teacher's probabilities q, `(B, classes)`, and the student's logits s, `(B, classes)`,

        -mean over classes of  q * log sigmoid(s) + (1 - q) * log(1 - sigmoid(s))

    averaged over the batch, in nats. This is the binary KL divergence plus the entropy of q, which has no gradient, so
    the minimum is not 0. As for `bce`, the mean makes it small if there are many classes.

    Args:
        probabilities: how q follows from the teacher's logits. `softmax` (default), as in the release, although the
            student's probabilities are sigmoids. `sigmoid`, for a teacher trained with binary cross entropy, such as
            DeiT III; the logits of a teacher trained with cross entropy have no fixed zero.

    Raises:
        ValueError: no teacher, different numbers of classes, a teacher without classes, or an unknown value of
            `probabilities`.
    """

    needs_maps = False
    one_label = "the softmax's probabilities of the classes add up to 1; set losses.bkd.probabilities=sigmoid"

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        probabilities: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        super().__init__()
        check_logits("bkd", student, teacher)
        check_choice("bkd", "probabilities", probabilities, ("softmax", "sigmoid"))
        self.probabilities = probabilities
        self.takes_top_k = probabilities == "softmax"  # a sigmoid tells more than the sum of the other classes

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`bkd`. The targets are not used."""
        assert teacher is not None
        t = full_precision(teacher.logits.detach())
        q = t.softmax(dim=1) if self.probabilities == "softmax" else t.sigmoid()
        return {"bkd": F.binary_cross_entropy_with_logits(full_precision(student.logits), q)}
