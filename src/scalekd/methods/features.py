"""The feature distance that ScaleKD's terms share, and `fd`, plain feature distillation with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from ..stages import Features, Shapes
from .logits import full_precision
from .maps import stage_map
from .projectors import CrossAttentionProjector, Norm, conv_projector, linear_projector

Reduction = Literal["mean", "sum"]

ALPHA = 0.14  # released ScaleKD configurations: 0.08 for the original view + 0.06 for the alternative one
REFERENCE_POSITIONS = 49  # the 7x7 grid for which ALPHA was chosen
EPS = 1e-6  # a vector shorter than this has no direction


def remove_direct(x: Tensor) -> Tensor:
    """phi of ScaleKD's eq. 2: drop the direct (zero-frequency) component of each channel.

    `(B, D, H, W)` to the same, in float32 at least. DCT, zero at (0, 0), inverse DCT: every other basis
    function of the DCT sums to zero over the grid, so what is dropped is exactly the mean.
    """
    x = full_precision(x)
    return x - x.mean(dim=(2, 3), keepdim=True)


def only_direct(x: Tensor) -> Tensor:
    """What `remove_direct` drops: the spatial mean at every position, `(B, D, H, W)`."""
    return full_precision(x).mean(dim=(2, 3), keepdim=True).expand_as(x)


def normalized_distance(a: Tensor, t: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Squared distance of two maps whose channel vectors are scaled to length 1 at each position.

    `a`, `t`: `(B, D, H, W)`. Computed as `2 - 2 cos`, without the normalised copies, in float32 at least
    even under autocast. A vector shorter than 1e-6 counts as zero: it normalises to zero and gets no
    gradient. This is L of ScaleKD's eq. 1 as the authors' release computes it.

    reduction:
        `sum`: summed over positions, averaged over the batch: the release. A 16x16 grid gives about
        five times the value of a 7x7 grid.
        `mean`: 49 x the average over positions and batch. Equal to `sum` at 7x7, so a weight found there
        means the same on any grid.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, t = full_precision(a), full_precision(t)
        a_norm = torch.linalg.vector_norm(a, dim=1)  # (B, H, W)
        t_norm = torch.linalg.vector_norm(t, dim=1)
        a_zero, t_zero = a_norm < EPS, t_norm < EPS
        # A zero vector's length is taken as inf: its cosine is 0 and so is its gradient. Two divisions,
        # as the gradient of a product of lengths would be 0 * inf.
        cos = (a * t).sum(dim=1) / a_norm.masked_fill(a_zero, torch.inf)
        cos = cos / t_norm.masked_fill(t_zero, torch.inf)
        distance = (2 - 2 * cos) - a_zero.to(cos.dtype) - t_zero.to(cos.dtype)
        if reduction == "mean":
            return REFERENCE_POSITIONS * distance.mean()
        return distance.sum() / len(a)


def check_features(student: Shapes, teacher: Shapes | None, alpha: float, reduction: str) -> Shapes:
    """The teacher, after the checks that every method with this distance makes. Raises ValueError."""
    if teacher is None:
        raise ValueError("a feature method needs a teacher")
    for model in (student, teacher):
        if model.final is None or len(model.maps) != 4:
            raise ValueError(f"a feature method needs maps and {model.model} gives logits only. Use kd")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be positive (to switch the method off, leave it out)")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it can be 'mean' or 'sum'")
    return teacher


def check_positions(student: Shapes, stages: Iterable[int]) -> None:
    """Attention over one position gives its value to every query: the projection would be the same vector everywhere,
    and nothing in it would tell one position from another. Raises ValueError."""
    for stage in stages:
        channels, height, width = stage_map(student, stage)
        if height * width == 1:
            raise ValueError(
                f"cross attention needs several positions, and {student.model}'s map of stage {stage} is 1x1 "
                f"({channels} channels).\nUse a larger data.image_size, or fd (projector linear or conv) or kd"
            )


class FD(nn.Module):
    """`fd`: mimic teacher maps through a projector, in the way of FitNets, with ScaleKD's distance.

    The "FD" of ScaleKD's Table 1 and the projectors of its Table 9b. One term per stage, `s3`, `s4`, ...

    Args:
        stages: stages 1 to 4. Stage 4 is the map after the final norm, of both models.
        projector: `linear`, one linear layer; `conv`, two 3x3 convolutions with norm and ReLU between;
            `cap`, ScaleKD's cross attention. For `linear` and `conv` the student's map is first resampled
            to the teacher's grid: averaged over cells where it shrinks, bilinear where it grows.
        alpha: weight of each stage. Default 0.14, the released ScaleKD weight; the paper does not give
            the one of its FD rows.
        reduction: see `normalized_distance`.
        heads: `cap` only: attention heads, one number per stage. None: head size as near to 64 as can be.
        norm: `conv` and `cap` only: `batch` or `layer`. None: `batch`.

    Raises:
        ValueError: no teacher, a model without maps, a stage out of range or given twice, an option that
            the chosen projector would ignore, heads that do not divide the teacher's channels, `cap` on a
            student's map of one position.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        stages: tuple[int, ...] = (4,),
        projector: Literal["linear", "conv", "cap"] = "linear",
        alpha: float = ALPHA,
        reduction: Reduction = "mean",
        heads: tuple[int, ...] | None = None,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher, alpha, reduction)
        if not stages or len(set(stages)) != len(stages) or not set(stages) <= {1, 2, 3, 4}:
            raise ValueError(f"fd: stages is {list(stages)}; name each of the stages 1 to 4 once at most")
        if projector not in ("linear", "conv", "cap"):
            raise ValueError(f"fd: projector is {projector!r}; it can be 'linear', 'conv' or 'cap'")
        if heads is not None and projector != "cap":
            raise ValueError("fd: heads goes with projector 'cap' only")
        if heads is not None and len(heads) != len(stages):
            raise ValueError(f"fd: heads has {len(heads)} numbers for {len(stages)} stages")
        if norm is not None and projector == "linear":
            raise ValueError("fd: norm goes with projector 'conv' or 'cap' only")

        if projector == "cap":
            check_positions(student, stages)

        self.stages = tuple(stages)
        self.alpha = alpha
        self.reduction: Reduction = reduction
        self.projectors = nn.ModuleDict()
        for i, stage in enumerate(stages):
            s, t = stage_map(student, stage), stage_map(teacher, stage)
            if projector == "linear":
                module = linear_projector(s, t)
            elif projector == "conv":
                module = conv_projector(s, t, norm=norm or "batch")
            else:
                module = CrossAttentionProjector(s, t, heads=heads[i] if heads else None, norm=norm or "batch")
            self.projectors[f"s{stage}"] = module

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per stage, `alpha` applied. Targets are not looked at."""
        assert teacher is not None
        losses = {}
        for stage in self.stages:
            mimic = self.projectors[f"s{stage}"](stage_map(student, stage))
            target = stage_map(teacher, stage).detach()
            losses[f"s{stage}"] = self.alpha * normalized_distance(mimic, target, self.reduction)
        return losses
