"""What the methods on pooled features share."""

from __future__ import annotations

from torch import Tensor

from ..stages import Features
from .logits import full_precision


def pooled(model: Features) -> Tensor:
    """The final map averaged over its grid, `(B, D, H, W)` to `(B, D)`, in float32 at least.

    Of any family the same, also of a ViT that classifies from its class token.
    """
    assert model.final is not None
    return full_precision(model.final).mean(dim=(2, 3))
