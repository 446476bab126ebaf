"""Pooled features of a timm model: one vector per image, the input of its classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from scalekd.common.errors import UserError

from .embedding_head import embedding_of


def pooled(model: Any, images: Tensor) -> Tensor:
    """Pooled features (B, D) of normalised images: timm's `forward_head(..., pre_logits=True)`.

    Raises `UserError` if the model does not pool into one vector per image.
    """
    images = images.to(next(model.parameters(), images).dtype)  # a teacher may be held in half precision
    return _flat(model.forward_head(model.forward_features(images), pre_logits=True), model)


def embedded(model: Any, images: Tensor) -> Tensor:
    """Embeddings (B, E) of normalised images: of the model's embedding head, or its pooled features if it has none.

    They are not normalised. Raises `UserError` as `pooled`.
    """
    return embedding_of(model, pooled(model, images))


def _flat(x: Any, model: nn.Module) -> Tensor:
    if isinstance(x, Tensor) and x.ndim == 4 and x.shape[-2:] == (1, 1):
        x = x.flatten(1)  # a model with a 1x1 convolution as its classifier
    if not isinstance(x, Tensor) or x.ndim != 2:
        raise UserError(
            f"{type(model).__name__} does not pool into one vector per image, so it cannot have a linear head; use another model"
        )
    return x


def with_features(model: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function that gives (logits, embeddings as of `embedded`) of normalised images in one pass of a timm model."""

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        maps = model.forward_features(images)
        pooled = _flat(model.forward_head(maps, pre_logits=True), model)
        return model.forward_head(maps), embedding_of(model, pooled)

    return forward
