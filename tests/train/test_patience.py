"""`train.patience`: the run ends after so many validations without a better one, also if it was stopped in between."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from whole_runs import CPU, Interrupted, assert_same, changed, events, final_state, start

from scalekd.config.recipe import check_config
from scalekd.distill.run import DistillationRun
from scalekd.runs.distillation import execute
from scalekd.train import checkpoint
from scalekd.train.log import RunLog

SCORES = [40.0, 60.0, 50.0, 60.0, 55.0, 70.0]  # by validation: an equal one is not better, and the last is not reached
STEPS = 3  # of an epoch


@pytest.fixture
def recipe(light_recipe) -> dict[str, Any]:
    return changed(light_recipe, train={"epochs": 6, "patience": 3, "save_minutes": 0}, schedule={"name": "cosine"})


@pytest.fixture
def scored(monkeypatch):
    """Sets the scores of the validations from a given one on."""

    def given(first: int = 0) -> Iterator[float]:
        scores = iter(SCORES[first:])
        result = {"top5": 90.0, "loss": 1.0, "images": 12}
        monkeypatch.setattr(DistillationRun, "validate", lambda *_: result | {"top1": next(scores)})
        return scores

    return given


def test_the_run_ends_and_says_so(recipe, scored, tmp_path):
    left = scored()
    screen, folder = Console(file=io.StringIO(), width=200), tmp_path / "run"
    summary = execute(check_config(recipe, "test"), folder, CPU, screen, check=False, look=False)
    assert list(left) == [70.0]
    why = "no better top-1 in 3 validations since step 6; the run had 18 steps"
    assert (summary["steps"], summary["best_step"], summary["ended_early"]) == (15, 6, why)
    assert (summary["top1"], summary["best_top1"], summary["epochs"]) == (55.0, 60.0, 5)
    assert f"tiny ends after step 15 (train.patience): {why}" in screen.file.getvalue()
    assert [(e["step"], e["reason"]) for e in events(folder, "ended_early")] == [(15, why)]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert f"Ended early (train.patience): {why}." in (folder / "report.html").read_text()
    assert checkpoint.load(folder / "best.pt")["step"] == 6


def test_the_schedule_is_that_of_the_whole_run(recipe, scored, tmp_path):
    scored()
    start(recipe, tmp_path / "early")
    scored()
    start(changed(recipe, train={"patience": None}), tmp_path / "whole")
    rates = [[(e["step"], e["lr"]) for e in events(tmp_path / name, "step")] for name in ("early", "whole")]
    assert rates[0] == rates[1][: len(rates[0])] and len(rates[0]) == 15 and rates[0][-1][1] > 0


@pytest.mark.parametrize("stops", [(1, 7), (10, 14)])
def test_a_stopped_run_ends_where_the_other_one_does(recipe, scored, tmp_path, stops):
    scored()
    start(recipe, tmp_path / "whole")
    for stop in stops:
        scored(_validated(tmp_path / "parts"))
        with pytest.raises(Interrupted):
            start(recipe, tmp_path / "parts", stop)
    scored(_validated(tmp_path / "parts"))
    start(recipe, tmp_path / "parts")
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    assert final_state(tmp_path / "parts")["progress"]["step"] == 15


def test_a_stop_between_the_last_validation_and_the_end(recipe, scored, tmp_path, monkeypatch):
    scored()
    start(recipe, tmp_path / "whole")
    event = RunLog.event

    def interrupted(log: RunLog, kind: str, **values: Any) -> None:
        if kind == "ended_early":
            raise Interrupted
        event(log, kind, **values)

    left = scored()
    monkeypatch.setattr(RunLog, "event", interrupted)
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "parts")
    monkeypatch.setattr(RunLog, "event", event)
    assert list(left) == [70.0]  # a resumed run validates no more: there are no scores left
    start(recipe, tmp_path / "parts")
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    assert len(events(tmp_path / "parts", "finished")) == len(events(tmp_path / "parts", "ended_early")) == 1


def _validated(folder: Path) -> int:
    return len(checkpoint.load(folder / "last.pt")["progress"]["history"]) if (folder / "last.pt").exists() else 0
