"""Fused optimisers take the same steps as the plain ones."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from scalekd.config.fields import Optim
from scalekd.train.optim import can_be_fused, create_optimizer, load_state

FUSED, PLAIN = ["adam", "adamw", "sgd", "momentum", "nesterov"], ["lamb", "lion", "adafactor", "adagrad"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def groups(net: nn.Module) -> list[dict]:
    norm = [p for p in net.parameters() if p.ndim == 1]
    rest = [p for p in net.parameters() if p.ndim > 1]
    return [{"params": rest, "weight_decay": 0.1}, {"params": norm, "weight_decay": 0.0, "lr": 0.02}]


def take_steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 8, 8, generator=g)).square().mean().backward()
        optimizer.step()


def ours(name: str, net: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer(Optim(name=name, lr=0.01, weight_decay=0.1, momentum=0.9), groups(net))


def plain(name: str, net: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(
        groups(net), opt=name, lr=0.01, weight_decay=0.1, momentum=0.9, filter_bias_and_bn=False, foreach=False
    )


@pytest.mark.parametrize("name", FUSED)
def test_the_same_steps_as_the_plain_one(name):
    one, other, start = model(), model(), model()
    optimizer = ours(name, one)
    assert all(group["fused"] is True for group in optimizer.param_groups)
    take_steps(one, optimizer, 5)
    take_steps(other, plain(name, other), 5)
    for p, q, before in zip(one.parameters(), other.parameters(), start.parameters(), strict=True):
        assert (q - before).abs().max() > 1e-3
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_optimisers_without_a_fused_kernel_are_plain(name):
    net = model()
    optimizer = create_optimizer(Optim(name=name, lr=0.01), groups(net))
    assert not optimizer.param_groups[0].get("fused")
    take_steps(net, optimizer, 2)


def test_no_fused_kernel_on_other_devices():
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    assert not can_be_fused("adamw", [{"params": list(net.parameters())}])
    assert (
        create_optimizer(Optim(name="adamw", lr=0.01), [{"params": list(net.parameters())}]).param_groups[0]["fused"]
        is None
    )


def scaled_steps(
    net: nn.Module, optimizer: torch.optim.Optimizer, bad: list[bool], seed: int = 1
) -> torch.amp.GradScaler:
    """Takes fp16 steps as the engine does; the gradient overflows in the steps that are `bad`."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    g = torch.Generator().manual_seed(seed)
    for overflow in bad:
        optimizer.zero_grad()
        scaler.scale(net(torch.randn(4, 3, 8, 8, generator=g)).square().mean()).backward()
        if overflow:
            next(net.parameters()).grad[0] = torch.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return scaler


@pytest.mark.parametrize(
    "take", [partial(take_steps, count=3), partial(scaled_steps, bad=[False, True, False])], ids=["float32", "fp16"]
)
@pytest.mark.parametrize("name", FUSED)
def test_a_run_that_began_unfused_resumes_unfused(name, take):
    """The checkpoint's groups record whether it was fused, so runs of an earlier version resume bit for bit."""
    one = model()
    optimizer = plain(name, one)
    take(one, optimizer)
    other = copy.deepcopy(one)
    resumed = ours(name, other)
    load_state(resumed, copy.deepcopy(optimizer.state_dict()))
    take(one, optimizer, seed=3)
    take(other, resumed, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def with_garbage(like: torch.Tensor, **_: object) -> torch.Tensor:
    return torch.full(like.shape, 1e30)  # uninitialised memory may hold anything


@pytest.mark.parametrize("bad", [[True, False, False], [False, True, False]], ids=["first", "second"])
@pytest.mark.parametrize("name", FUSED)
def test_a_step_left_out_under_fp16_scaling(name, bad, monkeypatch):
    """The scaler passes its result to a fused optimiser; an overflow changes neither weights nor state."""
    one, other = model(), model()
    monkeypatch.setattr(torch, "empty_like", with_garbage)
    scaler = scaled_steps(one, ours(name, one), bad)
    scaled_steps(other, plain(name, other), bad)
    assert scaler.get_scale() == 2.0**3
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_parameter_whose_gradient_comes_later():
    net = model()
    optimizer = create_optimizer(Optim(name="sgd", lr=0.01, momentum=0.9), groups(net))
    first, *rest = net.parameters()
    for p in rest:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before, first.grad = first.detach().clone(), torch.ones_like(first)
    optimizer.step()
    assert not torch.equal(before, first)
