"""`train.compile`: the compiled step has the plain one's values and no graph break; and no step waits for the device.

All but the failing ones use backends that only trace ("eager") or also derive the backward pass ("aot_eager").
"""

from __future__ import annotations

import contextlib
import io
from functools import partial
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from whole_runs import CPU, Interrupted, assert_same, changed, final_state, start

from scalekd.checks.preflight import preflight
from scalekd.common.errors import UserError
from scalekd.common.sections import to_yaml, validated
from scalekd.config.recipe import check_config
from scalekd.data.batches import Batch
from scalekd.data.transforms import make_mixup
from scalekd.distill import build as build_module
from scalekd.distill.build import build, make_optimizer, untrained
from scalekd.distill.compiled import compile_step
from scalekd.distill.distiller import Distiller
from scalekd.distill.run import DistillationRun
from scalekd.methods.names import METHODS
from scalekd.train.engine import train_step
from scalekd.train.resume import recipe_difference
from scalekd.train.run import scaler_and_average
from scalekd.transfer.config import SCHEMAS

SHORT: dict[str, dict[str, Any]] = {  # options that make a method quick to trace, and leave nothing of it out
    "crd": {"negatives": 16},
    "diffkd": {"steps": 1},
    "fd": {"projector": "conv"},
    "ofa": {"stages": (3,)},
    "ofd": {"stages": (4,)},
    "wkd_l": {"iterations": 1},
}
ONE_HEAD = [name for name in METHODS if name != "deit"]  # it needs a student with two
TWO_HEADS = {"img_size": 48, "depth": 4, "embed_dim": 48, "num_heads": 3}
SCALEKD: dict[str, Any] = {"ce": {}, "kd": {}, "scalekd": {}}
TRACED = partial(compile_step, backend="eager", fullgraph=True)  # raises at a graph break


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before, and an error where something is compiled again."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def tiny(student: str, losses: dict[str, Any], **options: Any) -> Distiller:
    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=10, img_size=48, depth=4)
    model = timm.create_model(student, num_classes=10, **options)
    return Distiller(model, teacher, losses, image_size=(48, 48)).train()


