"""Layer-wise learning rates: the earlier a stage or block of the backbone, the lower its rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models import group_parameters
from torch import nn

from scalekd.common.errors import UserError


def layer_groups(
    backbone: nn.Module,
    rest: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    stage_decay: float,
    backbone_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser: `params`, `lr`, `weight_decay` and a readable `name`.

    The layers are timm's coarse groups (`group_matcher(coarse=True)`): the stem, then the stages of a CNN, Swin or
    ConvNeXt, or the blocks of a ViT or Mixer. With n layers, layer i counted from the stem, from 0, uses
    lr * stage_decay ** (n - i), as in BEiT, ViTDet and mmdetection; the last layer uses lr * stage_decay. timm's
    `param_groups_layer_decay` supports only the fine layers, such as single blocks of a ResNet.
    Biases, norms and the names in the backbone's `no_weight_decay` have no weight decay.

    The factor is part of `lr`. It is not timm's `lr_scale`, which optimisers ignore and timm's schedules multiply by.

    Args:
        backbone: without its classifier, as `Pyramid.backbone`; a classifier would be one layer more.
        rest: parameters that use `lr`. Parameters of the backbone among them are ignored, so all parameters of a
            detector may be passed.
        backbone_scale: factor of the rates of all layers, but not of the rest.

    Frozen parameters are in no group. Raises `UserError` if timm defines no layers for the backbone.
    """
    if not hasattr(backbone, "group_matcher"):
        raise UserError(
            f"timm defines no layers (group_matcher) for {type(backbone).__name__}; use another backbone.model"
        )
    matcher = backbone.group_matcher(coarse=True)  # type: ignore[operator]
    layers: dict[str, int] = group_parameters(backbone, matcher, reverse=True)
    count = max(layers.values()) + 1
    exempt = set(getattr(backbone, "no_weight_decay", set)())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}

    def add(layer: int, name: str, parameter: nn.Parameter) -> None:
        decayed = parameter.ndim > 1 and name not in exempt
        label = f"layer {layer}" if layer < count else "rest"
        group = {
            "params": [],
            "lr": lr * (backbone_scale * stage_decay ** (count - layer) if layer < count else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
            "name": label if decayed else f"{label}, no decay",
        }
        groups.setdefault((layer, decayed), group)["params"].append(parameter)

    own = set(backbone.parameters())
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            add(layers[name], name, parameter)
    for parameter in rest:
        if parameter.requires_grad and parameter not in own:
            add(count, "", parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]
