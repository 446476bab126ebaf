"""`cc`: correlation congruence (after Peng et al., 2019), in the form that published comparisons use."""

from __future__ import annotations

from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_positive, full_precision, pooled


class CC(nn.Module):
    """`cc`: decorrelate the differences from the teacher between neighbouring images of a batch.

    After Peng et al., ICCV 2019 (arXiv:1904.01802), as in the release of vanillaKD ("Correlation"). Each
    model's final map, averaged over its grid, goes through its own linear layer to `dim` numbers, `(B, dim)`, so grids
    and channels may differ. With the differences `d = |student's embedding - teacher's embedding|`,

        scale * mean over i of  sum over dim of  d[i] * d[i + 1]

    over the B - 1 pairs of neighbours in the batch of one process; for one image it is 0.

    This is not the loss of the paper, which is the mean squared difference of the two models' B x B matrices of a
    Gaussian kernel, expanded to order 2 (gamma 0.4). Comparisons report this form, with the defaults below, as CC. For
    relations between the images of a batch use `rkd`. Both linear layers are trained, so the loss can also fall by
    making both embeddings small.

    Args:
        dim: width of the embeddings, positive. Default 128, as in vanillaKD's release.
        scale: weight, positive. Default 0.02, as in vanillaKD's release.

    Raises:
        ValueError: no teacher, a model without maps, or an option that is not positive.
    """

    def __init__(self, student: Shapes, teacher: Shapes | None, *, dim: int = 128, scale: float = 0.02) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_positive("cc", dim=dim, scale=scale)
        assert student.final is not None and teacher.final is not None
        self.scale = scale
        self.embed_student = nn.Linear(student.final[0], dim)
        self.embed_teacher = nn.Linear(teacher.final[0], dim)

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`cc`, `scale` applied. The targets are not used."""
        assert teacher is not None
        s = full_precision(self.embed_student(pooled(student)))
        t = full_precision(self.embed_teacher(pooled(teacher).detach()))
        d = (s - t).abs()
        pairs = max(len(d) - 1, 1)  # one image has no neighbours; the empty sum is 0
        return {"cc": self.scale * (d[:-1] * d[1:]).sum() / pairs}
