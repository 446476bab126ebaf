"""Whole runs of a tiny recipe: steps, averaging, schedules, precision, logging."""

from __future__ import annotations

import copy
import hashlib
import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from whole_runs import CPU, Recipe, assert_same, changed, events, final_state, start

from scalekd.checks.preflight import preflight
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.data.batches import eval_batches
from scalekd.distill.build import build, make_optimizer
from scalekd.distill.evaluate import evaluate
from scalekd.distill.run import DistillationRun
from scalekd.models.student_file import load_student
from scalekd.runs.distillation import execute
from scalekd.train import checkpoint
from scalekd.train.engine import train_step
from scalekd.train.log import RunLog, read_log
from scalekd.train.optim import make_schedule
from scalekd.train.run import scaler_and_average


def checksum(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()


def test_seeds_differ(light_recipe, tmp_path):
    runs = [start(changed(light_recipe, seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    assert checksum(runs[0].distiller.student) != checksum(runs[1].distiller.student)


def test_preflight_changes_nothing(random_recipe, tmp_path):
    run = build(check_config(random_recipe, "test"), CPU)
    parts = [run.distiller, run.distiller.teacher_view.model, run.ema, run.optimizer]
    before = copy.deepcopy([part.state_dict() for part in parts])
    preflight(run, Console(file=io.StringIO()))
    assert_same([part.state_dict() for part in parts], before)
    assert all(p.grad is None for p in run.distiller.parameters())
    recipe = changed(random_recipe, losses={"ce": {}, "kd": {}})
    start(recipe, tmp_path / "checked", check=True)
    start(recipe, tmp_path / "unchecked")
    assert_same(final_state(tmp_path / "checked"), final_state(tmp_path / "unchecked"))


# ---------------------------------------------------------------- the step


def test_accumulation_gives_the_same_run(plain_recipe, tmp_path):
    whole = start(plain_recipe, tmp_path / "1")
    parts = start(changed(plain_recipe, train={"accumulate": 2}), tmp_path / "2")
    fresh = build(check_config(plain_recipe, "test"), CPU).distiller.state_dict()
    for name, value in whole.distiller.state_dict().items():
        torch.testing.assert_close(parts.distiller.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert (
        max((v - fresh[n]).abs().max() for n, v in whole.distiller.state_dict().items()) > 1e-2
    )  # training changed the weights
    for a, b in zip(events(tmp_path / "1", "step"), events(tmp_path / "2", "step"), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)


def test_teacher_is_unchanged_by_training(tiny_recipe, tmp_path):
    fresh = build(check_config(tiny_recipe, "test"), CPU).distiller
    trained = start(tiny_recipe, tmp_path / "run").distiller
    assert checksum(trained.teacher_view.model) == checksum(fresh.teacher_view.model)
    assert checksum(trained.student) != checksum(fresh.student)


def one_batch(run: DistillationRun) -> list:
    return [next(iter(eval_batches(run.val_images, 8, 0, False)))]


def test_gradients_are_clipped_together(plain_recipe):
    recipe = changed(plain_recipe, train={"clip_grad": 0.5}, optim={"lr": 0.1, "weight_decay": 0})
    run = build(check_config(recipe, "test"), CPU)
    before = [p.detach().clone() for p in run.distiller.parameters()]
    train_step(run.distiller, one_batch(run), run, 0)
    moved = sum((p - b).square().sum() for p, b in zip(run.distiller.parameters(), before)).sqrt()
    assert moved.item() == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_average_of_weights_by_hand(tiny_recipe):
    run = build(check_config(changed(tiny_recipe, train={"ema": 0.9}), "test"), CPU)
    average = {name: value.clone() for name, value in run.ema.module.state_dict().items()}
    for step in (5, 1000):
        train_step(run.distiller, one_batch(run), run, step)
        decay = min(0.9, 1 - 1 / step)
        for name, value in run.distiller.student.state_dict().items():
            if value.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * value
                torch.testing.assert_close(run.ema.module.state_dict()[name], average[name])


@pytest.mark.parametrize(("decay", "constant_from"), [(0.9995, 2000), (0.9999, 10_000), (0.999975, 40_000)])
def test_decay_over_a_long_run(decay, constant_from):
    """The mean of all steps, and then the decay of the recipe; a quarter of the batch needs four times the steps."""
    ema = scaler_and_average(SimpleNamespace(precision="float32", ema=decay), nn.Linear(1, 1), CPU)["ema"]
    decays = [ema.get_decay(step) for step in [*range(constant_from + 1000), *range(constant_from, 400_001, 500)]]
    assert decays[:4] == pytest.approx([0, 0, 1 / 2, 2 / 3])
    assert all(d == pytest.approx(1 - 1 / s, abs=1e-12) for s, d in enumerate(decays[:constant_from]) if s)
    assert set(decays[constant_from + 1 :]) == {decay}
    # weight of the initial weights and of the first steps in the average at the end
    assert decays[0] == 0 and decay ** (400_000 - constant_from) < 1e-3


@pytest.mark.parametrize(("decay", "half_life"), [(0.99, 69), (0.99**0.25, 276)])
def test_half_life_of_the_average(decay, half_life):
    """log(1/2) / log(decay) steps, measured: with a quarter of the batch four times as many steps, so as many images."""
    model = nn.Linear(1, 1, bias=False)
    ema = scaler_and_average(SimpleNamespace(precision="float32", ema=decay), model, CPU)["ema"].double()
    steps = 0
    for step in range(2000):
        nn.init.constant_(model.weight, float(step >= 1000))
        ema.update(model, step=step)
        steps += step >= 1000 and ema.module.weight.item() <= 0.5
    assert steps == pytest.approx(half_life, abs=1)


def test_average_is_evaluated_and_exported(light_recipe, tmp_path):
    recipe = check_config(changed(light_recipe, train={"ema": 0.5}), "test")
    summary = execute(recipe, tmp_path / "run", CPU, Console(file=io.StringIO()), check=False)
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    average = {name.removeprefix("module."): value for name, value in state["ema"].items()}
    exported, _ = load_student(tmp_path / "run")
    assert_same(state["deployed"], average)
    assert_same(dict(exported.state_dict()), average)
    assert any(not torch.equal(value, state["student"][name]) for name, value in average.items())
    run = build(recipe, CPU)
    d = run.distiller
    result = evaluate(exported, eval_batches(run.val_images, 5, 0, False), d.student_mean, d.student_std, CPU)
    assert result == pytest.approx({k: state["progress"]["history"][-1][k] for k in result})
    assert result["top1"] == pytest.approx(summary["top1"])


@pytest.mark.parametrize(("precision", "enabled"), [("float32", False), ("bf16", False), ("fp16", True)])
def test_gradients_are_scaled_in_fp16_alone(tiny_recipe, precision, enabled):
    run = build(check_config(changed(tiny_recipe, train={"precision": precision}), "test"), CPU)
    assert run.scaler.is_enabled() == enabled


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precision_and_memory_format(tiny_recipe, precision, dtype, channels_last):
    recipe = changed(tiny_recipe, train={"precision": precision, "channels_last": channels_last})
    run = build(check_config(recipe, "test"), CPU)
    dtypes, layouts = set(), set()
    conv = next(m for m in run.distiller.student.layer1.modules() if isinstance(m, nn.Conv2d))
    conv.register_forward_hook(lambda _, args, out: dtypes.add(out.dtype))
    conv.register_forward_hook(
        lambda _, args, out: layouts.add(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    losses = train_step(run.distiller.train(), one_batch(run), run, 0).losses
    assert all(value.isfinite() for value in losses.values())
    assert dtypes == {dtype}
    assert layouts == {channels_last}


def test_nan_stops_before_a_checkpoint(light_recipe, tmp_path):
    recipe = changed(light_recipe, optim={"name": "sgd", "lr": 1e30}, train={"epochs": 1})
    with pytest.raises(UserError, match=r"the loss is not finite: .*ce.* in step 2, on "):
        start(recipe, tmp_path / "run")
    assert [e["step"] for e in events(tmp_path / "run", "step")] == [1]
    assert not (tmp_path / "run" / "last.pt").exists()


def test_nan_in_validation_stops_before_a_checkpoint(light_recipe, tmp_path):
    recipe = changed(light_recipe, optim={"name": "sgd", "lr": 1e30}, train={"batch_size": 24})
    with pytest.raises(UserError, match="the validation loss is not finite after step 1"):
        start(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("train_values", "message"),
    [
        ({"batch_size": 25}, "more than the 24 training images"),
        ({"batch_size": 8, "accumulate": 8}, "one image per process and step"),
    ],
)
def test_impossible_batch_sizes(tiny_recipe, train_values, message):
    with pytest.raises(UserError, match=message):
        build(check_config(changed(tiny_recipe, train=train_values), "test"), CPU)


# ---------------------------------------------------------------- logging


@pytest.mark.parametrize(("log_every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 3, 5, 6]), (50, [3, 6])])
def test_log_is_complete(light_recipe, tmp_path, log_every, steps):
    run = start(changed(light_recipe, train={"log_every": log_every}), tmp_path / "run")
    logged = events(tmp_path / "run", "step")
    assert [e["step"] for e in logged] == steps
    for event in logged:
        terms = [value for name, value in event["losses"].items() if name != "total"]
        assert event["losses"]["total"] == pytest.approx(sum(terms), rel=1e-5)
        assert list(event["losses"]) == ["ce", "kd", "total"]
        assert (event["steps"], event["epoch"]) == (6, event["step"] / 3)
        assert event["images_per_s"] > 0
        assert event["data_share"] > 0
        assert event["teacher_share"] > 0
        assert event["data_share"] + event["teacher_share"] <= 1
    assert logged[-1]["left_s"] == 0
    validations = events(tmp_path / "run", "validation")
    assert [(e["epoch"], e["step"], e["images"]) for e in validations] == [(1, 3, 12), (2, 6, 12)]
    assert validations[-1]["best"] == max(e["top1"] for e in validations)
    (finished,) = events(tmp_path / "run", "finished")
    assert (finished["steps"], finished["top1"]) == (run.total_steps, validations[-1]["top1"])
    assert [e["event"] for e in read_log(tmp_path / "run")][-2:] == ["validation", "finished"]


def test_losses_are_means_over_the_interval(light_recipe, tmp_path):
    start(light_recipe, tmp_path / "1")
    start(changed(light_recipe, train={"log_every": 50}), tmp_path / "3")
    each = [e["losses"]["ce"] for e in events(tmp_path / "1", "step")]
    means = [e["losses"]["ce"] for e in events(tmp_path / "3", "step")]
    assert means == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-5)


def test_log_goes_on_after_half_a_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "st')
    log = RunLog(tmp_path, Console(file=io.StringIO()))
    log.event("step", step=2)
    log.close()
    assert [e["step"] for e in read_log(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("epochs", "eval_every", "expected"), [(3, 1, [1, 2, 3]), (3, 2, [2, 3]), (2, 5, [2]), (2, 0.7, [0.67, 1.33, 2])]
)
def test_validation_epochs(light_recipe, tmp_path, epochs, eval_every, expected):
    start(changed(light_recipe, train={"epochs": epochs, "eval_every": eval_every}), tmp_path / "run")
    assert [e["epoch"] for e in events(tmp_path / "run", "validation")] == expected


# ---------------------------------------------------------------- optimiser and schedule


def rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    config = check_config(recipe, "test")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optim.lr)
    schedule = make_schedule(config, optimizer, steps_per_epoch)
    values = []
    for step in range(steps_per_epoch * config.train.epochs):
        schedule.step_update(step)
        values.append(optimizer.param_groups[0]["lr"])
    return values


@pytest.mark.parametrize("warmup", [0, 1, 1.5])
def test_warmup_and_cosine(tiny_recipe, warmup):
    recipe = changed(
        tiny_recipe,
        train={"epochs": 5},
        optim={"lr": 0.01},
        schedule={"name": "cosine", "warmup_epochs": warmup, "min_lr": 0.001} | ({"warmup_lr": 1e-4} if warmup else {}),
    )
    expected = [
        1e-4 + (0.01 - 1e-4) * step / (4 * warmup)
        if step < 4 * warmup
        else 0.001 + (0.01 - 0.001) * (1 + math.cos(math.pi * step / 20)) / 2
        for step in range(20)
    ]
    assert rates(recipe, 4) == pytest.approx(expected)


def test_multistep(tiny_recipe):
    recipe = changed(
        tiny_recipe,
        train={"epochs": 5},
        optim={"lr": 0.01},
        schedule={"name": "multistep", "milestones": [2, 4], "decay_rate": 0.1},
    )
    # timm's convention: one step before the milestone's epoch begins
    assert rates(recipe, 4) == pytest.approx([0.01] * 7 + [0.001] * 8 + [0.0001] * 5)


def groups(recipe: Recipe, **optim: Any) -> dict[str, tuple[float, float]]:
    """Parameter name -> (learning rate, weight decay)."""
    run = build(check_config(changed(recipe, optim=optim), "test"), CPU)
    of_id = {
        id(p): (group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups for p in group["params"]
    }
    names = dict(run.distiller.named_parameters())
    assert len(of_id) == len(names) == sum(len(g["params"]) for g in run.optimizer.param_groups)
    return {name: of_id[id(p)] for name, p in names.items()}


@pytest.mark.parametrize("student", ["test_resnet", "test_vit"])
def test_parameter_groups(tiny_recipe, student):
    recipe = changed(tiny_recipe, student={"model": student})
    parameter_groups = groups(recipe, lr=0.01, weight_decay=0.3, projector_lr=10.0)
    assert {lr for name, (lr, _) in parameter_groups.items() if name.startswith("student.")} == {0.01}
    assert {lr for name, (lr, _) in parameter_groups.items() if name.startswith("methods.")} == {0.1}
    shapes = {n: p.ndim for n, p in build(check_config(recipe, "test"), CPU).distiller.named_parameters()}
    tables = ("student.pos_embed", "student.cls_token")
    exempt = {name for name, ndim in shapes.items() if ndim <= 1 or name.endswith(".bias") or name in tables}
    assert {name for name, (_, decay) in parameter_groups.items() if decay == 0} == exempt
    assert {decay for _, decay in parameter_groups.values()} == {0, 0.3}


def test_decay_norm_and_bias(tiny_recipe):
    parameter_groups = groups(tiny_recipe, weight_decay=0.3, decay_norm_and_bias=True)
    assert {decay for _, decay in parameter_groups.values()} == {0.3}


def test_frozen_parameters_are_left_out(tiny_recipe):
    run = build(check_config(tiny_recipe, "test"), CPU)
    run.distiller.student.fc.weight.requires_grad_(False)
    optimizer = make_optimizer(run.config, run.distiller)
    assert id(run.distiller.student.fc.weight) not in {id(p) for g in optimizer.param_groups for p in g["params"]}
