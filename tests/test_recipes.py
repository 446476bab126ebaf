"""Every shipped recipe says what it is, loads, is built with its own models, and takes a step."""

from __future__ import annotations

import re

import pytest
import torch
from small_images import write_images

from scalekd.build import build
from scalekd.cli import main
from scalekd.config import load_recipe, recipe_names, recipe_text
from scalekd.data import TrainSampler, train_batches
from scalekd.engine import AUTOCAST, on_device

SCALEKD_TERMS = {"scalekd.ori", "scalekd.alt", "scalekd.proxy_ori", "scalekd.proxy_alt"}
TERMS = {  # of the recipes that are not ScaleKD with ce and kd
    "demo-teacher": {"ce"},
    "demo-teacher-finish": {"ce"},
    "own-teacher": {"ce"},
    "own-data": {"ce"} | SCALEKD_TERMS,
}
STEPPED = [pytest.param(n, marks=pytest.mark.slow if "swin-l" in n else []) for n in recipe_names()]


def header(name: str) -> str:
    return "\n".join(line for line in recipe_text(name).splitlines() if line.startswith("#"))


def test_there_are_recipes():
    assert set(TERMS) | {"demo"} < set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_the_header_says_how_to_run_it_and_whether_that_was_done(name):
    assert load_recipe(name).name == name
    command = re.search(r"^# command: +(.+)$", header(name), re.MULTILINE)
    assert command, "no `command:` line"
    assert name in command[1].split(), "its command is for another recipe"
    assert re.search(r"\bstatus: +(MEASURED|SHORT RUN|NOT RUN)", header(name)), "no `status:`"
    if "NOT RUN" in header(name):
        assert "expected:" in header(name) and "stands for:" in header(name)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_show_prints_what_loads(name, capsys, tmp_path):
    assert main(["recipes", "show", name]) == 0
    (tmp_path / "copy.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "copy.yaml")) == load_recipe(name)


def small(name: str, folder) -> list[str]:
    """Overrides: the recipe's models as they are, random weights where files are missing, a few small images."""
    overrides = ["train.batch_size=2", "data.workers=0"]
    if name.startswith("demo"):
        overrides += ["student.weights=random"]
        return [*overrides, "data.train=fashion-mnist:train", "data.val=fashion-mnist:test", "data.limit=10"]
    write_images(folder, per_class=4)
    overrides += [f"data.train={folder}", "data.val=null", "data.image_size=64", "student.weights=random"]
    return overrides + (["teacher.weights=random"] if load_recipe(name).teacher else [])  # so it has our classes


@pytest.fixture
def cheap_initial_values(monkeypatch):
    """Drawing 350 million random numbers takes longer than a step with them; these repeat after a million."""
    block = torch.rand(2**20)

    def uniform_(tensor, low=0.0, high=1.0, generator=None):
        values = block.repeat(tensor.numel() // len(block) + 1)[: tensor.numel()]
        return tensor.copy_(values.view(tensor.shape)).mul_(high - low).add_(low)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)


@pytest.mark.parametrize("name", STEPPED)
def test_a_recipe_is_built_and_stepped(name, tmp_path, cheap_initial_values):
    config = load_recipe(name, small(name, tmp_path))
    run = build(config, torch.device("cpu"))
    sampler = TrainSampler(len(run.train_images), config.train.batch_size, seed=0, total_steps=1)
    images, targets = on_device(next(train_batches(run.train_images, sampler, workers=0, pin=False)), run)
    run.distiller.train()
    dtype = AUTOCAST[config.train.precision]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses = run.distiller(images, targets)
    losses["total"].backward()

    assert set(losses) == TERMS.get(name, {"ce", "kd"} | SCALEKD_TERMS) | {"total"}
    assert all(value.isfinite() for value in losses.values())
    first = next(run.distiller.student.parameters())
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.abs().max() > 0
    assert [name for name, p in run.distiller.named_parameters() if p.grad is None] == []
    if "scalekd" in config.losses and (heads := config.losses["scalekd"].get("heads")):
        method = run.distiller.methods["scalekd"]
        assert {cap.heads for cap in method.proxy_caps.values()} == {heads[0]}
        assert {cap.heads for cap in method.student_caps.values()} == {heads[1]}
