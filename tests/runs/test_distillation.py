"""`execute`: options that a run cannot use are rejected before anything is built."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from whole_runs import CPU, changed

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.runs import distillation
from scalekd.runs.assistants import train_chain


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("a run was built")

    monkeypatch.setattr(distillation, "build", fail)
    monkeypatch.setattr("scalekd.runs.assistants.build", fail)


def with_two_teachers(recipe: dict[str, Any]) -> dict[str, Any]:
    teachers = dict.fromkeys(("a", "b"), recipe["teacher"])
    return changed(recipe, losses={"ce": {}, "kd": {}}, teacher=None) | {"teachers": teachers}


def refused(recipe: dict[str, Any], folder: Path) -> str:
    config, console = check_config(recipe, "test"), Console(file=io.StringIO())
    with pytest.raises(UserError) as caught:
        train_chain(config, folder / "run", CPU, console, teacher_outputs=folder / "outputs")
    assert list(folder.glob("run*")) == [] and not (folder / "outputs").exists()
    return str(caught.value)


def test_teacher_outputs_of_several_teachers(tiny_recipe, tmp_path, nothing_is_built):
    assert "`teacher_outputs` supports one teacher only" in refused(with_two_teachers(tiny_recipe), tmp_path)


def test_teacher_outputs_in_several_processes(tiny_recipe, tmp_path, nothing_is_built, monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    assert "`teacher_outputs` supports one process only" in refused(tiny_recipe, tmp_path)


def test_teacher_outputs_in_several_processes_with_an_assistant(tiny_recipe, tmp_path, nothing_is_built, monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    recipe = tiny_recipe | {"assistant": {"student": {"model": "test_convnext"}}}
    assert "`teacher_outputs` supports one process only" in refused(recipe, tmp_path)


def test_teacher_outputs_of_several_teachers_in_a_dry_run(tiny_recipe, tmp_path, nothing_is_built, cli):
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(with_two_teachers(tiny_recipe)))
    result = cli("train", file, "--dry-run", "--teacher-outputs", tmp_path / "outputs")
    assert result.code == 2 and "`--teacher-outputs` supports one teacher only" in result.err
