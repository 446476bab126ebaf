"""`crd`: contrastive representation distillation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, full_precision, pooled


class CRD(nn.Module):
    """`crd`: tell the teacher's embedding of the same image from those of other images, and the reverse.

    Tian et al., ICLR 2020 (arXiv:1910.10699), the loss of its eq. 18. Each model's final map, averaged over
    positions, goes through a linear layer to `dim` channels and is scaled to length 1: `s` and `t`, `(B, dim)`; the
    grids do not matter. Against one positive and N negatives an anchor's loss is

        -log h(positive) - sum over negatives of log(1 - h(negative)),  h(x) = e^(a x / tau) / (e^(a x / tau) + N Z)

    averaged over the batch. Term `student` has the students' embeddings as anchors and the teacher's as positive and
    negatives, `teacher` the reverse; the other side is constant, as the paper's memory is. Z is the mean of
    `e^(a x / tau)` at the first step, kept from there on, as in the authors' code, in whose form the size of the
    data set cancels.

    A method is not told which images it sees, so there is no memory with a place for each image of the data
    set, as the paper has. What is used instead, and how it differs:

    - negatives are queues of the last N embeddings of each model, the same for every anchor of a batch, in place
      of N draws from the whole data set for each. A queue longer than the data set has the anchor's own image
      among the negatives: keep `negatives` well below the number of images.
    - negatives are not chosen by class (the authors' "exact" mode); some are of the anchor's class.
    - the positive is the other model's embedding of the same view, in this step, not a running mean over epochs.
    - the queues start with random directions, and are the method's buffers: they are saved, and a resumed
      run goes on with them. With several processes all use the first one's, which holds the embeddings
      of its part of each batch; `2 * negatives * dim` numbers are sent at each step.

    Args:
        dim: channels of the embedding. Default 128, that of the authors' code.
        negatives: N, the length of both queues. Default 16384, as above.
        temperature: tau. Default 0.07, that of the authors' code.
        alpha: weight of both terms. Default 0.8, the authors' beta.

    Raises:
        ValueError: no teacher, a model without maps, an option not positive.
    """

    student_queue: Tensor  # (negatives, dim), vectors of length 1, as the other
    teacher_queue: Tensor
    oldest: Tensor  # (), where the next embedding goes in both queues
    log_z: Tensor  # (2,), of the terms `student` and `teacher`; inf before the first step

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
        teacher = check_features(student, teacher, alpha, "mean")
        for option, value in {"dim": dim, "negatives": negatives, "temperature": temperature}.items():
            if not value > 0:
                raise ValueError(f"crd: {option} is {value}; it must be positive")
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
        """`student` and `teacher`, by the side of the anchors, `alpha` applied. Targets are not looked at."""
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
        with torch.autocast(anchors.device.type, enabled=False):
            positive = (anchors * positives).sum(dim=1, keepdim=True) / self.temperature  # (B, 1)
            # a copy: the queue itself is written to before the backward pass
            negative = anchors @ queue.clone().T / self.temperature  # (B, N)
            if self.training:
                self._set_z(torch.cat([positive, negative], dim=1).detach(), term)
            log_nz = math.log(len(queue)) + self.log_z[term].clone()
            # log h and log(1 - h), as h is the sigmoid of the exponent less log(N Z)
            pulled, pushed = F.logsigmoid(positive - log_nz), F.logsigmoid(log_nz - negative)
            return -(pulled.sum() + pushed.sum()) / len(anchors)

    def _set_z(self, exponents: Tensor, term: int) -> None:
        """At the first step; without a question to the device, which would have to be waited for."""
        log_mean = exponents.flatten().logsumexp(dim=0) - math.log(exponents.numel())
        self.log_z[term] = torch.where(self.log_z[term].isinf(), log_mean, self.log_z[term])

    def _remember(self, s: Tensor, t: Tensor) -> None:
        """Writes a batch over the oldest embeddings, in place: DDP sends the buffers it has known from the start."""
        length = len(self.student_queue)
        s, t = s[-length:], t[-length:]
        places = (self.oldest + torch.arange(len(s), device=s.device)) % length
        self.student_queue[places] = s.to(self.student_queue.dtype)
        self.teacher_queue[places] = t.to(self.teacher_queue.dtype)
        self.oldest.copy_((self.oldest + len(s)) % length)


def embedding(linear: nn.Module, features: Tensor) -> Tensor:
    """`(B, D)` to vectors of length 1, `(B, dim)`, in float32 at least."""
    return F.normalize(full_precision(linear(features)))
