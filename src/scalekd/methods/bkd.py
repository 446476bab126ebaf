"""`bkd`: binary distillation, each class a yes/no question."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_logits, full_precision


class BKD(nn.Module):
    """`bkd`: `bce` with the teacher's probabilities as labels.

    The BKD of vanillaKD's authors (Hao et al., NeurIPS 2023, arXiv:2305.15781), as their release computes it. With
    the teacher's probabilities q, `(B, classes)`, and the student's logits s, `(B, classes)`,

        -mean over classes of  q * log sigmoid(s) + (1 - q) * log(1 - sigmoid(s))

    averaged over the batch, in nats. It is the binary KL divergence of the classes plus the entropy of q, which has
    no gradient, so it does not end at 0. The mean makes it small when there are many classes, as for `bce`.

    Args:
        probabilities: what q is. `softmax` (default), of the teacher's logits: the release, though the student's
            are sigmoids. `sigmoid`: for a teacher trained with binary cross entropy, such as DeiT III, whose
            sigmoids mean something; those of a teacher trained with cross entropy have no fixed zero.

    Raises:
        ValueError: no teacher, a teacher without classes, or not the student's number of classes;
            `probabilities` is something else.
    """

    needs_maps = False

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        probabilities: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        super().__init__()
        check_logits("bkd", student, teacher)
        if probabilities not in ("softmax", "sigmoid"):
            raise ValueError(f"bkd: probabilities is {probabilities!r}; it can be 'softmax' or 'sigmoid'")
        self.probabilities = probabilities

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """Targets are not looked at."""
        assert teacher is not None
        t = full_precision(teacher.logits.detach())
        q = t.softmax(dim=1) if self.probabilities == "softmax" else t.sigmoid()
        return {"bkd": F.binary_cross_entropy_with_logits(full_precision(student.logits), q)}
