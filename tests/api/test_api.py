"""The Python interface: each function does what the command of its name does."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from whole_runs import TINY, changed

import scalekd
from scalekd import api
from scalekd.cli.app import parser
from scalekd.config.arguments import overrides_of
from scalekd.config.recipe import load_recipe

FUNCTIONS = [name for name in scalekd.__all__ if inspect.isfunction(getattr(scalekd, name))]


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of one epoch on logits, its data, and a run of it made by the command line's `main`."""
    from small_images import write_images

    root = tmp_path_factory.mktemp("light")
    write_images(root / "images" / "train", per_class=8)
    write_images(root / "images" / "val", per_class=4, seed=1)
    recipe = changed(TINY, losses={"ce": {}, "kd": {}}, train={"epochs": 1})
    recipe["data"] = {"image_size": 48, "workers": 0}
    (root / "light.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def trained(light: Path) -> scalekd.Result:
    return scalekd.train(light / "light.yaml", data=light / "images", out=light / "run", device="cpu")


def test_importing_is_quick_and_loads_nothing_heavy():
    script = """
import sys, time
began = time.perf_counter()
import scalekd
took = time.perf_counter() - began
heavy = {"torch", "timm", "pydantic", "numpy", "PIL", "rich"} & set(sys.modules)
print(took < 1, heavy or "nothing", sorted(set(dir(scalekd))) == sorted(scalekd.__all__))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "nothing", "True"]


@pytest.mark.parametrize("name", ["compare.ladder", "cost.plan", "methods.kd", "report.svg", "train.engine"])
def test_functions_survive_the_import_of_a_package_of_their_name(name):
    package = name.split(".")[0]
    importlib.import_module(f"scalekd.{name}" if name != "methods.kd" else "scalekd.methods.logits")
    assert getattr(scalekd, package) is getattr(api, package)


def test_every_function_is_documented_and_typed():
    assert len(FUNCTIONS) == 18
    for name in FUNCTIONS:
        function = getattr(scalekd, name)
        signature = inspect.signature(function)
        assert function.__doc__ and signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty
            if name not in ("recipes", "methods"):
                assert (
                    f"        {'**' * (parameter.kind == parameter.VAR_KEYWORD)}{parameter.name}: " in function.__doc__
                )


# what a command has and its function has not, and the other way round
CALLED = {
    "format": "formats",
    "baseline": "baselines",
    "analysis": "analyses",
    "no_preflight": "preflight",
    "run_folder": "run",
}
ONLY_COMMANDS = {
    "dry_run",
    "json",
    "list",
    "markdown",
    "help",
    "on_bad_image",
    "teacher_random",
}  # keys of `data` and `teacher`
ONLY_FUNCTIONS = {"overrides", "sections", "stop", "verbose"}


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "evaluate",
        "predict",
        "embed",
        "push",
        "probe",
        "head",
        "compare",
        "export",
        "quantize",
        "report",
        "cost",
        "plan",
    ],
)
def test_a_function_takes_what_its_command_takes(name):
    import argparse

    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {CALLED.get(a.dest, a.dest) for a in commands.choices[name]._actions} - ONLY_COMMANDS - {"overrides"}
    function = inspect.signature(scalekd.fit_head if name == "head" else getattr(scalekd, name))
    parameters = set(function.parameters)
    if name == "evaluate":  # one command for two functions
        parameters |= set(inspect.signature(scalekd.evaluate_retrieval).parameters)
        options -= {"retrieval"}
    assert parameters - ONLY_FUNCTIONS - ONLY_COMMANDS == options


# ------------------------------------------------ the same as on the command line


def test_python_and_the_command_line_give_equal_weights(cli, light, tmp_path, capsys):
    options = ["--data", light / "images", "--out", tmp_path / "command", "--device", "cpu"]
    result = cli("train", light / "light.yaml", *options, "optim.lr=3e-3", "losses.kd.temperature=2", "seed=5")
    assert result.code == 0, result.err
    capsys.readouterr()
    found = scalekd.train(
        light / "light.yaml",
        data=light / "images",
        out=tmp_path / "python",
        device="cpu",
        optim={"lr": 3e-3},
        losses={"kd": {"temperature": 2}},
        overrides=["seed=5"],
    )
    assert capsys.readouterr() == ("", "")
    one, other = (load_file(tmp_path / name / "student.safetensors") for name in ("command", "python"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    summary = json.loads((tmp_path / "command" / "summary.json").read_text())
    assert found.top1 == summary["top1"] == found.metrics["top1"] and found.metrics["steps"] == 3
    assert found.folder == tmp_path / "python" and found.student.is_file() and found.report.is_file()
    recipes = [(tmp_path / name / "recipe.yaml").read_text() for name in ("command", "python")]
    assert recipes[0] == recipes[1]


def test_it_prints_when_asked(light, tmp_path, capsys):
    scalekd.train(light / "light.yaml", data=light / "images", out=tmp_path / "run", device="cpu", verbose=True)
    assert "top-1" in capsys.readouterr().out


def test_evaluate(cli, light, trained):
    command = cli("evaluate", trained.folder, "--data", light / "images" / "val", "--device", "cpu", "--json")
    found = scalekd.evaluate(trained.folder, data=light / "images" / "val", device="cpu")
    assert vars(found) == json.loads(command.out) and found.images == 12
    assert found.top1 == pytest.approx(trained.top1)


def test_export_and_load_student(trained, light):
    found = scalekd.export(trained.folder, checkpoint="best")
    assert found.student == trained.student and found.onnx is None
    assert found.differences == {trained.student: 0.0} and found.top1 == trained.summary["best_top1"]
    model, card = scalekd.load_student(trained.folder)
    assert not model.training and card["classes"] == ["ant", "bee", "cat"]
    with torch.no_grad():
        assert model(torch.zeros(2, 3, *card["image_size"])).shape == (2, 3)


def test_report(trained, tmp_path):
    found = scalekd.report(trained.folder, images=6, out=tmp_path / "page.html", device="cpu")
    assert found.path == tmp_path / "page.html" and found.left_out == []
    assert "<html" in found.path.read_text()


def test_cost_and_plan(cli, light):
    recipe = light / "light.yaml"
    command = json.loads(cli("cost", recipe, "--classes", 3, "--batch", 4, "data.train=x", "--json").out)
    found = scalekd.cost(recipe, classes=3, batch=4, data={"train": "x"})
    assert json.loads(json.dumps(found.details)) == command
    assert found.gmacs == command["step"]["total"]["gmacs"] > 0 and found.memory_mb == command["step"]["memory_mb"]
    command = json.loads(cli("plan", recipe, "--data", light / "images", "--gpu", "h100", "--json").out)
    planned = scalekd.plan(recipe, data=light / "images", gpu="h100")
    assert json.loads(json.dumps([planned.hours, planned.runs])) == [command["hours"], command["runs"]]


@pytest.mark.slow
def test_probe_and_fit_head(light, trained, tmp_path, capsys):
    found = scalekd.probe(
        [str(trained.folder)],
        data=light / "images",
        shots=("all", 1),
        draws=2,
        out=tmp_path / "probe",
        cache=tmp_path / "cache",
        device="cpu",
    )
    assert found.results == json.loads((tmp_path / "probe" / "results.json").read_text())
    assert found.results["shots"] == [1, "all"] and list(found.results["models"]) == [str(trained.folder)]
    backbone = trained.folder  # the folder of a run stands for its model and weights
    head = scalekd.fit_head(str(backbone), data=light / "images", out=tmp_path / "head", device="cpu")
    assert head.card == json.loads((tmp_path / "head" / "head.json").read_text())
    assert head.top1 == head.card["validation"]["after"]["top1"]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_compare(light, tmp_path, capsys):
    ladder = {"name": "mine", "recipe": str(light / "light.yaml"), "baseline": "no teacher", "seeds": [0]}
    ladder["methods"] = {"no teacher": {"teacher": None, "losses": {"ce": {}}}, "KD": {}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(ladder))
    found = scalekd.compare(tmp_path / "mine.yaml", data=light / "images", out=tmp_path / "out", device="cpu", jobs=2)
    assert found.summary["finished"] == found.summary["planned"] == 2 and found.failed == []
    assert found.report.is_file() and capsys.readouterr().out == ""


def test_lists(cli):
    assert scalekd.recipes() == json.loads(cli("recipes", "--json").out)
    listed = json.loads(cli("methods", "--json").out)
    assert [(m.name, m.summary) for m in scalekd.methods()] == [(m["name"], m["summary"]) for m in listed]


# ------------------------------------------------ arguments


def overrides(**arguments: Any) -> list[str]:
    sections = arguments.pop("sections", {})
    names = ("data", "val", "unlabelled", "teacher", "student")
    values = [arguments.pop(name, None) for name in names]
    return overrides_of(*values, sections=sections, **arguments)


def test_arguments_are_overrides(light):
    images = light / "images"
    assert overrides(data=images) == [f'data.train="{images}/train"', f'data.val="{images}/val"']
    assert overrides(data="somewhere", val=Path("other")) == [
        'data.train="somewhere"', "data.val=null", 'data.val="other"',
    ]  # fmt: skip
    assert overrides(data={"train": Path("a"), "workers": 0}) == ['data.train="a"', "data.workers=0"]
    assert overrides(teacher="x") == ['teacher.model="x"', "teacher.weights=pretrained"]
    assert overrides(teacher=False, student={"model": "r", "kwargs": {"a": [1, 2]}}) == [
        "teacher=null", 'student.model="r"', "student.kwargs.a=[1, 2]",
    ]  # fmt: skip
    assert overrides(sections={"losses": {"kd": False, "ce": {}}, "seed": 1}, overrides=["seed=2"]) == [
        "losses.kd=false", "losses.ce={}", "seed=1", "seed=2",
    ]  # fmt: skip


def test_sections_change_single_keys():
    config = load_recipe("demo", overrides(teacher=False, sections={
        "losses": {"ce": {"weight": 1}, "kd": False, "scalekd": False}, "optim": {"lr": 1e-5}, "schedule": {"min_lr": 1e-7},
    }))  # fmt: skip
    assert config.teacher is None and config.losses == {"ce": {"weight": 1.0}}
    assert (config.optim.lr, config.optim.name, config.schedule.min_lr) == (1e-5, "adamw", 1e-7)


# ------------------------------------------------ mistakes


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(scalekd.UserError, match=r"no recipe `own-dta`.*`own-data`"):
        scalekd.train("own-dta")


def test_all_problems_of_the_arguments_at_once():
    with pytest.raises(scalekd.UserError) as caught:
        scalekd.train("demo", optim={"lrr": 1}, losses={"kdd": {}}, student={"model": "resnet81"}, sead=1)
    message = str(caught.value)
    for part in (
        "4 problems",
        "optim.lrr: unknown. Did you mean `lr`?",
        "losses.kdd",
        "resnet81",
        "sead: unknown. Did you mean `seed`?",
    ):
        assert part in message


def test_a_value_that_no_recipe_can_hold():
    with pytest.raises(scalekd.UserError, match="lists and mappings, not Tensor"):
        scalekd.train("demo", optim={"lr": torch.tensor(1.0)})


def test_what_goes_with_something_else():
    with pytest.raises(scalekd.UserError, match="`gpu` and `measure`"):
        scalekd.plan("demo", gpu="h100", measure=True)
    with pytest.raises(scalekd.UserError, match="`device` and `batch` go with `measure`"):
        scalekd.plan("demo", batch=8)


def test_the_command_line_names_its_options(cli):
    assert "`--gpu` and `--measure`" in cli("plan", "demo", "--gpu", "h100", "--measure").err
