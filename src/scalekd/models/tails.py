"""Tails: run a frozen teacher from one of its features to its final map, by timm model class.

A tail takes `(model, index, x, prefix, end)`: the model in eval mode, timm's number of one of its features, that feature's
map `(B, D, H, W)`, its class and register tokens `(B, P, D)` or None, and whether to apply what follows the last stage: a
norm, or in some CNNs a convolution. It returns the final map `(B, D', H', W')`, the input of the model's head, or without
`end` the output of the last stage. From the model's own map it computes the same as the model's forward pass. Gradients
flow to `x`.

To add a class, write its tail, add a line to `TEACHER_TAILS`, and add a model to `tests/models/test_stages.py`. A subclass
needs its own line, because it may run its blocks differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm import models
from torch import Tensor, nn

from .token_maps import to_map, to_tokens
from .transformers_vision import TransformersVision, transformers_tail
from .wide_last import Lift, WideLast


def _vit_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    tokens = model.blocks[index + 1 :](to_tokens(x, prefix))
    return to_map(model.norm(tokens) if end else tokens, model.num_prefix_tokens, x.shape[-2:])


def _beit_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    tokens = to_tokens(x, prefix)
    bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
    for block in model.blocks[index + 1 :]:
        tokens = block(tokens, shared_rel_pos_bias=bias)
    return to_map(model.norm(tokens) if end else tokens, model.num_prefix_tokens, x.shape[-2:])


def _eva_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    tokens = to_tokens(x, prefix)
    grid = x[:1].detach().permute(0, 2, 3, 1)  # only its shape is used, for the rotary embedding
    _, rope = model._pos_embed(grid if model.dynamic_img_size else grid.flatten(1, 2))
    for i in range(index + 1, len(model.blocks)):
        per_block = getattr(model, "rope_mixed", False) and rope is not None
        tokens = model.blocks[i](tokens, rope=rope[i] if per_block else rope)
    return to_map(model.norm(tokens) if end else tokens, model.num_prefix_tokens, x.shape[-2:])


def _mixer_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    tokens = model.blocks[index + 1 :](to_tokens(x, None))
    return to_map(model.norm(tokens) if end else tokens, 0, x.shape[-2:])


def _swin_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    x = model.layers[index + 1 :](x.permute(0, 2, 3, 1))
    return (model.norm(x) if end else x).permute(0, 3, 1, 2)


def _convnext_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    x = model.stages[index + 1 :](x)
    return model.norm_pre(x) if end else x


def _metaformer_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    return model.stages[index + 1 :](x)


def _resnet_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    for i in range(index + 1, 5):  # feature 0 is the stem
        x = getattr(model, f"layer{i}")(x)
    return x


def _regnet_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    for i in range(index + 1, 5):
        x = getattr(model, f"s{i}")(x)
    return model.final_conv(x) if end else x


def _maxvit_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    x = model.stages[index:](x)  # feature 0 is the stem
    return model.norm(x) if end else x


def _byobnet_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    return model.final_conv(model.stages[model.stage_ends[index] :](x))  # timm's last feature includes the convolution


def _efficientnet_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    x = model.blocks[model.stage_ends[index] :](x)
    return model.bn2(model.conv_head(x)) if end else x


def _mobilenetv3_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    return model.blocks[model.stage_ends[index] :](x)


TEACHER_TAILS: dict[type[nn.Module], Callable[[nn.Module, int, Tensor, Tensor | None, bool], Tensor]] = {
    models.VisionTransformer: _vit_tail,
    models.VisionTransformerDistilled: _vit_tail,
    WideLast: _vit_tail,
    Lift: _vit_tail,
    models.Beit: _beit_tail,
    models.Eva: _eva_tail,
    models.MlpMixer: _mixer_tail,
    models.SwinTransformer: _swin_tail,
    models.SwinTransformerV2: _swin_tail,
    models.ConvNeXt: _convnext_tail,
    models.ResNet: _resnet_tail,
    models.RegNet: _regnet_tail,
    models.MaxxVit: _maxvit_tail,
    models.MetaFormer: _metaformer_tail,
    models.RepVit: _metaformer_tail,
    models.EfficientNet: _efficientnet_tail,
    models.MobileNetV3: _mobilenetv3_tail,
    models.ByobNet: _byobnet_tail,
    TransformersVision: transformers_tail,
}
