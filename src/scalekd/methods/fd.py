"""`fd`: plain feature distillation with a linear or convolutional projector."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .distance import ALPHA, Reduction, normalized_distance
from .projectors import CrossAttentionProjector, Norm, conv_projector, linear_projector
from .shared import check_choice, check_features, check_positions, check_positive, check_stages, stage_map


class FD(nn.Module):
    """`fd`: match the teacher's maps through a projector, as in FitNets, with ScaleKD's distance.

    This is "FD" in ScaleKD's Table 1, with the projectors of its Table 9b. One term per stage, `s3`, `s4`, ...

    Args:
        stages: stages 1 to 4. Stage 4 is the map after the final norm, of both models.
        projector: `linear`, one linear layer; `conv`, two 3x3 convolutions with norm and ReLU between;
            `cap`, ScaleKD's cross attention. For `linear` and `conv` the student's map is first resampled
            to the teacher's grid, see `Resample`.
        alpha: weight of each stage. Default 0.14, the released ScaleKD weight; the paper does not state the weight of
            its FD rows.
        reduction: see `normalized_distance`.
        heads: `cap` only: attention heads, one number per stage. None: a head size as close to 64 as possible.
        norm: `conv` and `cap` only: `batch` or `layer`. None: `batch`.

    Raises:
        ValueError: no teacher, a model without maps, an invalid stage, an option that the chosen projector would
            ignore, heads that do not divide the teacher's channels, or `cap` on a student's map of one position.
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
        teacher = check_features(student, teacher)
        check_positive("fd", alpha=alpha)
        check_choice("fd", "reduction", reduction, ("mean", "sum"))
        check_stages("fd", stages)
        check_choice("fd", "projector", projector, ("linear", "conv", "cap"))
        if heads is not None and projector != "cap":
            raise ValueError("fd: heads is an option of projector 'cap' only")
        if heads is not None and len(heads) != len(stages):
            raise ValueError(f"fd: heads has {len(heads)} numbers for {len(stages)} stages; give one per stage")
        if norm is not None and projector == "linear":
            raise ValueError("fd: norm is an option of projectors 'conv' and 'cap' only")

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
        """One scalar per stage, `alpha` applied. The targets are not used."""
        assert teacher is not None
        losses = {}
        for stage in self.stages:
            mimic = self.projectors[f"s{stage}"](stage_map(student, stage))
            target = stage_map(teacher, stage).detach()
            losses[f"s{stage}"] = self.alpha * normalized_distance(mimic, target, self.reduction)
        return losses
