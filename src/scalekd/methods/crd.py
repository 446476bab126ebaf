"""`crd`: contrastive representation distillation (Tian et al., 2020)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_positive, full_precision, pooled


class CRD(nn.Module):
    """`crd`: contrast the two models' embeddings of the same image with those of other images.

    Tian et al., ICLR 2020 (arXiv:1910.10699), the loss of its eq. 18. Each model's final map, averaged over
    positions, goes through a linear layer to `dim` channels and is scaled to length 1: `s` and `t`, `(B, dim)`, so
    grids may differ. Against one positive and N negatives an anchor's loss is

        -log h(positive) - sum over negatives of log(1 - h(negative)),  h(x) = e^(a x / tau) / (e^(a x / tau) + N Z)

    averaged over the batch. In the term `student` the anchors are the student's embeddings, and the positive and the
    negatives the teacher's; in `teacher` it is the reverse. The other side is constant, like the paper's memory. Z is
    the mean of `e^(a x / tau)` at the first step and constant afterwards, as in the authors' code, where the size of
    the data set cancels.

    The paper's memory has an entry for each image of the data set. A method here does not know which images it gets,
    so it differs:

    - The negatives are queues of the last N embeddings of each model, the same for all anchors of a batch. The paper
      draws N from the data set for each anchor. A queue longer than the data set contains the anchor's own image: keep
      `negatives` well below the number of images.
    - Negatives are not chosen by class (the authors' "exact" mode); some have the anchor's class.
    - The positive is the other model's embedding of the same view in this step, not a running mean over epochs.
    - The queues start with random directions. They are buffers, so they are saved and a resumed run continues with
      them. Several processes all use the queues of the first, which hold the embeddings of its part of each batch;
      `2 * negatives * dim` numbers are sent at each step.

    Args:
        dim: channels of the embedding. Default 128, as in the authors' code.
        negatives: N, the length of both queues. Default 16384, as in the authors' code.
        temperature: tau. Default 0.07, as in the authors' code.
        alpha: weight of both terms. Default 0.8, the authors' beta.

    Raises:
        ValueError: no teacher, a model without maps, or an option that is not positive.
    """

    student_queue: Tensor  # (negatives, dim), vectors of length 1
    teacher_queue: Tensor  # (negatives, dim), vectors of length 1
    oldest: Tensor  # (), index of the oldest embedding in both queues, which is replaced next
    log_z: Tensor  # (2,), log Z of the terms `student` and `teacher`; inf before the first step

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        alpha: float = 0.8,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_positive("crd", alpha=alpha, dim=dim, negatives=negatives, temperature=temperature)
        assert student.final is not None and teacher.final is not None
        self.temperature = temperature
        self.alpha = alpha
        self.embed_student = nn.Linear(student.final[0], dim)
        self.embed_teacher = nn.Linear(teacher.final[0], dim)
        for name in ("student_queue", "teacher_queue"):
            self.register_buffer(name, F.normalize(torch.randn(negatives, dim)))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.register_buffer("log_z", torch.full((2,), torch.inf))

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`student` and `teacher`, named by the anchors, with `alpha` applied. The targets are not used."""
        assert teacher is not None
        s = embedding(self.embed_student, pooled(student))
        t = embedding(self.embed_teacher, pooled(teacher).detach())
        losses = {
            "student": self.alpha * self._contrast(s, t.detach(), self.teacher_queue, term=0),
            "teacher": self.alpha * self._contrast(t, s.detach(), self.student_queue, term=1),
        }
        if self.training:
            self._remember(s.detach(), t.detach())
        return losses

    def _contrast(self, anchors: Tensor, positives: Tensor, queue: Tensor, term: int) -> Tensor:
        """The loss of anchors `(B, dim)`; `term` is the index of its Z in `log_z`."""
        with torch.autocast(anchors.device.type, enabled=False):
            positive = (anchors * positives).sum(dim=1, keepdim=True) / self.temperature  # (B, 1)
            # a copy, because the queue changes before the backward pass
            negative = anchors @ queue.clone().T / self.temperature  # (B, N)
            if self.training:
                self._set_z(torch.cat([positive, negative], dim=1).detach(), term)
            log_nz = math.log(len(queue)) + self.log_z[term].clone()
            # log h and log(1 - h): h is the sigmoid of the exponent minus log(N Z)
            log_h, log_not_h = F.logsigmoid(positive - log_nz), F.logsigmoid(log_nz - negative)
            return -(log_h.sum() + log_not_h.sum()) / len(anchors)

    def _set_z(self, exponents: Tensor, term: int) -> None:
        """Sets Z at the first step. It does not branch on a value on the device, which would wait for the device."""
        log_mean = exponents.flatten().logsumexp(dim=0) - math.log(exponents.numel())
        self.log_z[term] = torch.where(self.log_z[term].isinf(), log_mean, self.log_z[term])

    def _remember(self, s: Tensor, t: Tensor) -> None:
        """Replaces the oldest embeddings by a batch. In place, because DDP sends the original buffers."""
        length = len(self.student_queue)
        s, t = s[-length:], t[-length:]
        places = (self.oldest + torch.arange(len(s), device=s.device)) % length
        self.student_queue[places] = s.to(self.student_queue.dtype)
        self.teacher_queue[places] = t.to(self.teacher_queue.dtype)
        self.oldest.copy_((self.oldest + len(s)) % length)


def embedding(linear: nn.Module, features: Tensor) -> Tensor:
    """Features `(B, D)` as vectors of length 1, `(B, dim)`, in float32 or float64."""
    return F.normalize(full_precision(linear(features)))
