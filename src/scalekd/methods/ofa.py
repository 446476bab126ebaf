"""`ofa`: one-for-all distillation (Hao et al., 2023), with a classifier on each of the student's stages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_logits, check_stages, full_precision, stage_map


class OFA(nn.Module):
    """`ofa`: each of the student's stages learns the teacher's logits through its own branch.

    Hao et al., NeurIPS 2023 (arXiv:2310.19444). A branch maps a stage's map `(B, ds, h, w)` to logits `(B, classes)`,
    which do not depend on the architecture, so grids and channels may differ. Terms: `s1`, ... for the branches and
    `logits` for the student's own logits, each with the loss `target_enhanced`. With Mixup the target class is the one
    with the largest share.

    The branch of stage n has 4 - n blocks, each of which halves the grid: 3x3 depthwise convolution with stride 2, 1x1
    convolution, BatchNorm, ReLU, and the same again with stride 1. Each block doubles the channels, except the last,
    whose output has the larger of the models' final widths. The branch of stage 4 has a 1x1 convolution instead of
    blocks. All branches end with the mean over positions and a linear layer.

    Args:
        stages: student stages 1 to 4 with a branch; stage 4 is the map after the final norm. Default all.
        epsilon: positive exponent of the target enhancement: one number for all terms, or one for each of `stages`
            followed by one for the logits. Default 1, as in the authors' code; they use 1 to 1.5, such as 1.5 for a
            ResNet-18 with a DeiT-T teacher.

    Raises:
        ValueError: no teacher, a model without maps, different numbers of classes, or an option out of range.
    """

    needs_targets = True
    needs_logits = True
    one_label = "it raises the softmax's probability of the one class of an image; use kd with probabilities=sigmoid"

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        stages: tuple[int, ...] = (1, 2, 3, 4),
        epsilon: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_stages("ofa", stages)
        check_logits("ofa", student, teacher)
        if len(epsilon) not in (1, len(stages) + 1) or not all(e > 0 for e in epsilon):
            raise ValueError(
                f"ofa: epsilon is {list(epsilon)}; give one positive number, or {len(stages) + 1}: "
                "one for each stage and one for the logits"
            )
        assert student.final is not None and teacher.final is not None
        width = max(student.final[0], teacher.final[0])
        self.stages = tuple(stages)
        self.epsilon = tuple(epsilon) * (len(stages) + 1) if len(epsilon) == 1 else tuple(epsilon)
        self.branches = nn.ModuleDict(
            {f"s{stage}": branch(stage_map(student, stage)[0], 4 - stage, width, student.classes) for stage in stages}
        )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per branch, and `logits`. Targets: class indices `(B,)` or probabilities `(B, classes)`."""
        assert teacher is not None
        target = targets.argmax(dim=1) if targets.ndim == 2 else targets
        logits = {f"s{stage}": self.branches[f"s{stage}"](stage_map(student, stage)) for stage in self.stages}
        logits["logits"] = student.logits
        return {
            name: target_enhanced(branch_logits, teacher.logits.detach(), target, epsilon)
            for (name, branch_logits), epsilon in zip(logits.items(), self.epsilon, strict=True)
        }


def target_enhanced(student: Tensor, teacher: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """Cross entropy weighted by the teacher's probabilities `t`, averaged over the batch, in nats.

    `-((1 + t_c)^epsilon - 1) * log s_c` for the target class c, and `-t_j^epsilon * log s_j` for every other class. The
    more confident the teacher is in the target, the larger the share of the target. With epsilon 1 it is the cross
    entropy with `t`. Logits `(B, classes)`, target `(B,)`; computed in float32 or float64.
    """
    log_s = F.log_softmax(full_precision(student), dim=1)
    t = F.softmax(full_precision(teacher), dim=1)
    is_target = F.one_hot(target, t.shape[1]).to(t.dtype)
    weights = (t + is_target) ** epsilon - is_target
    return -(weights * log_s).sum(dim=1).mean()


def branch(channels: int, halvings: int, width: int, classes: int) -> nn.Sequential:
    """A branch from `(B, channels, h, w)` to logits `(B, classes)`, with `halvings` blocks and `width` features."""
    layers: list[nn.Module] = [] if halvings else [nn.Conv2d(channels, width, 1)]
    for left in reversed(range(halvings)):
        after = 2 * channels if left else width
        layers += [*separable(channels, channels, stride=2), *separable(channels, after, stride=1)]
        channels = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def separable(before: int, after: int, stride: int) -> list[nn.Module]:
    """3x3 depthwise and 1x1 convolution, BatchNorm, ReLU."""
    return [
        nn.Conv2d(before, before, 3, stride=stride, padding=1, groups=before, bias=False),
        nn.Conv2d(before, after, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    ]
