"""The command line: each command once, through `main` or as a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import launcher
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from scalekd import api
from scalekd.cli.app import parse
from scalekd.cli.options import recipe_overrides
from scalekd.common.processor import bf16_instructions
from scalekd.common.results import Result
from scalekd.common.version import __version__
from scalekd.config.recipe import load_recipe
from scalekd.config.recipe_files import recipe_names
from scalekd.methods.names import METHODS
from scalekd.train import engine
from scalekd.train.log import read_log

COMMANDS = [
    "train", "compare", "evaluate", "export", "import", "head", "demo", "methods", "pairs", "teachers", "recipes", "cost",
    "analyze", "doctor", "detect", "segment",
]  # fmt: skip


def test_help_is_quick_and_lists_every_command():
    script = """
import atexit, sys
from scalekd.cli.app import main
atexit.register(lambda: print({"torch", "timm", "pydantic"} & set(sys.modules)))
main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    for name in COMMANDS:
        assert f"\n    {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(cli, name):
    result = cli(name, "--help")
    assert result.code == 0 and result.out.startswith(f"usage: scalekd {name}")


def test_version_and_no_command(cli):
    assert cli("--version") == (0, f"scalekd {__version__}\n", "")
    assert cli().code == 2
    result = cli("trian")
    assert result.code == 2 and "invalid choice: 'trian'" in result.err


def test_methods(cli):
    listed = json.loads(cli("methods", "--json").out)
    assert [entry["name"] for entry in listed] == list(METHODS)
    assert next(e for e in listed if e["name"] == "kd")["options"] == {
        "temperature": 1.0, "probabilities": "softmax", "standardize": False, "variant": "kd"
    }  # fmt: skip
    assert all(re.match(rf"`{e['name']}`: .*\.$", e["summary"]) and "See" not in e["summary"] for e in listed)
    text = cli("methods").out
    assert all(f"\n{name} " in f"\n{text}" for name in METHODS) and "temperature=1.0" in text


def test_recipes(cli):
    listed = json.loads(cli("recipes", "--json").out)
    assert [entry["name"] for entry in listed] == recipe_names()
    assert all(entry["summary"] and entry["student"] and entry["losses"] for entry in listed)
    lines = [line.split() for line in cli("recipes").out.splitlines() if re.match(r"  \S", line)]
    assert sorted(line[0] for line in lines) == recipe_names() and all(line[1].startswith("[") for line in lines)


def test_recipes_show(cli):
    assert yaml.safe_load(cli("recipes", "show", "demo").out)["name"] == "demo"
    result = cli("recipes", "show", "dmo")
    assert result.code == 2 and "Did you mean `demo`" in result.err
    assert cli("recipes", "list").code == 2


def test_doctor(cli):
    result = cli("doctor", "--json")
    found = json.loads(result.out)
    assert result.code == 0 and found["problems"] == [] and found["torch"] == torch.__version__
    result = cli("doctor")
    assert result.code == 0 and "a run can start" in result.out


def test_doctor_reads_the_bf16_instructions_of_a_cpu(tmp_path):
    info = tmp_path / "cpuinfo"
    assert bf16_instructions(info) == "unknown"
    info.write_text("processor : 0\nflags\t\t: fpu avx512f amx_bf16 avx512_bf16\nprocessor : 1\nflags : fpu\n")
    assert bf16_instructions(info) == "amx_bf16, avx512_bf16"
    info.write_text("processor : 0\nFeatures\t: fp asimd bf16\n")
    assert bf16_instructions(info) == "bf16"
    info.write_text("processor : 0\nFeatures\t: fp asimd\n")
    assert bf16_instructions(info) == "none"
    info.write_text("processor : 0\n")
    assert bf16_instructions(info) == "unknown"


def test_doctor_reports_a_failing_step(cli, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: 1 / 0)
    result = cli("doctor", "--json")
    assert result.code == 1
    assert (
        json.loads(result.out)["problems"][0] == "cpu: a distillation step fails: ZeroDivisionError: division by zero"
    )


