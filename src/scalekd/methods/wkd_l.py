"""`wkd_l`: Wasserstein distance between probabilities, over related classes (Lv et al., 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_logits, check_positive, full_precision

EPS = 1e-8  # added to costs and to divisors, as in the authors' code


class WKDL(nn.Module):
    """`wkd_l`: Wasserstein distance of the probabilities, which costs less between classes that the teacher relates.

    Lv et al., NeurIPS 2024 (arXiv:2412.08139), WKD-L with target separation. With the target class c of an image and
    the probabilities s and t at temperature 1, two terms, averaged over the batch:

        target    = -t_c * log s_c
        transport = gamma * sum over classes i, j other than c of q_ij * cost_ij

    q moves the student's distribution over the other classes, at `temperature`, to the teacher's. It is found by
    `iterations` steps of Sinkhorn's algorithm for a transport problem with entropy, of weight `regularization`. With the
    rows w of the teacher's classifier,

        cost_ij = 1 - exp(-sharpness * (1 - cos(w_i, w_j)))

    This is the authors' cost `fc`. Their ImageNet runs have the linear CKA of the teacher's logits for the images of the
    two classes in place of the cosine, from a pass over the training set (docs/reference/methods.md). With Mixup the
    target is the class with the largest share.

    Args:
        gamma: weight of `transport`. Default 30, the authors' for ResNet-34 to ResNet-18 (25 for ResNet-50 to
            MobileNet-V1).
        temperature: of `transport`. Default 2, as in the authors' ImageNet code.
        sharpness: larger values make classes that are not alike equally distant. Default 1, the authors' for ResNet-34
            to ResNet-18 (2 for ResNet-50 to MobileNet-V1).
        regularization: weight of the entropy. Default 0.05, as in the authors' code.
        iterations: of Sinkhorn's algorithm. Default 10, as in the authors' code.

    Raises:
        ValueError: no teacher, a model without maps, a teacher whose logits are not the output of one linear layer,
            different numbers of classes, fewer than three classes, or an option that is not positive.
    """

    needs_classifier = True
    needs_targets = True
    one_label = "it moves probability between classes of a softmax; use kd with probabilities=sigmoid"
    needs_logits = True

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        gamma: float = 30.0,
        temperature: float = 2.0,
        sharpness: float = 1.0,
        regularization: float = 0.05,
        iterations: int = 10,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_logits("wkd_l", student, teacher, temperature)
        check_positive(
            "wkd_l", gamma=gamma, sharpness=sharpness, regularization=regularization, iterations=iterations
        )
        if teacher.pooled < 1:
            raise ValueError(
                f"wkd_l needs a single classifier that gives the teacher's logits, and {teacher.model} has none.\n"
                "Use kd or dist"
            )
        if student.classes < 3:
            raise ValueError(f"wkd_l needs three classes or more, and there are {student.classes}. Use kd")
        self.gamma, self.temperature, self.sharpness = gamma, temperature, sharpness
        self.regularization, self.iterations = regularization, iterations

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`target` and `transport`. Targets: class indices `(B,)` or probabilities `(B, classes)`."""
        assert teacher is not None
        s, t = full_precision(student.logits), full_precision(teacher.logits.detach())
        is_target = F.one_hot(targets.argmax(dim=1) if targets.ndim == 2 else targets, s.shape[1])
        s_others, t_others = (
            (logits / self.temperature).masked_fill(is_target == 1, -torch.inf).softmax(dim=1) for logits in (s, t)
        )
        with torch.autocast(s.device.type, enabled=False):
            cost = costs(class_rows(teacher), self.sharpness).to(s.dtype)
            start = (1 - is_target).to(s.dtype) / (s.shape[1] - 1)
            distances = transport(s_others, t_others, start, cost, self.regularization, self.iterations)
        chosen = is_target * t.softmax(dim=1) * F.log_softmax(s, dim=1)
        return {"target": -chosen.sum(dim=1).mean(), "transport": self.gamma * distances.mean()}


@torch.no_grad()
def class_rows(teacher: Features) -> Tensor:
    """The rows of the teacher's linear classifier, `(classes, P)`: its logits for each unit vector, without the bias."""
    assert teacher.pooled is not None and teacher.classify is not None
    like = full_precision(teacher.pooled)
    units = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return full_precision(teacher.classify(units) - teacher.classify(torch.zeros_like(units[:1]))).T


def costs(rows: Tensor, sharpness: float) -> Tensor:
    """Costs from class to class, `(classes, classes)`, in [0, 1): 0 for the same direction of the rows `(classes, P)`."""
    directions = F.normalize(rows)
    return 1 - torch.exp(sharpness * (directions @ directions.T - 1).clamp_max(0))


def transport(s: Tensor, t: Tensor, start: Tensor, cost: Tensor, regularization: float, iterations: int) -> Tensor:
    """The cost `(B,)` of moving distributions `s` to `t`, both `(B, classes)`, by Sinkhorn's algorithm.

    Args:
        start: `(B, classes)`, what the factors of the rows start with. A class with 0 here and in `s` and `t` takes no
            part, so that one kernel serves all images, each of which leaves out its own target class.
        cost: `(classes, classes)`.
        regularization: weight of the entropy.
    """
    cost = cost + EPS
    kernel = torch.exp(-cost / regularization)
    u = start
    for _ in range(iterations):
        v = t / (u @ kernel + EPS)
        u = s / (v @ kernel.T + EPS)
    return (u * (v @ (kernel * cost).T)).sum(dim=1)
