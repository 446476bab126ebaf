"""Losses on logits: `ce`, `bce` and `asl` with the labels, `kd` with the teacher's predictions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_choice, check_logits, full_precision

EPS = 1e-6  # logits with a smaller standard deviation count as equal


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
    one_label = "its probabilities of the classes add up to 1; use bce or asl"

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
        """Targets: class indices `(B,)`, or `(B, classes)` in [0, 1]: probabilities, or 1 for each class of an image."""
        logits = full_precision(student.logits)
        classes = logits.shape[1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, classes)
        targets = targets.to(logits.dtype) * (1 - self.smoothing) + self.smoothing / classes
        loss = F.binary_cross_entropy_with_logits(logits, targets)
        return {"bce": loss * classes if self.reduction == "sum" else loss}


class Asymmetric(nn.Module):
    """`asl`: the asymmetric loss for images with several labels (Ridnik et al., ICCV 2021, arXiv:2009.14119), in nats.

    Each class is a yes/no question, as in `bce`, with p the student's probability of yes. A class that an image has
    counts `-(1 - p)^gamma_pos * log(p)`. One that it does not have counts `-q^gamma_neg * log(1 - q)` with
    `q = max(p - clip, 0)`: classes that the student is sure an image does not have, which are most, count little or
    nothing (eq. 4, 5 and 7 of the paper). Computed by timm.

    Args:
        gamma_neg: focusing of the classes that an image does not have. Default 4, as in the paper.
        gamma_pos: focusing of those that it has. Default 1, as in the authors' code; the paper's experiments have 0.
        clip: the margin m of the probability, in [0, 1). Default 0.05, as in the paper.
        reduction: over the classes of an image. `mean` (default), as for `bce`, so that losses keep their balance
            whatever the number of classes. `sum` is `classes` times as large. The authors' code also sums the batch.

    Raises:
        ValueError: the student has no classes, or an option is out of range.
    """

    needs_teacher = False
    needs_maps = False
    needs_targets = True
    several_labels = True

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None = None,
        *,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        _check_task("asl", student, 0)
        check_choice("asl", "reduction", reduction, ("mean", "sum"))
        if gamma_neg < 0 or gamma_pos < 0 or not 0 <= clip < 1:
            raise ValueError(
                f"asl: gamma_neg is {gamma_neg}, gamma_pos {gamma_pos} and clip {clip}; the first two must not be negative, "
                "and clip must be in [0, 1)"
            )
        self.loss = AsymmetricLossMultiLabel(
            gamma_neg, gamma_pos, clip, reduction="mean" if reduction == "mean" else "batchmean"
        )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """Targets: `(B, classes)` of 0 and 1, or class indices `(B,)` for images with one class each."""
        logits = full_precision(student.logits)
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1])
        return {"asl": self.loss(logits, targets)}


class KD(nn.Module):
    """`kd`: `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, averaged over the batch, in nats.

    Hinton et al. 2015 (arXiv:1503.02531). The factor T^2 keeps the gradient's size independent of T. Two later changes:

    - `standardize`, logit standardisation (Sun et al., CVPR 2024, arXiv:2403.01427): for each image the logits of both
      models are first shifted to mean 0 and scaled to standard deviation 1 over the classes. The student's logits then
      need not have the range of the teacher's. The sum of squares is divided by `classes - 1`, as in the authors' code.
      Logits with a standard deviation below 1e-6 count as equal, without a gradient. The authors' code adds 1e-7 to the
      standard deviation instead, which for equal logits gives a gradient near 1e7.
    - `variant`, transformed teacher matching (Zheng and Yang, ICLR 2024, arXiv:2402.11148): with `ttm` the student has
      no temperature and there is no factor T^2, so that the student learns `p^(1/T)` of the teacher's probabilities p,
      scaled to sum 1. `wttm` also multiplies the loss of each image by that sum, which is larger where the teacher is
      less certain.

    For images with several labels the softmax has no meaning. With `probabilities: sigmoid` each class is a yes/no
    question, p = sigmoid(logit / T), as in multi-label logits distillation (Yang et al., ICCV 2023, arXiv:2308.06453):

        T^2 * mean over classes of  KL((p_t, 1 - p_t) || (p_s, 1 - p_s))

    The paper adds the classes up. The mean keeps the balance with `bce` whatever the number of classes.

    Args:
        temperature: T > 0. Default 1, as in ScaleKD and vanillaKD.
        probabilities: `softmax` (default), or `sigmoid` for teachers whose logits answer a yes/no question for each
            class.
        standardize: standardise the logits. Default False. The authors' ImageNet run has T 2 and weight 9.
        variant: `kd` (default), `ttm` or `wttm`.

    Raises:
        ValueError: no teacher, a teacher without classes or with another number than the student, a `temperature` that is
            not positive, an unknown `probabilities` or `variant`, or options that exclude each other or have no effect.
    """

    needs_maps = False
    one_label = "the softmax's probabilities of the classes add up to 1; set losses.kd.probabilities=sigmoid"

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        temperature: float = 1.0,
        probabilities: Literal["softmax", "sigmoid"] = "softmax",
        standardize: bool = False,
        variant: Literal["kd", "ttm", "wttm"] = "kd",
    ) -> None:
        super().__init__()
        check_logits("kd", student, teacher, temperature)
        check_choice("kd", "probabilities", probabilities, ("softmax", "sigmoid"))
        check_choice("kd", "variant", variant, ("kd", "ttm", "wttm"))
        if probabilities == "sigmoid" and (standardize or variant != "kd"):
            raise ValueError(
                "kd: standardize and variant change the softmax, and probabilities is sigmoid; use one of them"
            )
        if standardize and student.classes < 2:
            raise ValueError("kd: standardize needs two classes or more. Use bkd")
        if variant != "kd" and temperature == 1:
            raise ValueError(f"kd: variant {variant} is plain kd at temperature 1; set another temperature")
        if variant != "kd" and standardize:
            raise ValueError(
                f"kd: variant {variant} leaves the range of the logits to the student and standardize fixes it; use one of "
                "them"
            )
        self.temperature, self.probabilities = temperature, probabilities
        self.standardize, self.variant = standardize, variant
        self.takes_top_k = probabilities == "softmax" and not standardize and variant == "kd"

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`kd`. The targets are not used."""
        assert teacher is not None
        T = self.temperature
        s, t = full_precision(student.logits), full_precision(teacher.logits.detach())
        if self.probabilities == "sigmoid":
            return {"kd": T * T * binary_kl(t / T, s / T).mean()}
        if self.standardize:
            s, t = standardized(s), standardized(t)
        if self.variant == "kd":
            return {"kd": T * T * divergence(s / T, t / T)}
        if self.variant == "ttm":
            return {"kd": divergence(s, t / T)}
        return {"kd": divergence(s, t / T, (F.log_softmax(t, dim=1) / T).exp().sum(dim=1))}


def binary_kl(t: Tensor, s: Tensor) -> Tensor:
    """KL of two yes/no answers with probabilities sigmoid(t) and sigmoid(s), elementwise.

    From logits, so that a probability that is 0 or 1 in float32 still has a logarithm.
    """
    yes = t.sigmoid()
    return yes * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - yes) * (F.logsigmoid(-t) - F.logsigmoid(-s))


def divergence(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """`KL(softmax(teacher) || softmax(student))` from logits `(B, classes)`, averaged over the batch, in nats.

    weights: `(B,)`, a factor for each image; the sum is still divided by B.
    """
    log_s, log_t = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    if weights is None:
        return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    return (weights * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)).mean()


def standardized(logits: Tensor) -> Tensor:
    """Logits `(B, classes)` with mean 0 and standard deviation 1 over the classes; 0 where they hardly vary."""
    spread = logits.std(dim=1, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / spread.masked_fill(spread < EPS, torch.inf)
