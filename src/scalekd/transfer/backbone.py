"""Builds a recipe's backbone: a timm model for images of any size, with checked weights."""

from __future__ import annotations

from torch import nn

from scalekd.common.sections import height_and_width
from scalekd.models.build import build_model
from scalekd.models.inputs import Statistics, statistics, usual_size
from scalekd.models.options import Backbone, Model
from scalekd.models.weights.trained import Loaded

from .pyramid import Size, any_size_kwargs


def build_backbone(spec: Backbone, channels: int) -> tuple[nn.Module, Loaded, Size, Statistics]:
    """Builds the section `backbone` of a recipe.

    Returns (timm model, source of its weights, (height, width) in pixels it was built for, mean and std of its input).
    The model takes images of any size if timm supports that for its family. Raises `UserError`.
    """
    kwargs = any_size_kwargs(spec.model) | spec.kwargs
    size = height_and_width(spec.image_size or usual_size(spec.model))
    named = Model.model_validate(spec.model_dump() | {"kwargs": kwargs})
    model, loaded = build_model(named, channels=channels, image_size=size, classes=None, where="backbone")
    return model, loaded, size, statistics(model, named, channels, "backbone")
