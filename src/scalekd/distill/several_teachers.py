"""What a loss makes of several teachers: the mean of their logits, or one teacher at a time, some left out at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scalekd.models.stages import Features, Shapes


def shapes_together(shapes: Sequence[Shapes]) -> Shapes | None:
    """The shapes of a method's teacher. For several teachers: those of the mean of their logits."""
    if len(shapes) < 2:
        return shapes[0] if shapes else None
    if len({teacher.classes for teacher in shapes}) > 1:
        classes = ", ".join(f"{teacher.model} {teacher.classes}" for teacher in shapes)
        raise ValueError(
            f"the mean of several teachers' logits needs equal numbers of classes, and they have {classes}. "
            "Choose teachers with `teachers: [...]`"
        )
    return Shapes(
        model=" + ".join(teacher.model for teacher in shapes),
        maps=(),
        final=None,
        classes=shapes[0].classes,
        can_resume=False,
        pooled=0,
    )


def mean_logits(features: Sequence[Features]) -> Features | None:
    """The features of one teacher, or the mean of the logits of several."""
    if len(features) < 2:
        return features[0] if features else None
    return Features(logits=torch.stack([each.logits.float() for each in features]).mean(dim=0))


def left_out(terms: Mapping[str, Mapping[str, Tensor]], probability: float) -> dict[str, dict[str, Tensor]]:
    """The terms of one method with several teachers, some of which are left out at random (UNIC, arXiv:2408.05088).

    Without it a student may follow the easiest teacher. For each image the teacher with the largest loss is kept, and each
    other teacher with probability 1 - `probability`. A term becomes its sum over the images that keep its teacher, divided
    by the mean number of images that a teacher keeps. So the mean over teachers has the same scale as without leaving out,
    as in the code of UNIC. Random numbers come from torch's global generator.

    Args:
        terms: for each of T teachers the terms of its method, each `(B,)`, one value per image.
        probability: in [0, 1).

    Returns:
        The same with a scalar per term.
    """
    with torch.no_grad():
        losses = torch.stack([torch.stack(list(each.values())).sum(dim=0) for each in terms.values()])  # (T, B)
        hardest = torch.zeros_like(losses).scatter(0, losses.argmax(dim=0, keepdim=True), 1.0)
        kept = torch.maximum(hardest, (torch.rand_like(losses) >= probability).to(losses))
        share = kept / kept.sum() * len(kept)
    return {
        teacher: {term: (value * share[i]).sum() for term, value in each.items()}
        for i, (teacher, each) in enumerate(terms.items())
    }
