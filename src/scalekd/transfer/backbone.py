"""A recipe's backbone: a timm model for images of any size, with its weights proved."""

from __future__ import annotations

from torch import nn

from ..config import Backbone, Model, height_and_width
from ..distiller import Statistics
from ..loaded import Loaded
from ..models import build_model, statistics, usual_size
from ..teacher_checks import Check, from_source
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


def weights_check(spec: Backbone, loaded: Loaded, seed: int) -> Check:
    if loaded.source == "random":
        return Check("backbone weights", "ok", f"initial values, from seed {seed}")
    return from_source("backbone", "backbone", loaded)
