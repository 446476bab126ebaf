"""timm's distilled models: a second classifier learns from the teacher, and in evaluation the two are averaged.

A distilled DeiT, PiT or LeViT, an EfficientFormer or a RepViT returns both predictions only in train mode, and only after
`set_distilled_training(True)`. Otherwise it returns their mean.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

HEADS = ("head_dist", "heads_dist")  # timm's names for the second classifier


def has_two_heads(model: nn.Module) -> bool:
    """Whether a timm model has a second classifier for the teacher's predictions."""
    if not hasattr(model, "set_distilled_training") or not getattr(model, "num_classes", 0):
        return False
    return any(name.rpartition(".")[2] in HEADS for name, _ in model.named_modules())


def train_apart(model: nn.Module, apart: bool) -> None:
    """Makes a model with two heads return both predictions in train mode, or their mean. Other models are left alone."""
    if has_two_heads(model):
        model.set_distilled_training(apart)  # type: ignore[operator]


def predictions(output: Any) -> tuple[Tensor, Tensor | None]:
    """The logits `(B, classes)` of a model's output, and those of its second head if it returned both.

    Raises ValueError if the output is neither logits nor two predictions of one shape.
    """
    if isinstance(output, tuple) and len(output) == 2 and output[0].shape == output[1].shape:
        return output[0], output[1]
    if not isinstance(output, Tensor):
        raise ValueError(f"it returns a {type(output).__name__} instead of logits")
    return output, None
