"""`vit_wide_last` and `vit_lift`, timm model names for narrow ViTs that end with a teacher's width (arXiv:2511.15572).

A narrow student's last map cannot take the form of a wider teacher's. Both students end with `last_dim` channels, so that
the loss `mse` can compare the maps without a projector, and both keep these layers after training.
"""

from __future__ import annotations

import copy
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import (
    checkpoint_filter_fn,  # noqa: F401 - timm's filter for weight files, found by module
    init_weights_vit_timm,
)
from torch import nn

_CARD = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
# register_model requires this name
default_cfgs = generate_default_cfgs({"vit_wide_last.untrained": _CARD, "vit_lift.untrained": _CARD})
DEIT_TINY = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}


class WideLast(VisionTransformer):
    """A ViT whose last block, norm and head are those of one with `last_dim` channels and `last_heads` heads.

    A linear layer without bias and a LayerNorm lead from one width to the other.
    """

    def __init__(self, *, embed_dim: int, last_dim: int, last_heads: int, **kwargs: Any) -> None:
        super().__init__(embed_dim=embed_dim, **kwargs)
        wide = VisionTransformer(**kwargs | {"embed_dim": last_dim, "num_heads": last_heads})
        widen = nn.Sequential(nn.Linear(embed_dim, last_dim, bias=False), copy.deepcopy(wide.blocks[-1].norm1))
        widen.apply(init_weights_vit_timm)
        self.blocks[-1] = nn.Sequential(*widen, wide.blocks[-1])
        self.norm, self.fc_norm, self.attn_pool, self.head = wide.norm, wide.fc_norm, wide.attn_pool, wide.head
        self.feature_info[-1]["num_chs"] = last_dim
        self.embed_dim = self.num_features = self.head_hidden_size = last_dim


class Lift(VisionTransformer):
    """A ViT whose final norm is a linear layer without bias to `last_dim` channels and a LayerNorm.

    The classifier takes the mean of the patches.
    """

    def __init__(self, *, embed_dim: int, last_dim: int, **kwargs: Any) -> None:
        super().__init__(embed_dim=embed_dim, **{"global_pool": "avg", "fc_norm": False} | kwargs)
        self.norm = nn.Sequential(nn.Linear(embed_dim, last_dim, bias=False), nn.LayerNorm(last_dim))
        self.embed_dim = self.num_features = self.head_hidden_size = last_dim
        self.reset_classifier(self.num_classes)
        self.norm.apply(init_weights_vit_timm)
        self.head.apply(init_weights_vit_timm)


def _build(cls: type[VisionTransformer], name: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    return build_model_with_cfg(cls, name, pretrained, feature_cfg={"feature_cls": "getter"}, **given)


@register_model
def vit_wide_last(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Ti with a last block of 384 channels and 6 heads, unless `last_dim`, `last_heads` or others are given."""
    return _build(WideLast, "vit_wide_last", pretrained, DEIT_TINY | {"last_dim": 384, "last_heads": 6} | kwargs)


@register_model
def vit_lift(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Ti with its final tokens lifted to 384 channels, unless `last_dim` or others are given."""
    return _build(Lift, "vit_lift", pretrained, DEIT_TINY | {"last_dim": 384} | kwargs)
