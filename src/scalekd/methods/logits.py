"""Losses on logits: `ce` and `bce` with the labels, `kd` with the teacher's predictions."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_choice, check_logits, full_precision


def _check_task(name: str, student: Shapes, smoothing: float) -> None:
    if student.classes < 1:
        raise ValueError(f"{name} needs logits and {student.model} has no classes; build it with num_classes")
    if not 0 <= smoothing < 1:
        raise ValueError(f"{name}: smoothing is {smoothing} and must be in [0, 1)")


class CrossEntropy(nn.Module):
    """`ce`: cross entropy with the labels, averaged over the batch, in nats.

    Args:
        smoothing: label smoothing eps, in [0, 1): target p becomes `(1 - eps) * p + eps / classes`.
            Default 0; the ScaleKD paper's advanced recipes use 0.1 (Table 10). Do not also set it in a Mixup
            transform.

    Raises:
        ValueError: the student has no classes, or `smoothing` is out of range.
    """

    needs_teacher = False
    needs_maps = False
    needs_targets = True

    def __init__(self, student: Shapes, teacher: Shapes | None = None, *, smoothing: float = 0.0) -> None:
        super().__init__()
        _check_task("ce", student, smoothing)
        self.smoothing = smoothing

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """Targets: class indices `(B,)` or probabilities `(B, classes)`."""
        logits = full_precision(student.logits)
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        return {"ce": F.cross_entropy(logits, targets, label_smoothing=self.smoothing)}


class BinaryCrossEntropy(nn.Module):
    """`bce`: binary cross entropy with the labels, each class a yes/no question, averaged over the batch, in nats.

    Args:
        smoothing: label smoothing eps, in [0, 1): target p becomes `(1 - eps) * p + eps / classes`.
        reduction: over the classes of an image. `mean` (default), as in vanillaKD. `sum` is `classes` times as large,
            as in the released ScaleKD "advanced" ResNet-50 configuration.

    Raises:
        ValueError: the student has no classes, or an option is out of range.
    """

    needs_teacher = False
    needs_maps = False
    needs_targets = True

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None = None,
        *,
        smoothing: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        _check_task("bce", student, smoothing)
        check_choice("bce", "reduction", reduction, ("mean", "sum"))
        self.smoothing = smoothing
        self.reduction = reduction

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """Targets: class indices `(B,)` or probabilities `(B, classes)`."""
        logits = full_precision(student.logits)
        classes = logits.shape[1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, classes)
        targets = targets.to(logits.dtype) * (1 - self.smoothing) + self.smoothing / classes
        loss = F.binary_cross_entropy_with_logits(logits, targets)
        return {"bce": loss * classes if self.reduction == "sum" else loss}


class KD(nn.Module):
    """`kd`: `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, averaged over the batch, in nats.

    Hinton et al. 2015 (arXiv:1503.02531). The factor T^2 keeps the gradient's size independent of T.

    Args:
        temperature: T > 0. Default 1, as in ScaleKD and vanillaKD.

    Raises:
        ValueError: no teacher, a teacher without classes or with another number than the student, or a `temperature`
            that is not positive.
    """

    needs_maps = False

    def __init__(self, student: Shapes, teacher: Shapes | None, *, temperature: float = 1.0) -> None:
        super().__init__()
        check_logits("kd", student, teacher, temperature)
        self.temperature = temperature

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`kd`. The targets are not used."""
        assert teacher is not None
        T = self.temperature
        log_s = F.log_softmax(full_precision(student.logits) / T, dim=1)
        log_t = F.log_softmax(full_precision(teacher.logits.detach()) / T, dim=1)
        return {"kd": T * T * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)}
