"""Training runs of detectors and segmenters: training, resuming, export, recipes and their errors."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import launcher
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file
from whole_runs import assert_same

from scalekd.common.errors import UserError
from scalekd.config.recipe_files import recipe_names
from scalekd.models.options import Backbone
from scalekd.runs import transfer as transfer_runs
from scalekd.runs.nonfinite import load_report
from scalekd.runs.transfer import build, train
from scalekd.train import engine, health
from scalekd.train.health import NonFinite
from scalekd.train.log import read_log
from scalekd.transfer.backbone import build_backbone
from scalekd.transfer.config import SHELVES, LoopTeacher, load
from scalekd.transfer.detection import run as detect
from scalekd.transfer.exported_model import load as load_trained
from scalekd.transfer.segmentation import run as segment
from scalekd.transfer.synthetic_scenes import Options, make_scenes

CPU = torch.device("cpu")
TEACHER = {"model": "test_vit", "weights": "random", "kwargs": {"depth": 4}, "image_size": 32}
CARDS = {"detection": "detector.json", "segmentation": "segmenter.json"}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "set"
    options = Options(size=48, items=(1, 2), scales=(0.5, 1.0), background="plain", rgb=True, seed=0)
    make_scenes(out, "fashion-mnist:train", "fashion-mnist:test", 6, 3, options)
    return out


def recipe(task: str, scenes: Path, **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"workers": 0}
    values: dict[str, Any] = {
        "name": "small",
        "backbone": {"model": "test_resnet", "weights": "random"},
        "optim": {"lr": 1e-3, "stage_decay": 0.7},
        "track": [],
    }
    train: dict[str, Any] = {"batch_size": 2, "log_every": 1}
    if task == "detection":
        for part, key in (("train", ""), ("val", "val_")):
            data |= {
                f"{key}annotations": str(scenes / f"instances_{part}.json"),
                f"{key}images": str(scenes / "images"),
            }
        data |= {"scales": [40, 48], "short": 48, "long": 48}
        train |= {"epochs": 2}
        anchors = {
            "anchors": [8, 16, 24, 32, 48],
            "width": 16,
            "regions": 4,
            "proposals": [16, 8],
            "freeze_norms": False,
        }
        values |= {"detector": anchors}
    else:
        data |= {"root": str(scenes), "reduce_zero_label": True, "crop": 32}
        train |= {"iterations": 6, "eval_every": 4}
        values |= {"segmenter": {"width": 16}}
    values |= {"data": data, "train": train}
    for section, change in changes.items():
        values[section] = values[section] | change if isinstance(change, dict) and section in values else change
    return values


def config_of(task: str, tmp_path: Path, values: dict[str, Any]) -> Any:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values))
    return load(task, str(file))


def trained(config: Any, folder: Path) -> dict[str, Any]:
    summary = train(config, folder, CPU, Console(file=io.StringIO()))
    assert summary is not None
    return summary


def stop_in_step(number: int, config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until Ctrl-C in a step, counted from 1."""
    real, taken = engine.train_step, []

    def failing(*args, **kwargs):
        taken.append(0)
        if len(taken) == number:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "train_step", failing)
        with pytest.raises(KeyboardInterrupt):
            trained(config, folder)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(task, scenes, tmp_path, monkeypatch):
    config = config_of(task, tmp_path, recipe(task, scenes))
    whole = trained(config, tmp_path / "whole")

    stop_in_step(5, config, tmp_path / "parts", monkeypatch)  # after the first validation, before the end
    parts = trained(config, tmp_path / "parts")

    figures = list(build(config, CPU).figures)
    assert {key: parts[key] for key in figures} == {key: whole[key] for key in figures}
    first, second = (load_trained(tmp_path / name, task)[0].state_dict() for name in ("whole", "parts"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert whole["reload_difference"] < 1e-5
    events = read_log(tmp_path / "parts")
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in events if e["event"] == "validation"] == ([3, 6] if task == "detection" else [4, 6])
    card = json.loads((tmp_path / "whole" / CARDS[task]).read_text())
    assert card["figures"] == {key: whole[key] for key in figures} and len(card["classes"]) == 10
    assert card["provenance"]["weights"]["backbone"]["source"] == "random"
    with pytest.raises(UserError, match="holds this run, and it is finished"):
        trained(config, tmp_path / "whole")


def without_masks(file: str, folder: Path) -> str:
    """A copy of annotations with boxes only."""
    content = json.loads(Path(file).read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    (folder / Path(file).name).write_text(json.dumps(content))
    return str(folder / Path(file).name)


@pytest.mark.parametrize(("task", "projector"), [("detection", "mlp"), ("segmentation", "cap")])
def test_a_run_with_a_teacher_goes_on_where_it_stopped(task, projector, scenes, tmp_path, monkeypatch):
    """The detector is a RetinaNet, on annotations without masks."""
    changes: dict[str, Any] = {"train": {"iterations": 3, "eval_every": 3, "save_minutes": 0}}
    if task == "detection":
        changes = {"train": {"epochs": 1, "save_minutes": 0}, "detector": {"kind": "retinanet"}}
    values = recipe(task, scenes, teacher=TEACHER | {"projector": projector}, **changes)
    if task == "detection":
        del values["detector"]["regions"], values["detector"]["proposals"]
        values["data"] |= {
            key: without_masks(values["data"][key], tmp_path) for key in ("annotations", "val_annotations")
        }
    config = config_of(task, tmp_path, values)
    whole = trained(config, tmp_path / "whole")
    stop_in_step(3, config, tmp_path / "parts", monkeypatch)
    trained(config, tmp_path / "parts")
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")]
    for part in ("student", "projector", "optimizer"):
        assert_same(*(state[part] for state in states))
    steps = [e for e in read_log(tmp_path / "parts") if e["event"] == "step"]
    assert [e["step"] for e in steps] == [1, 2, 3]
    assert all(0 < e["losses"]["teacher"] < 2 and 0 < e["teacher_share"] < 1 for e in steps)
    assert list(json.loads((tmp_path / "parts/inputs.json").read_text())["teacher"]) == ["teacher"]

    alone = build(config_of(task, tmp_path, values | {"teacher": None}), CPU)
    assert_same(dict(build(config, CPU).student.state_dict()), dict(alone.student.state_dict()))  # the seed's weights
    file = load_file(tmp_path / "whole" / CARDS[task].replace(".json", ".safetensors"))
    assert file.keys() == alone.student.state_dict().keys() and whole["reload_difference"] < 1e-5
    page, card = ((tmp_path / "whole" / name).read_text() for name in ("report.html", "README.md"))
    assert ", beside test_vit while it was trained." in page and "- teacher: test_vit, in training only" in card
    if task == "detection":
        assert "RetinaNet on test_resnet" in page and "Box AP by class" in page and "masks" not in card
        assert whole["box_ap"] == whole["best_box_ap"] and "mask_ap" not in whole


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_averaged_weights_in_halves_and_parts(task, scenes, tmp_path):
    """What a run on GPUs would use, in one process on the CPU."""
    train = {"ema": 0.5, "precision": "bf16", "accumulate": 2, "batch_size": 4, "channels_last": True}
    train |= {"epochs": 3} if task == "detection" else {"iterations": 3}
    config = config_of(task, tmp_path, recipe(task, scenes, train=train, teacher=TEACHER))
    summary = trained(config, tmp_path / "run")
    assert summary["steps"] == 3 and summary["reload_difference"] < 1e-4
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert any(not torch.equal(saved["student"][key], saved["deployed"][key]) for key in saved["student"])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_step_that_is_not_finite_can_be_looked_at_again(task, scenes, tmp_path, monkeypatch):
    config = config_of(task, tmp_path, recipe(task, scenes))

    def broken(*args):
        run = real(*args)
        with torch.no_grad():
            next(run.student.parameters())[0] = torch.nan
        return run

    module = detect if task == "detection" else segment
    real = module.build
    monkeypatch.setattr(module, "build", broken)
    monkeypatch.setattr(transfer_runs, "preflight", lambda *_: None)
    with pytest.raises(UserError, match=r"the loss is not finite: .* in step 1, on .*png"):
        trained(config, tmp_path / "run")
    monkeypatch.setattr(module, "build", real)
    run, batches, step = load_report(tmp_path / "run/nonfinite-step-1.pt", CPU)
    with pytest.raises(NonFinite, match="in step 1"):
        engine.train_step(run.model, batches, run, step - 1, checked=True)


def test_figures_of_nothing_are_no_figures():
    model = torch.nn.BatchNorm2d(2)
    health.expect_finite(model, 3)
    model.running_var[0] = torch.inf
    with pytest.raises(UserError, match="not finite after step 3"):
        health.expect_finite(model, 3)


def test_another_backbone_brings_its_own_arguments(scenes, tmp_path):
    config = load("detection", "coco-mask-rcnn-swin", ["backbone.model=resnet18"])
    assert config.backbone.model == "resnet18" and config.backbone.weights == "pretrained"
    assert config.backbone.kwargs == {"drop_path_rate": 0.2}  # a rate: the recipe's regularisation
    swin = {"model": "swin_tiny_patch4_window7_224", "kwargs": {"window_size": 8, "drop_rate": 0.1}, "image_size": 256}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe("segmentation", scenes, backbone=swin | {"weights": "random"})))
    backbone = load("segmentation", str(file), ["backbone.model=resnet18"]).backbone
    assert backbone == Backbone(model="resnet18", weights="random", kwargs={"drop_rate": 0.1})


