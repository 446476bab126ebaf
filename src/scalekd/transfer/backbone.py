"""A recipe's backbone: a timm model for images of any size, with its weights proved."""

from __future__ import annotations

from torch import nn

from scalekd.common.sections import height_and_width
from scalekd.models.build import build_model
from scalekd.models.inputs import Statistics, statistics, usual_size
from scalekd.models.options import Backbone, Model
from scalekd.models.weights.trained import Loaded

from .pyramid import Size, any_size_kwargs


def build_backbone(spec: Backbone, channels: int) -> tuple[nn.Module, Loaded, Size, Statistics]:
    """(timm model, where its weights are from, the size in pixels that it was built for, mean and std of its input).

    It is built for images of any size where timm has that for its family. Raises `UserError`.
    """
    kwargs = any_size_kwargs(spec.model) | spec.kwargs
    size = height_and_width(spec.image_size or usual_size(spec.model))
    named = Model.model_validate(spec.model_dump() | {"kwargs": kwargs})
    model, loaded = build_model(named, channels=channels, image_size=size, classes=None, where="backbone")
    return model, loaded, size, statistics(model, named, channels, "backbone")
