"""The learning rate of every layer, against tables worked out by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from scalekd.common.errors import UserError
from scalekd.transfer.decay import layer_groups
from scalekd.transfer.pyramid import Pyramid


def table(name: str, size: int, decay: float) -> tuple[nn.Module, dict[str, tuple[float, float]]]:
    """A model on its pyramid, and (lr, weight decay) of each of its parameters, for lr 1 and weight decay 0.05."""
    whole = nn.ModuleDict({"pyramid": Pyramid(timm.create_model(name), (size, size)), "neck": nn.Linear(2, 2)})
    backbone = whole["pyramid"].backbone
    groups = layer_groups(backbone, whole.parameters(), lr=1.0, weight_decay=0.05, stage_decay=decay)
    by_parameter = [(p, (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    names = {p: n for n, p in whole.named_parameters()}
    assert len(by_parameter) == len(names)  # each once
    return backbone, {names[p].replace("pyramid.backbone.", ""): values for p, values in by_parameter}


def check(found: dict[str, tuple[float, float]], wanted: dict[str, tuple[float, float]]) -> None:
    for name, (lr, decay) in wanted.items():
        assert found[name] == (pytest.approx(lr, rel=1e-12), decay), name


def test_resnet_stage_by_stage():
    _, found = table("test_resnet", 64, 0.7)
    check(
        found,
        {
            "neck.weight": (1.0, 0.05),
            "neck.bias": (1.0, 0.0),
            "layer4.0.conv1.weight": (0.7, 0.05),
            "layer4.0.downsample.1.weight": (0.7, 0.05),
            "layer3.0.conv1.weight": (0.49, 0.05),
            "layer3.0.conv2.weight": (0.49, 0.05),
            "layer2.0.bn1.weight": (0.343, 0.0),
            "layer1.0.conv1.weight": (0.2401, 0.05),
            "conv1.0.weight": (0.16807, 0.05),
            "bn1.bias": (0.16807, 0.0),
        },
    )
    assert sorted({round(lr, 9) for lr, _ in found.values()}) == [0.16807, 0.2401, 0.343, 0.49, 0.7, 1.0]


def test_convnext_stage_by_stage():
    _, found = table("test_convnext", 64, 0.9)
    check(
        found,
        {
            "pyramid.norms.3.weight": (1.0, 0.0),
            "stages.3.downsample.1.weight": (0.9, 0.05),
            "stages.3.blocks.1.gamma": (0.9, 0.0),
            "stages.2.blocks.0.conv_dw.weight": (0.81, 0.05),
            "stages.1.blocks.1.mlp.fc1.weight": (0.729, 0.05),
            "stages.0.blocks.0.mlp.fc2.bias": (0.6561, 0.0),
            "stem.0.weight": (0.59049, 0.05),
        },
    )


def test_vit_layer_by_layer():
    backbone, found = table("test_vit", 160, 0.6)
    assert len(backbone.blocks) == 6
    check(
        found,
        {
            "pyramid.simple.levels.0.0.weight": (1.0, 0.05),
            "blocks.5.attn.qkv.weight": (0.6, 0.05),
            "blocks.4.attn.qkv.weight": (0.36, 0.05),
            "blocks.3.mlp.fc1.bias": (0.216, 0.0),
            "blocks.2.norm1.weight": (0.1296, 0.0),
            "blocks.1.mlp.fc2.weight": (0.07776, 0.05),
            "blocks.0.attn.proj.weight": (0.046656, 0.05),
            "patch_embed.proj.weight": (0.0279936, 0.05),
            "pos_embed": (0.0279936, 0.0),  # the model's own list; it has three dimensions
            "cls_token": (0.0279936, 0.0),
        },
    )


def test_an_optimiser_takes_them_and_what_is_frozen_is_left_out():
    model = timm.create_model("test_resnet", num_classes=0)
    model.conv1.requires_grad_(False)
    groups = layer_groups(model, [], lr=0.1, weight_decay=0.05, stage_decay=0.5)
    optimizer = torch.optim.AdamW(groups)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if not n.startswith("conv1.")}
    assert {g["name"]: g["lr"] for g in optimizer.param_groups}["layer 4"] == pytest.approx(0.05)


def test_a_backbone_without_layers_is_refused():
    with pytest.raises(
        UserError, match=r"timm defines no layers \(group_matcher\) for Linear; use another backbone.model"
    ):
        layer_groups(nn.Linear(1, 1), [], 1.0, 0.0, 0.7)
