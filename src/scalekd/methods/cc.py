"""`cc`: correlation congruence, in the form that the comparisons of distillation methods use."""

from __future__ import annotations

from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, full_precision, pooled


class CC(nn.Module):
    """`cc`: differences from the teacher should not come together in neighbouring images of a batch.

    After Peng et al., ICCV 2019 (arXiv:1904.01802), as the release of vanillaKD has it ("Correlation"). Each model's
    final map, averaged over its grid, goes through a linear layer of its own to `dim` numbers, `(B, dim)`; grids
    and channels do not matter. With the differences `d = |student's embedding - teacher's embedding|`,

        scale * mean over i of  sum over dim of  d[i] * d[i + 1]

    over the B - 1 pairs of neighbours in the batch of one process; for one image it is 0.

    There is no kernel in it. The paper's own loss is another: the mean squared difference of the two models' B x B
    matrices of a Gaussian kernel, expanded to order 2 (gamma 0.4). What is reported as CC, with the defaults
    below, is this form, so this is the one here; for relations between the images of a batch use `rkd`. Both
    layers are trained, the teacher's too, so the loss can also fall by making both embeddings small.

    Args:
        dim: width of the embeddings, positive. Default 128.
        scale: weight, positive. Default 0.02. Both are vanillaKD's release's.

    Raises:
        ValueError: no teacher, a model without maps, an option not positive.
    """

    def __init__(self, student: Shapes, teacher: Shapes | None, *, dim: int = 128, scale: float = 0.02) -> None:
        super().__init__()
        teacher = check_features(student, teacher, 1.0, "mean")
        if not dim > 0 or not scale > 0:
            raise ValueError(f"cc: dim is {dim} and scale {scale}; both must be positive")
        assert student.final is not None and teacher.final is not None
        self.scale = scale
        self.embed_student = nn.Linear(student.final[0], dim)
        self.embed_teacher = nn.Linear(teacher.final[0], dim)

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`cc`, `scale` applied. Targets are not looked at."""
        assert teacher is not None
        s = full_precision(self.embed_student(pooled(student)))
        t = full_precision(self.embed_teacher(pooled(teacher).detach()))
        d = (s - t).abs()
        pairs = max(len(d) - 1, 1)  # one image has no neighbour: the sum over none is 0
        return {"cc": self.scale * (d[:-1] * d[1:]).sum() / pairs}
