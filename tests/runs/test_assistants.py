"""A student as the next teacher: assistants."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from whole_runs import changed

from scalekd.common.errors import UserError
from scalekd.common.sections import to_yaml
from scalekd.config.recipe import assistant_of, check_config, load_recipe
from scalekd.models.weights.match import sha256_of
from scalekd.runs.assistants import assistant_finished, rehearse
from scalekd.runs.distillation import execute
from scalekd.runs.heads import with_heads


@pytest.fixture
def recipe(light_recipe: dict[str, Any]) -> dict[str, Any]:
    assistant = {"student": {"model": "test_convnext"}, "train": {"epochs": 1}, "losses": {"kd": {"temperature": 4.0}}}
    return light_recipe | {"assistant": assistant}


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "r.yaml"


def test_an_assistants_recipe_is_the_recipe_with_what_it_has_different(recipe: dict[str, Any]) -> None:
    config = check_config(recipe, "test")
    assistant = assistant_of(config)
    assert (assistant.name, assistant.student.model, assistant.train.epochs) == ("tiny-assistant", "test_convnext", 1)
    assert assistant.losses == {"kd": {"temperature": 4.0}} and assistant.assistant is None
    same = {"data", "teacher", "optim", "schedule", "augment", "seed"}
    assert assistant.model_dump(include=same) == config.model_dump(include=same)


def test_the_assistant_is_trained_first_and_teaches(file: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    result = cli("train", file, "--out", tmp_path / "run", "--no-preflight")
    assert result.code == 0, result.err
    first = load_recipe(str(tmp_path / "run-assistant" / "recipe.yaml"))
    last = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert (first.teacher and first.teacher.model, first.student.model) == ("test_vit", "test_convnext")
    assert (last.teacher and last.teacher.model, last.student.model) == ("test_convnext", "test_resnet")
    weights = json.loads((tmp_path / "run" / "provenance.json").read_text())["weights"]["teacher"]
    assert weights["sha256"] == sha256_of(tmp_path / "run-assistant" / "student.safetensors")


def test_finished_runs_are_not_repeated(file: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    assert cli("train", file, "--out", tmp_path / "run", "--no-preflight").code == 0
    before = (tmp_path / "run-assistant" / "log.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run")
    result = cli("train", file, "--out", tmp_path / "run", "--no-preflight")
    assert result.code == 0 and "run-assistant is finished and teaches tiny" in " ".join(result.out.split())
    assert (tmp_path / "run-assistant" / "log.jsonl").read_bytes() == before
    again = cli("train", file, "--out", tmp_path / "run", "--no-preflight")
    assert again.code == 2 and "holds this run, and it is finished" in again.err
    shutil.rmtree(tmp_path / "run")
    other = cli("train", file, "--out", tmp_path / "run", "assistant.train.epochs=2")
    assert other.code == 2 and "holds the run of another assistant" in other.err


def test_an_assistant_may_have_one_itself(recipe: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]) -> None:
    recipe["assistant"]["assistant"] = {"student": {"model": "test_vit2"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed(recipe, train={"epochs": 1})))
    for _ in range(2):
        result = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--no-preflight")
        assert result.code == 0, result.err
        taught = [load_recipe(str(tmp_path / name / "recipe.yaml")) for name in ("run-assistant", "run")]
        assert [c.teacher and c.teacher.model for c in taught] == ["test_vit2", "test_convnext"]
        shutil.rmtree(tmp_path / "run")


def test_what_does_not_fit_is_told_before_the_assistant_is_trained(
    recipe: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    recipe = changed(recipe, losses={"ce": {}, "dfm": {}})
    recipe["assistant"] = {"student": {"model": "test_convnext"}, "losses": {"ce": {}, "kd": {}}}  # a 1x1 map at 48 px
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    result = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--no-preflight")
    assert result.code == 2 and "the student does not fit its assistant: losses.dfm" in result.err
    assert not (tmp_path / "run-assistant").exists()


def test_an_assistant_without_a_classifier_cannot_teach_logits(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["assistant"] = {"student": {"model": "test_vit2"}, "losses": {"fd": {}}}
    with pytest.raises(UserError, match=r"the student does not fit its assistant: losses.kd"):
        rehearse(check_config(recipe, "test"), torch.device("cpu"))


def test_an_assistant_teaches_from_the_stages_that_its_recipe_cuts(
    recipe: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    recipe = changed(recipe, losses={"ce": {}, "fd": {"stages": [3]}}, train={"epochs": 1})
    vit = {"model": "test_vit", "kwargs": {"depth": 6}, "cuts": [0, 1, 2, 5]}
    recipe["assistant"] = {"student": vit, "losses": {"ce": {}, "kd": {}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--no-preflight").code == 0
    last = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert last.teacher is not None and last.teacher.cuts == (0, 1, 2, 5)


def test_all_mistakes_of_an_assistant_are_told_with_the_recipes(recipe: dict[str, Any]) -> None:
    recipe["assistant"] = {"student": {"model": "test_vitt"}, "train": {"epoch": 3}}
    with pytest.raises(UserError) as caught:
        check_config(recipe, "test")
    assert "assistant: student.model: timm has no model `test_vitt`" in str(caught.value)
    assert "assistant: train.epoch: unknown" in str(caught.value)
    with pytest.raises(UserError, match="assistant: needs a teacher to learn from"):
        check_config(recipe | {"teacher": None, "losses": {"ce": {}}}, "test")


def test_a_dry_run_writes_nothing(file: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    result = cli("train", file, "--out", tmp_path / "run", "--dry-run")
    assert result.code == 0 and "test_convnext <- test_vit" in result.out
    assert not list(tmp_path.glob("run*"))


def test_one_run_alone_refuses_a_chain(recipe: dict[str, Any], tmp_path: Path) -> None:
    from rich.console import Console

    with pytest.raises(UserError, match="needs two runs"):
        execute(check_config(recipe, "test"), tmp_path / "run", torch.device("cpu"), Console())


def test_an_assistant_whose_teacher_s_head_was_fitted_is_known_again(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["teacher"]["head"] = "fit"
    config = check_config(recipe, "test")
    recipe_there = to_yaml(with_heads(assistant_of(config), tmp_path))
    assert f"head: {tmp_path / 'head'}" in recipe_there
    (tmp_path / "recipe.yaml").write_text(recipe_there)
    (tmp_path / "summary.json").write_text("{}")
    assert assistant_finished(config, tmp_path, torch.device("cpu"))
