"""`unfilled`: the models of the meta device, without the work of their initialisation."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from scalekd.models.unfilled import unfilled


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_convnext", "swin_tiny_patch4_window7_224", "mixer_s16_224"]
)
def test_models_are_those_of_the_meta_device(name):
    with torch.device("meta"):
        expected = timm.create_model(name)
    with unfilled():
        model = timm.create_model(name)
        logits = model.eval()(torch.empty(2, *model.pretrained_cfg["input_size"]))
    found = model.state_dict(keep_vars=True)
    assert list(found) == list(expected.state_dict())
    for key, value in expected.state_dict(keep_vars=True).items():
        assert (found[key].shape, found[key].dtype, found[key].device) == (value.shape, value.dtype, value.device), key
        assert type(found[key]) is type(value) and found[key].requires_grad == value.requires_grad
    assert logits.shape == (2, 1000) and logits.is_meta


def test_nothing_is_filled(monkeypatch):
    drawn = []
    draw = torch.Tensor.uniform_
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda *args, **options: drawn.append(1) or draw(*args, **options))
    with torch.device("meta"):
        nn.Linear(2, 3)
    assert drawn
    drawn.clear()
    with unfilled():
        nn.Linear(2, 3)
        nn.init.trunc_normal_(tensor=torch.empty(3))
    assert not drawn


def test_other_tensors_are_filled():
    real = torch.zeros(3)
    with unfilled():
        assert torch.full((2,), 3.0).is_meta
        real.fill_(2.0)
        nn.init.constant_(real[:1], 5.0)
    assert real.tolist() == [5.0, 2.0, 2.0]
    assert not nn.Linear(2, 3).weight.is_meta
