"""Learning rates that fall towards the image, stage by stage or layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models import group_parameters
from torch import nn

from scalekd.common.errors import UserError


def layer_groups(
    backbone: nn.Module, rest: Iterable[nn.Parameter], lr: float, weight_decay: float, stage_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser: `params`, `lr`, `weight_decay` and a `name` for people.

    The layers are timm's coarse ones (`group_matcher(coarse=True)`): the stem, then the stages of a CNN, Swin or
    ConvNeXt, or the blocks of a ViT or Mixer. Of n of them, layer i from the stem, counted from 0, learns at
    lr * stage_decay ** (n - i), as in BEiT, ViTDet and mmdetection: the last at lr * stage_decay. timm's
    `param_groups_layer_decay` is not called because it takes the fine layers only: single blocks of a ResNet.
    Biases, norms and what the backbone names in `no_weight_decay` are not decayed.

    The factor is within `lr`, not beside it as timm's `lr_scale`: optimisers do not know the latter, and timm's
    schedules multiply by it.

    backbone: without its classifier, as `Pyramid.backbone` is; a classifier would be one layer more.
    rest: parameters that learn at `lr`; those of the backbone among them are passed over, so a detector's will do.
    Frozen parameters are in no group. Raises `UserError` for a backbone that timm has no layers for.
    """
    if not hasattr(backbone, "group_matcher"):
        raise UserError(
            f"{type(backbone).__name__} has no layers in timm (group_matcher): set the stage decay to 1, "
            "or take another"
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
            "lr": lr * stage_decay ** (count - layer),
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
