"""`auto` for precision, memory format and data workers follows the device; a run keeps what it began with."""

from __future__ import annotations

import io

import pytest
import torch
import yaml
from rich.console import Console
from whole_runs import CPU, changed

from scalekd.checks import step as step_module
from scalekd.common.errors import UserError
from scalekd.common.stop import Stopped, StopRequest
from scalekd.config.recipe import check_config, load_recipe
from scalekd.distill.build import build
from scalekd.runs.distillation import execute
from scalekd.train import hardware

AUTO = {"precision": "auto", "channels_last": "auto"}


@pytest.mark.parametrize(("instructions", "precision"), [("none", "float32"), ("amx_bf16", "bf16")])
def test_own_data_on_a_cpu(monkeypatch, instructions, precision):
    monkeypatch.setattr(hardware, "bf16_instructions", lambda: instructions)
    monkeypatch.setattr(hardware, "cores", lambda: 6)
    config = hardware.for_device(load_recipe("own-data"), CPU)
    assert (config.train.precision, config.train.channels_last, config.data.workers) == (precision, True, 3)


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "float32")])
def test_on_a_gpu(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(hardware, "cores", lambda: 32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = hardware.for_device(load_recipe("own-teacher"), torch.device("cuda"))
    assert (config.train.precision, config.data.workers) == (precision, 3)


def test_values_of_a_recipe_stay():
    recipe = load_recipe("own-data", ["train.precision=fp16", "train.channels_last=false", "data.workers=0"])
    assert hardware.for_device(recipe, CPU) == recipe
    paper = load_recipe("imagenet-swin-l-resnet50-advanced")
    assert (paper.train.precision, hardware.for_device(paper, CPU).train) == ("bf16", paper.train)


@pytest.mark.parametrize(
    ("name", "ours"), [("fp32", "float32"), ("bfloat16", "bf16"), ("float16", "fp16"), ("bf16", "bf16")]
)
def test_names_of_precisions(name, ours):
    assert load_recipe("own-data", [f"train.precision={name}"]).train.precision == ours


@pytest.mark.parametrize("text", ["data.workers=many", "data.workers=-1", "train.channels_last=maybe"])
def test_other_values_give_one_message(text):
    with pytest.raises(UserError, match="or auto") as caught:
        load_recipe("own-data", [text])
    assert str(caught.value).count("\n") == 1


def test_a_run_keeps_what_it_began_with(tiny_recipe, tmp_path, monkeypatch):
    recipe = changed(tiny_recipe, train=AUTO | {"epochs": 1}) | {"losses": {"ce": {}, "kd": {}}, "track": []}
    config, console = check_config(recipe, "test"), Console(file=io.StringIO())
    monkeypatch.setattr(hardware, "bf16_instructions", lambda: "amx_bf16")
    stop = StopRequest()
    monkeypatch.setattr(stop, "begin", lambda: setattr(stop, "number", 15))  # stops before its first step, saved
    with pytest.raises(Stopped):
        execute(config, tmp_path / "run", CPU, console, check=False, stop=stop, look=False)
    held = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["train"]
    assert (held["precision"], held["channels_last"]) == ("bf16", True)
    monkeypatch.setattr(hardware, "bf16_instructions", lambda: "none")  # another machine
    assert execute(config, tmp_path / "run", CPU, console, check=False, look=False)["steps"] == 3


def test_the_screen_shows_the_choice(tiny_recipe, monkeypatch):
    run = build(check_config(changed(tiny_recipe, train=AUTO), "test"), CPU)
    monkeypatch.setattr(step_module, "precision_for", lambda _: run.config.train.precision)
    check = step_module.device_check(run)
    assert check.status == "ok" and check.text.endswith("channels last, 0 data workers")
    assert run.config.train.precision in check.text


def test_the_screen_warns_of_slow_bf16(tiny_recipe, monkeypatch):
    run = build(check_config(changed(tiny_recipe, train={"precision": "bf16"}), "test"), CPU)
    monkeypatch.setattr(hardware, "bf16_instructions", lambda: "none")
    check = step_module.device_check(run)
    assert check.status == "warn" and "no bf16 instructions" in check.text and "train.precision=auto" in check.fix
