"""`dkd`: decoupled knowledge distillation (Zhao et al., 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_logits, check_weights, full_precision


class DKD(nn.Module):
    """`dkd`: `kd` in two parts, the target class against all others and the other classes among themselves.

    Zhao et al., CVPR 2022 (arXiv:2203.08679). Of the probabilities at temperature T let `b` be the pair (target
    class, sum of all others) and `n` the others scaled to sum 1. Then

        KL(teacher || student) = KL(b_t || b_s) + (1 - the teacher's target probability) * KL(n_t || n_s)

    so in `kd` a teacher that is confident in the target suppresses the second part. Here each part has its own weight:
    terms `tckd` = alpha * T^2 * KL(b_t || b_s) and `nckd` = beta * T^2 * KL(n_t || n_s), averaged over the batch,
    in nats. With Mixup the target class is the one with the largest share, as in vanillaKD's release. The
    authors' code raises both weights from 0 over the first epochs (ImageNet: one), which a method cannot do here.

    Args:
        alpha: weight of the target part. Default 1, as in all of the authors' configurations.
        beta: weight of the other part. Default 2 (vanillaKD's release). The authors' ImageNet configurations
            have 0.5 (ResNet-34 to ResNet-18) and 2 (ResNet-50 to MobileNet-V1): larger for a more confident teacher.
        temperature: T > 0. Default 1, for ImageNet; the authors use 4 for CIFAR-100.

    Raises:
        ValueError: no teacher, a teacher without classes or with another number than the student; one class; a negative
            weight, or both 0; a `temperature` that is not positive.
    """

    needs_maps = False
    takes_top_k = True
    needs_targets = True
    one_label = "it splits the softmax into the one class of an image and the others; use kd with probabilities=sigmoid"

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        alpha: float = 1.0,
        beta: float = 2.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_logits("dkd", student, teacher, temperature)
        if student.classes < 2:
            raise ValueError("dkd needs two classes or more. Use bkd")
        check_weights("dkd", alpha=alpha, beta=beta)
        self.alpha, self.beta = alpha, beta
        self.temperature = temperature

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`tckd` and `nckd`, weights applied. Targets: class indices `(B,)` or probabilities `(B, classes)`."""
        assert teacher is not None
        T = self.temperature
        target = targets.argmax(dim=1) if targets.ndim == 2 else targets
        binary_s, others_s = decoupled(full_precision(student.logits) / T, target)
        binary_t, others_t = decoupled(full_precision(teacher.logits.detach()) / T, target)
        return {
            "tckd": self.alpha * T * T * F.kl_div(binary_s, binary_t, reduction="batchmean", log_target=True),
            "nckd": self.beta * T * T * F.kl_div(others_s, others_t, reduction="batchmean", log_target=True),
        }


def decoupled(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, sum of the others), `(B, 2)`, and of the others alone, `(B, classes - 1)`.

    Computed from logits, so that a probability that is 0 in float32 still has a logarithm.
    """
    target = target[:, None]
    column = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, column + (column >= target))  # all columns except the target's
    rest = others.logsumexp(dim=1, keepdim=True)
    binary = torch.cat([logits.gather(1, target), rest], dim=1)
    return F.log_softmax(binary, dim=1), others - rest