def test_another_teacher_keeps_how_it_teaches(scenes, tmp_path):
    file = tmp_path / "recipe.yaml"
    teacher = TEACHER | {"weight": 2.0, "projector": "linear", "lr_scale": 3.0}
    file.write_text(json.dumps(recipe("segmentation", scenes, teacher=teacher)))
    found = load("segmentation", str(file), ["teacher.model=test_vit2", "teacher.weights=w.pt"]).teacher
    assert found == LoopTeacher(model="test_vit2", weights="w.pt", weight=2.0, projector="linear", lr_scale=3.0)
    assert load("segmentation", str(file), ["teacher=null"]).teacher is None
    assert (
        load("detection", "own-objects", ["teacher.model=test_vit", "teacher.weights=pretrained"]).teacher.weight == 1.0
    )


def test_a_warm_up_above_the_first_layer_s_rate_is_rejected(scenes, tmp_path):
    schedule = {"name": "cosine", "warmup_iterations": 2, "warmup_lr": 5e-4}
    values = recipe("segmentation", scenes, schedule=schedule)  # the stem's rate: 1e-3 * 0.7 ** 5
    with pytest.raises(
        UserError,
        match=r"warmup_lr 0.0005 is above the learning rate of the first layer, 0.00017 .* set schedule.warmup",
    ):
        segment.build(config_of("segmentation", tmp_path, values), CPU)