def step(distiller: torch.nn.Module, images: int = 4) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients, always from the same buffers and random numbers."""
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    torch.manual_seed(1)
    losses = distiller(torch.rand(images, 3, 48, 48), torch.arange(images))
    losses["total"].backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    distiller.load_state_dict(before)
    distiller.zero_grad()
    return {name: value.item() for name, value in losses.items()}, gradients


@pytest.mark.parametrize(
    ("student", "options", "losses", "graphs", "backend"),
    [
        ("test_resnet", {}, {name: SHORT.get(name, {}) for name in ONE_HEAD if name != "scalekd"}, 1, "eager"),
        ("deit_tiny_distilled_patch16_224", TWO_HEADS, SCALEKD | {"deit": {}}, 2, "eager"),
        ("test_resnet", {}, SCALEKD, 2, "aot_eager"),
    ],
    ids=["methods", "vit", "cnn"],
)
def test_the_compiled_step_is_whole_and_the_same(student, options, losses, graphs, backend):
    distiller = tiny(student, losses, **options)
    expected, gradients = step(distiller)
    keys = list(distiller.state_dict())
    compile_step(distiller, 4, backend=backend, fullgraph=True)
    for _ in range(2):  # the second after a validation, which puts the student into eval mode
        compiled_losses, compiled_gradients = step(distiller)
        assert compiled_losses == pytest.approx(expected, rel=1e-5)
        assert compiled_gradients.keys() == gradients.keys() == dict(distiller.named_parameters()).keys()
        largest = max(g.abs().max() for g in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                compiled_gradients[name], gradient, rtol=1e-5, atol=1e-6 * largest.item(), msg=name
            )
        distiller.student.eval()
        distiller.student(torch.rand(3, 3, 48, 48))
        distiller.train()
    assert counters["stats"]["unique_graphs"] == graphs  # of the teacher, unless its classifier is called; of the rest
    assert list(distiller.state_dict()) == keys


def test_the_compiled_step_under_ddp(tmp_path):
    """In one process, which has all that DDP does to a step but the other processes."""
    distiller = tiny("test_resnet", {"ce": {}, "kd": {}, "fd": SHORT["fd"]})
    expected, gradients = step(distiller)
    compile_step(distiller, 4, backend="aot_eager", fullgraph=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(distiller)
        for synchronised in (False, True):  # accumulation's two kinds of micro-batch
            with contextlib.nullcontext() if synchronised else wrapped.no_sync():
                compiled_losses, compiled_gradients = step(wrapped)
            assert compiled_losses == pytest.approx(expected, rel=1e-5)
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    compiled_gradients[f"module.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name
                )
    finally:
        torch.distributed.destroy_process_group()
    assert counters["stats"]["unique_graphs"] == 2


def test_a_batch_of_another_size_is_not_compiled():
    distiller = tiny("test_resnet", {"ce": {}, "kd": {}})
    expected, _ = step(distiller, images=3)
    TRACED(distiller, 4)
    assert step(distiller, images=3)[0] == expected
    assert not counters["stats"]


def test_a_compiled_run_is_the_plain_one(light_recipe, tmp_path, monkeypatch):
    """Averaged, accumulated, stopped and gone on with; the eager backend computes the same bits."""
    recipe = changed(light_recipe, train={"ema": 0.9, "accumulate": 2})
    start(recipe, tmp_path / "plain")
    monkeypatch.setattr(build_module, "compile_step", TRACED)
    compiled = changed(recipe, train={"compile": True})
    with pytest.raises(Interrupted):
        start(compiled, tmp_path / "compiled", stop_at=4)
    assert counters["stats"]["unique_graphs"] == 2  # with a validation between steps
    torch._dynamo.reset()  # as in a process of its own
    start(compiled, tmp_path / "compiled")
    states = [final_state(tmp_path / name) for name in ("plain", "compiled")]
    for state in states:
        del state["recipe"]
    assert_same(*states)
    difference = recipe_difference(to_yaml(check_config(compiled, "test")), check_config(recipe, "test"))
    assert difference == "`compile: true` before, `compile: false` now"  # as for train.channels_last


def test_what_cannot_be_compiled_is_told_before_training(light_recipe, monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(build_module, "compile_step", partial(compile_step, backend=broken))
    screen = io.StringIO()
    run = build(check_config(changed(light_recipe, train={"compile": True}), "test"), CPU)
    with pytest.raises(UserError, match=r"No working C\+\+ compiler found(.|\n)*train\.compile=false"):
        preflight(run, Console(file=screen))
    assert "compiling the first step" in screen.getvalue()


@pytest.mark.parametrize("task", SCHEMAS)
def test_other_tasks_refuse_it(task):
    with pytest.raises(UserError, match=r"train\.compile: unknown"):
        validated(SCHEMAS[task], {"train": {"compile": True}}, "test")


@pytest.mark.parametrize(("precision", "accumulate"), [("float32", 1), ("bf16", 1), ("fp16", 2)])
def test_a_step_waits_for_nothing(tiny_recipe, precision, accumulate, monkeypatch):
    """On tensors without values, reading one is an error; a tensor made of Python numbers would be copied to a GPU,
    which is waited for too."""
    losses = {name: SHORT.get(name, {}) for name in ONE_HEAD if name != "asl"}  # which excludes mixup
    train = {"clip_grad": 1.0, "accumulate": accumulate, "precision": precision}
    config = check_config(changed(tiny_recipe, losses=losses, train=train, augment={"mixup": 0.2}), "test")
    with torch.device("meta"):
        distiller = untrained(config, 10, config.losses)
    with FakeTensorMode(allow_non_fake_inputs=True):
        distiller._apply(lambda t: torch.empty(t.shape, dtype=t.dtype)).train()
        run = DistillationRun(
            config=config,
            device=CPU,
            classes=[],
            train_images=None,
            val_images=None,
            model=distiller,
            loaded={},
            optimizer=make_optimizer(config, distiller),
            schedule=None,
            mixup=make_mixup(config.augment, 10),
            steps_per_epoch=1,
            **scaler_and_average(config.train, distiller.student, CPU),
        )
        batch = Batch(torch.empty(4, 3, 48, 48, dtype=torch.uint8), torch.empty(4, dtype=torch.int64))
        for name in ("tensor", "as_tensor"):
            monkeypatch.setattr(torch, name, partial(_not_to_a_device, getattr(torch, name)))
        done = train_step(distiller, [batch] * accumulate, run, 0)
        with pytest.raises(DataDependentOutputException):  # as it would have been in the step
            done.losses["total"].item()


def _not_to_a_device(make: Any, *values: Any, device: Any = None, **options: Any) -> torch.Tensor:
    # Adam names "cpu" for its count of steps
    assert not isinstance(device, torch.device), "made of Python numbers for a device: use torch.full, torch.zeros, ..."
    return make(*values, **options)