def test_a_dry_run_writes_nothing(cli, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = cli("train", recipe_file, "--dry-run")
    assert result.code == 0 and sorted(tmp_path.rglob("*")) == before
    for text in ("test_resnet <- test_vit", "teacher weights", "classes", "one step", "memory", "time"):
        assert text in result.out


def test_train_evaluate_export(cli, recipe_file, image_folder, tmp_path):
    folder = tmp_path / "run"
    result = cli("train", recipe_file, "--out", folder, "train.ema=0.9", "augment.mixup=0.2", "losses.kd.temperature=2")
    assert result.code == 0 and result.err == ""
    summary = json.loads((folder / "summary.json").read_text())
    assert result.out.splitlines()[-1].startswith(f"top-1 {summary['top1']:.2f} %")
    assert summary["epochs"] == 2 and summary["steps"] == 6 and summary["reload_difference"] < 1e-5

    assert load_recipe(str(folder / "recipe.yaml")).losses["kd"]["temperature"] == 2.0
    events = read_log(folder)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [e["epoch"] for e in events if e["event"] == "validation"] == [1, 2]
    made = json.loads((folder / "provenance.json").read_text())
    assert made["torch"] == torch.__version__ and set(made["weights"]) == {"student", "teacher"}
    card = json.loads((folder / "student.json").read_text())
    assert card["classes"] == ["ant", "bee", "cat"] and card["top1"] == summary["top1"]
    student = timm.create_model(card["model"], **card["kwargs"])
    assert load_file(folder / "student.safetensors").keys() == student.state_dict().keys()
    assert "<svg" in (folder / "report.html").read_text()

    evaluated = json.loads(cli("evaluate", folder, "--data", image_folder / "val", "--json").out)
    assert evaluated["images"] == 12 and evaluated["top1"] == summary["top1"]
    assert evaluated["loss"] == pytest.approx([e["loss"] for e in events if e["event"] == "validation"][-1])
    assert f"top-1 {summary['top1']:.2f} %" in cli("evaluate", folder, "--data", image_folder / "val").out

    first = load_file(folder / "student.safetensors")
    (folder / "student.safetensors").unlink()
    assert cli("export", folder).code == 0
    again = load_file(folder / "student.safetensors")
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    assert json.loads((folder / "student.json").read_text()) | {"sha256": card["sha256"]} == card
    assert cli("export", folder, "--checkpoint", "best").code == 0
    assert json.loads((folder / "student.json").read_text())["top1"] == summary["best_top1"]


def test_shortcuts(cli, tiny_recipe, image_folder, tmp_path):
    tiny_recipe["data"] = {"train": "nowhere", "image_size": 48, "workers": 0}
    tiny_recipe["train"]["epochs"] = 1
    recipe, out = tmp_path / "shortcuts.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(tiny_recipe))
    result = cli("train", recipe, "--data", image_folder, "--student", "test_efficientnet", "--out", out,
                 "--teacher", "test_vit2", "teacher.weights=random", "teacher.kwargs={depth: 4}")  # fmt: skip
    assert result.code == 0, result.err
    config = load_recipe(str(out / "recipe.yaml"))
    assert (config.student.model, config.teacher.model, config.teacher.weights) == (
        "test_efficientnet", "test_vit2", "random",
    )  # fmt: skip
    assert (config.data.train, config.data.val) == (str(image_folder / "train"), str(image_folder / "val"))


@pytest.mark.parametrize(
    "name, val", [("val", True), ("Valid", True), ("dev", True), ("test", False), ("holdout", False)]
)
def test_data_shortcut_finds_the_validation_images(image_folder, name, val):
    (image_folder / "val").rename(image_folder / name)
    args = parse(["train", "demo", "--data", str(image_folder)])
    found = f'data.val="{image_folder / name}"' if val else "data.val=null"
    assert recipe_overrides(args)[1] == found


def test_a_teacher_given_by_name_is_pretrained():
    args = parse(["train", "demo", "--teacher", "test_vit"])
    assert "teacher.weights=pretrained" in recipe_overrides(args)


def test_overrides_may_follow_options_and_win_over_shortcuts(cli, recipe_file, tmp_path):
    result = cli("train", recipe_file, "optim.lr=1", "--out", tmp_path / "run", "optim.lr=2", "--dry-run", "optm.lr=3")
    assert result.code == 2 and "optm: unknown. Did you mean `optim`?" in result.err
    result = cli("train", recipe_file, "--uot", tmp_path / "run")
    assert result.code == 2 and "unrecognized arguments: --uot" in result.err
    assert cli("doctor", "a=b").code == 2


def test_a_closed_pipe_and_an_error_in_processes(tmp_path: Path):
    command = f"{launcher.stand_ins() / 'scalekd'} recipes | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    done = launcher.run("-m", "scalekd", "recipes", "show", "dmo")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("scalekd: no recipe `dmo`")


def test_ctrl_c_says_how_to_resume(cli, recipe_file, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train_step", interrupted)
    result = cli("train", recipe_file, "--out", tmp_path / "run")
    assert result.code == 130 and "there is no checkpoint yet" in result.err


@pytest.mark.parametrize(("best", "told"), [(65.0, False), (70.0, True)])
def test_better_weights_than_the_exported_ones_are_told(cli, monkeypatch, tmp_path, best, told):
    summary = {
        "top1": 65.0,
        "best_top1": best,
        "best_by": "top1",
        "figure": "top-1",
        "exported_step": 9,
        "best_step": 8,
    }
    result = Result(tmp_path, 65.0, {}, tmp_path / "student.safetensors", tmp_path / "report.html", summary)
    monkeypatch.setattr(api, "train", lambda *_, **__: result)
    shown = cli("train", "own-data")
    assert shown.code == 0 and "top-1 65.00 %" in shown.out
    assert ("--checkpoint best` exports the best weights instead" in shown.out) == told