@pytest.mark.parametrize("name", ["ade20k-upernet", "ade20k-upernet-swin", "ade20k-upernet-vit"])
def test_a_recipe_s_arguments_go_with_the_weights_of_the_plain_model(name, tmp_path):
    spec = load("segmentation", name).backbone
    small = {"resnet50": "resnet18", "vit_base_patch16_224": "vit_tiny_patch16_224"}.get(spec.model, spec.model)
    weights = tmp_path / "plain.pt"
    torch.save(timm.create_model(small).state_dict(), weights)
    model, loaded, *_ = build_backbone(spec.model_copy(update={"model": small, "weights": str(weights)}), 3)
    assert loaded.matched == loaded.total == len(model.state_dict())


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_all_of_the_model_learns_and_the_rates_fall_towards_the_image(task, scenes, tmp_path):
    run = build(config_of(task, tmp_path, recipe(task, scenes)), CPU)
    groups = {group["name"].removesuffix(", no decay"): group["lr"] for group in run.optimizer.param_groups}
    # a stem and four stages of 0.7: 0.7 ** 5 at the stem; timm's warm-up of 0 leaves the rates as they are
    assert groups["rest"] == pytest.approx(1e-3) and groups["layer 0"] == pytest.approx(1e-3 * 0.7**5)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    batches = run.train_batches(run.train_sampler(), 0)
    run.model.train()
    for step in range(2):
        run.schedule.step_update(step)
        done = engine.train_step(run.model, [next(batches)], run, step, checked=True)
    assert done.losses["total"].isfinite()
    assert [name for name, p in run.model.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(scenes, tmp_path):
    """The same global batches without batch norm, so the same losses and weights; results go between processes."""
    backbone = {"model": "test_convnext", "weights": "random"}
    shared: dict[str, Any] = {"backbone": backbone, "teacher": TEACHER}
    values = recipe("detection", scenes, **shared, train={"batch_size": 4})
    config_of("detection", tmp_path, values)  # writes it
    command = ["detect", "train", tmp_path / "recipe.yaml", "--device", "cpu", "--out", tmp_path / "two"]
    both = launcher.two_processes("-m", "scalekd", *command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert [done.returncode for done in both] == [0, 0], both
    alone = recipe("detection", scenes, **shared, train={"batch_size": 4, "accumulate": 2})
    trained(config_of("detection", tmp_path, alone), tmp_path / "one")
    logs = [[e for e in read_log(tmp_path / name) if e["event"] in ("step", "validation")] for name in ("two", "one")]
    for a, b in zip(*logs, strict=True):
        if a["event"] == "step":
            assert "teacher" in a["losses"] and a["losses"] == pytest.approx(b["losses"], rel=1e-3)
        else:
            assert a["images"] == b["images"] == 3
    weights = [load_trained(tmp_path / name, "detection")[0].state_dict() for name in ("two", "one")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


def test_poly_and_warm_up_by_hand(scenes, tmp_path):
    schedule = {"name": "poly", "power": 2.0, "warmup_iterations": 2, "warmup_lr": 0.0}
    run = build(config_of("segmentation", tmp_path, recipe("segmentation", scenes, schedule=schedule)), CPU)
    rest = next(group for group in run.optimizer.param_groups if group["name"] == "rest")
    rates = []
    for step in range(6):
        run.schedule.step_update(step)
        rates.append(rest["lr"])
    expected = [0.0, 0.5e-3] + [1e-3 * (1 - step / 6) ** 2 for step in (2, 3, 4, 5)]
    assert rates == pytest.approx(expected)


def test_a_dry_run_writes_nothing(scenes, tmp_path):
    teacher = TEACHER | {"weight": 0.5}
    config = config_of("segmentation", tmp_path, recipe("segmentation", scenes, teacher=teacher))
    out = io.StringIO()
    assert train(config, tmp_path / "run", CPU, Console(file=out, width=200), dry_run=True) is None
    assert not (tmp_path / "run").exists()
    assert "6 training images, 3 for validation, 10 classes" in out.getvalue()
    assert "<- test_vit, UPerNet" in out.getvalue() and "this teacher is untrained" in out.getvalue()
    assert "images resized to 32x32 give 2x2 positions of 64 channels; projector mlp, loss weight 0.5" in out.getvalue()
    assert "all trainable parameters receive gradients" in out.getvalue()


def test_validation_images_are_not_trained_on(scenes, tmp_path):
    values = recipe("detection", scenes, data={"val_annotations": str(scenes / "instances_train.json")})
    with pytest.raises(UserError, match=r"6 of the validation images are also training images"):
        detect.build(config_of("detection", tmp_path, values), CPU)


def test_a_fixed_size_backbone_needs_fitting_crops(scenes, tmp_path):
    mixer = {"model": "mixer_s32_224", "weights": "random", "image_size": 64}
    values = recipe("segmentation", scenes, backbone=mixer, data={"crop": 96})
    with pytest.raises(UserError, match=r"only accepts 64x64 pixels; set data.crop=64 segmenter.inference=sliding"):
        segment.build(config_of("segmentation", tmp_path, values), CPU)


def test_all_errors_of_a_recipe_are_reported_together(scenes, tmp_path):
    values = recipe(
        "segmentation",
        scenes,
        train={"iterations": 2, "epochs": 3, "accumulate": 3},
        schedule={"name": "cosine", "power": 2.0, "warmup_iterations": 2},
        optim={"stage_decya": 0.9},
        backbone={"model": "test_resnt", "weights": None},
    )
    with pytest.raises(UserError) as raised:
        config_of("segmentation", tmp_path, values)
    for line in ("train.epochs: unknown", "optim.stage_decya: unknown. Did you mean `stage_decay`", "`test_resnet`"):
        assert line in str(raised.value)
    values |= {"optim": {}, "train": {"iterations": 2, "accumulate": 3, "batch_size": 2}}
    values["backbone"] = {"model": "test_resnet"}
    with pytest.raises(UserError) as raised:
        config_of("segmentation", tmp_path, values)
    for line in (
        "train.batch_size 2 is not a multiple of train.accumulate 3",
        "backbone.weights is not set",
        "schedule.warmup_iterations 2 must be below train.iterations 2",
        "schedule.power: has no effect here; it is used only with schedule.name: poly",
    ):
        assert line in str(raised.value)
    detector = {"freeze_norms": True, "kind": "retinanet"}
    values = recipe("detection", scenes, data={"long": 40}, detector=detector, teacher={"model": "test_vit"})
    with pytest.raises(UserError) as raised:
        config_of("detection", tmp_path, values)
    for line in (
        "data.long 40 is below",
        "detector.freeze_norms=false",
        "teacher.weights is not set",
        "detector.regions: has no effect here; it is used only with detector.kind: mask-rcnn",
        "detector.proposals: has no effect here",
    ):
        assert line in str(raised.value)
    values["teacher"] = {"model": "test_vt", "weights": "random", "projector": "conv", "weight": 0, "layer": 3}
    with pytest.raises(UserError) as raised:
        config_of("detection", tmp_path, values)
    for line in ("`test_vit`", "teacher.projector: ", "teacher.weight: ", "teacher.layer: unknown"):
        assert line in str(raised.value)


@pytest.mark.parametrize("task", list(SHELVES))
def test_the_shipped_recipes_load(task):
    names = recipe_names(SHELVES[task])
    assert names
    for name in names:
        config = load(task, name)
        assert config.name == name and config.backbone.weights == "pretrained"
    with pytest.raises(UserError, match="Did you mean"):
        load(task, names[0] + "x")


def test_table_11_is_what_the_recipes_say():
    coco, swin = load("detection", "coco-mask-rcnn"), load("detection", "coco-mask-rcnn-swin")
    assert (coco.train.epochs, coco.train.batch_size, coco.optim.lr, coco.optim.weight_decay) == (8, 16, 1e-4, 0.05)
    assert coco.optim.stage_decay == 0.7 and coco.data.scales[-1] == 800 and coco.data.long == 1333
    assert swin.backbone.kwargs == {"drop_path_rate": 0.2} and swin.optim == coco.optim
    rates = {name: load("segmentation", f"ade20k-upernet{name}").optim for name in ("", "-swin", "-vit")}
    assert {n: (o.lr, o.stage_decay) for n, o in rates.items()} == {
        "": (1e-4, 0.9),
        "-swin": (1e-4, 0.9),
        "-vit": (2e-4, 0.6),
    }
    assert load("segmentation", "ade20k-upernet").train.iterations == 160_000
