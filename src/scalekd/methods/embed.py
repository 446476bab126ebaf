"""`embed`: the teacher's embedding as the target of the student's, for retrieval."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .rkd import differences, relative
from .shared import check_features, check_weights, full_precision, pooled


class Embed(nn.Module):
    """`embed`: match the teacher's embedding of each image, and its distances between the images of a batch.

    A model's embedding is the output of its embedding head (`student.embedding` in a recipe), or else what its classifier
    is given: the class token or what it pools. With the student's embedding s, the teacher's t, and x/|x| for a vector of
    length 1, there are two terms:

        cosine:     1 - cos(P s, t), averaged over the images
        relational: h(d(t) - d(s)) of  d_ij = |x_i/|x_i| - x_j/|x_j|| / mean of the distances,  averaged over all pairs

    P is the identity or, if s and t have different lengths, a linear layer that is trained and not exported. The term
    `relational` is RKD-D of Park et al., CVPR 2019 (arXiv:1904.05068, section 3.2.1: the distance potential, divided by
    the mean distance, under the Huber loss h with delta 1), on normalised vectors, whose distances have the order of the
    cosine similarities. The batch is that of one process in one forward pass. No labels are needed.

    Args:
        cosine: weight of the term `cosine`; 0 leaves it out. Default 1.
        relational: weight of the term `relational`; 0 leaves it out. Default 1.

    Raises:
        ValueError: no teacher, a model without maps, a negative weight, or both 0.
    """

    needs_pooled = True

    def __init__(
        self, student: Shapes, teacher: Shapes | None, *, cosine: float = 1.0, relational: float = 1.0
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_weights("embed", cosine=cosine, relational=relational)
        self.cosine, self.relational = cosine, relational
        ours, theirs = width(student), width(teacher)
        self.projector = nn.Linear(ours, theirs) if cosine and ours != theirs else nn.Identity()

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`cosine` and `relational`, weights applied. The targets are not used."""
        assert teacher is not None
        ours, target = embedding(student), full_precision(embedding(teacher).detach())
        losses = {}
        if self.cosine:
            projected = full_precision(self.projector(ours))
            losses["cosine"] = self.cosine * (1 - F.cosine_similarity(projected, target, dim=1)).mean()
        if self.relational:
            losses["relational"] = self.relational * F.smooth_l1_loss(apart(full_precision(ours)), apart(target))
        return losses


def width(model: Shapes) -> int:
    """Numbers of a model's embedding."""
    assert model.final is not None
    return model.embedding or model.pooled or model.final[0]


def embedding(model: Features) -> Tensor:
    """The embedding `(B, E)`, not normalised. A model without a single classifier has the mean of its final map."""
    if model.embedding is not None:
        return model.embedding
    return pooled(model) if model.pooled is None else model.pooled


def apart(x: Tensor) -> Tensor:
    """Distances of the normalised vectors `(B, E)`, divided by their mean, `(B, B)`."""
    with torch.autocast(x.device.type, enabled=False):
        return relative(differences(F.normalize(x, dim=1))[1])
