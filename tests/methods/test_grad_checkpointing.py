"""`grad_checkpointing` of ScaleKD's family: the same losses, gradients and running averages, with less kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from parts import assert_the_parts_add_up
from torch import nn
from whole_runs import TINY, changed

from scalekd.config.recipe import check_config
from scalekd.cost.count import AGAIN, count_step
from scalekd.cost.peak import LiveBytes, held_in_a_step
from scalekd.distill.build import untrained
from scalekd.distill.distiller import Distiller
from scalekd.methods.projectors import CrossAttentionProjector

STUDENTS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_vit": {"img_size": 48, "depth": 4, "drop_path_rate": 0.2},
}
PUBLISHED = {"shared": False, "expansion": 4}
ONE_VIEW = [  # the same operations on the same shapes, so the same bits
    ("cap", {}),
    ("dfm", {"norm": "layer"}),
    ("tpp", {}),
    ("tpp", {"adaptive_queries": False, "expansion": 1}),
    ("scalekd", {"shared": True, "tokens": "reduced"}),
]


def pair(student: str, name: str, options: dict[str, Any]) -> tuple[Distiller, Distiller]:
    """The same distiller with and without checkpointing: random weights, frozen in no part but the teacher."""
    torch.manual_seed(0)
    models = [
        timm.create_model(student, num_classes=10, **STUDENTS[student]),
        timm.create_model("test_vit", num_classes=10, img_size=48, depth=4),
    ]
    for model in models:
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
    made = []
    for given in ({}, {"grad_checkpointing": True}):
        losses = {"ce": {}, name: options | given}
        made.append(Distiller(*copy.deepcopy(models), losses, image_size=(48, 48)).train())
    for p in made[0].methods.parameters():
        nn.init.normal_(p, std=0.2)
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


def step(distiller: Distiller, half: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """Losses, and gradients of the parameters beside the buffers after the step."""
    torch.manual_seed(1)  # drop path draws from it
    pixels, targets = torch.rand(4, 3, 48, 48), torch.randint(10, (4,))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = distiller(pixels, targets)
    losses["total"].backward()
    after = {key: p.grad for key, p in distiller.named_parameters()} | dict(distiller.named_buffers())
    return {key: value.detach() for key, value in losses.items()}, after


@pytest.mark.parametrize(("name", "options"), ONE_VIEW)
@pytest.mark.parametrize("student", STUDENTS)
def test_bit_for_bit_the_same(student, name, options):
    plain, checkpointed = pair(student, name, options)
    for wanted, found in zip(step(plain), step(checkpointed), strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert value is not None and torch.equal(found[key], value), key


@pytest.mark.parametrize("half", [False, True])
def test_two_views_are_the_same_but_for_rounding(half):
    """Each view has a pass of its own through the teacher, so a product may be cut up in another way."""
    plain, checkpointed = pair("test_resnet", "scalekd", PUBLISHED)
    limits = {"rtol": 0.05, "atol": 0.02} if half else {"rtol": 1e-4, "atol": 1e-5}
    for wanted, found in zip(step(plain, half), step(checkpointed, half), strict=True):
        torch.testing.assert_close(found, wanted, **limits)


@contextmanager
def counted_calls(distiller: Distiller) -> Iterator[dict[str, int]]:
    calls = {"conv": 0, "norm": 0, "attention": 0, "last block": 0}
    hooks = []

    def count(module: nn.Module, key: str) -> None:
        def seen(*_: object) -> None:
            calls[key] += 1

        hooks.append(module.register_forward_pre_hook(seen))

    for module in distiller.methods.modules():
        if isinstance(module, CrossAttentionProjector):
            count(module.conv, "conv")
            count(module.norm, "norm")
            count(module.k, "attention")
    count(distiller.teacher_view.model.blocks[-1], "last block")
    yield calls
    for hook in hooks:
        hook.remove()


def test_what_runs_twice():
    plain, checkpointed = pair("test_resnet", "scalekd", PUBLISHED)
    with counted_calls(plain) as once:
        step(plain)
    with counted_calls(checkpointed) as twice:
        step(checkpointed)
    assert once == {"conv": 4, "norm": 4, "attention": 4, "last block": 1 + 1}  # the teacher's own pass, and both views
    assert twice == {"conv": 4, "norm": 4, "attention": 8, "last block": 1 + 2 * 2}


# ---------------------------------------------------------------- memory


def test_less_is_kept_and_less_is_held_at_once():
    plain, checkpointed = pair("test_vit", "scalekd", PUBLISHED)
    inputs = torch.rand(8, 3, 48, 48), torch.randint(10, (8,)), False
    floor = Distiller(plain.student, plain.teacher_view.model, {"ce": {}, "kd": {}}, image_size=(48, 48)).train()
    (none, _), (kept, most), (kept_less, less) = (held_in_a_step(d, *inputs) for d in (floor, plain, checkpointed))
    assert kept_less - none < (kept - none) / 2
    assert kept_less < less < 0.8 * most


def test_live_bytes_by_hand():
    x = torch.randn(10, requires_grad=True)
    with LiveBytes([x]) as live:
        y = x * 2
        assert live.now == 40
        z = y.exp()  # kept by its own gradient
        view = z[2:].view(2, 4)  # no storage of its own
        del y
        assert (live.now, live.most) == (40, 80)
        del z, view
        assert live.now == 0
    assert live.most == 80


# ---------------------------------------------------------------- the ledger of `scalekd cost`


def test_the_parts_add_up_to_a_checkpointed_step():
    _, distiller = pair("test_resnet", "scalekd", PUBLISHED)
    assert_the_parts_add_up(distiller)


def test_cost_counts_what_is_freed_and_what_is_computed_twice():
    def counted(options: dict[str, Any]) -> dict[str, Any]:
        config = check_config(changed(TINY, losses={"ce": {}, "scalekd": options}), "test")
        with torch.device("meta"):
            distiller = untrained(config, 10, config.losses)
        return count_step(distiller, config, 10, batch=8)

    plain, again = counted(PUBLISHED), counted(PUBLISHED | {"grad_checkpointing": True})
    through = "scalekd: through the teacher"
    assert again["parts"].keys() - plain["parts"].keys() == {AGAIN} and again["fixed_mb"] == plain["fixed_mb"]
    for part in ("scalekd", through):
        old, new = plain["parts"][part], again["parts"][part]
        assert new["forward"] == pytest.approx(old["forward"])
        twice = new["backward"] - old["backward"]  # all of the teacher's stage, a projector without its convolution
        assert 0 < twice < (1 + 1e-9) * old["forward"]
        assert new["saved_mb"] < old["saved_mb"] / 2
    assert again["parts"][AGAIN]["saved_mb"] > 0
    assert again["total"]["saved_mb"] < plain["total"]["saved_mb"] and again["memory_mb"] < plain["memory_mb"]


# ---------------------------------------------------------------- compiled


def test_compiled_without_a_graph_break():
    torch.manual_seed(0)
    cap = CrossAttentionProjector((8, 4, 4), (16, 4, 4), grad_checkpointing=True)
    x = torch.randn(2, 8, 4, 4)
    cap(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in cap.named_parameters()}
    cap.zero_grad()
    torch.compile(cap, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for name, p in cap.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5)
