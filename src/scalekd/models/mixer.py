"""`mlp_mixer`, a timm model name for Mixers of any patch size, width and depth.

timm's own names (mixer_s16_224, ...) fix all three. Without scalekd the model is
`timm.models.mlp_mixer.MlpMixer(**kwargs)`, with the same keyword arguments and the same weights.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer
from torch import nn

# as for timm's own Mixers; register_model requires this name
default_cfgs = generate_default_cfgs(
    {
        "mlp_mixer.untrained": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "stem.proj",
            "classifier": "head",
        }
    }
)


@register_model
def mlp_mixer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MLP-Mixer (arXiv:2105.01601): patch_size 16, num_blocks 8, embed_dim 512 (Mixer-S/16) unless given."""
    return build_model_with_cfg(MlpMixer, "mlp_mixer", pretrained, feature_cfg={"feature_cls": "getter"}, **kwargs)
