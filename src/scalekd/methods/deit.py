"""`deit`: distillation through a token (Touvron et al., 2021)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .logits import divergence
from .shared import check_choice, check_logits, full_precision


class DeiT(nn.Module):
    """`deit`: the second head of a distilled student learns the teacher's predictions, the first the labels.

    Touvron et al., ICML 2021 (arXiv:2012.12877), eq. 2 and 3. The student has two classifiers, as timm's distilled DeiT
    on its class token and its distillation token. With the logits `d` of the second and `t` of the teacher,
    `(B, classes)`, averaged over the batch, in nats:

        hard: cross entropy of softmax(d) with the teacher's class, argmax t
        soft: T^2 * KL(softmax(t / T) || softmax(d / T))

    With this loss all other losses on logits see the first head alone; `ce` trains it. In evaluation, and in the
    exported student, timm averages the logits of both. The paper trains with half of each loss: set `weight: 0.5` for
    `ce` and `deit`.

    Args:
        kind: `hard` (default, the better one in the paper) or `soft`.
        temperature: T of `soft`, positive. Default 1, as in the authors' code; the paper has 3 and a weight of 0.1. The
            authors' code also divides `soft` by the number of classes.

    Raises:
        ValueError: a student without a second head, no teacher, a teacher without classes or with another number than
            the student, or an option out of range; when called, a student in eval mode.
    """

    needs_maps = False
    one_label = "its second head learns one class or a softmax; use kd with probabilities=sigmoid"
    needs_two_heads = True

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        kind: Literal["hard", "soft"] = "hard",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_logits("deit", student, teacher, temperature)
        check_choice("deit", "kind", kind, ("hard", "soft"))
        if not student.two_heads:
            raise ValueError(
                f"deit needs a student with a second head for the teacher, and {student.model} has one head. Use a "
                "distilled model of timm, such as deit_tiny_distilled_patch16_224, or kd"
            )
        if kind == "hard" and temperature != 1:
            raise ValueError("deit: temperature has no effect on hard predictions; remove it, or set kind to soft")
        self.kind, self.temperature = kind, temperature

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`deit`. The targets are not used."""
        assert teacher is not None
        if student.distilled is None:
            raise ValueError("deit: in eval mode the student gives the mean of its two heads; call train() before")
        d, t = full_precision(student.distilled), full_precision(teacher.logits.detach())
        if self.kind == "hard":
            return {"deit": F.cross_entropy(d, t.argmax(dim=1))}
        return {"deit": self.temperature**2 * divergence(d / self.temperature, t / self.temperature)}
