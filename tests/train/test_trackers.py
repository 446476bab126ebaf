"""Trackers: the real TensorBoard read back; W&B, MLflow and trackio through fake modules that record calls."""

from __future__ import annotations

import io
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import changed, events

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.runs.distillation import execute
from scalekd.train import engine, trackers
from scalekd.train.log import RunLog
from scalekd.train.trackers import Opened, Tracker, check_trackers, open_trackers

OTHERS = ["wandb", "mlflow", "trackio"]


@pytest.fixture
def recipe(light_recipe: dict[str, Any]) -> dict[str, Any]:
    return changed(light_recipe, losses={"ce": {}}, teacher=None)


def run(recipe: dict[str, Any], folder: Path, **changes: Any) -> str:
    """The screen output of a run."""
    out = io.StringIO()
    config = check_config(recipe | changes, "test")
    execute(config, folder, torch.device("cpu"), Console(file=out, width=500), check=False)
    return out.getvalue()


class Killed(BaseException):
    """Passes through every `except Exception`."""


def run_killed_at(step: int, recipe: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any):
    whole = engine.train_step

    def failing(model, batches, run, at, *rest):
        if at == step:
            raise Killed
        return whole(model, batches, run, at, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", failing)
        with pytest.raises(Killed):
            run(recipe, folder, **changes)


# ---------------------------------------------------------------- TensorBoard


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.mark.parametrize("killed", [None, 2, 5])  # before and after the first checkpoint, which step 3 has
def test_tensorboard_holds_what_the_log_holds_and_no_step_twice(recipe, tmp_path, monkeypatch, killed):
    if killed:
        run_killed_at(killed, recipe, tmp_path / "run", monkeypatch)
    run(recipe, tmp_path / "run")
    held = tensorboard(tmp_path / "run")
    steps, validations = events(tmp_path / "run", "step"), events(tmp_path / "run", "validation")
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
    expected = {f"loss/{name}": [(e["step"], e["losses"][name]) for e in steps] for name in ("ce", "total")}
    for name in ("lr", "images_per_s", "data_share", "teacher_share"):
        expected[name] = [(e["step"], e[name]) for e in steps]
    for name in ("top1", "top5", "loss"):
        expected[f"val/{name}"] = [(e["step"], e[name]) for e in validations]
    assert expected.keys() <= held.keys()
    for tag, points in expected.items():
        assert [s for s, _ in held[tag]] == [s for s, _ in points], tag
        assert [v for _, v in held[tag]] == pytest.approx([v for _, v in points], rel=1e-6), tag


def test_no_tracker(recipe, tmp_path):
    run(recipe, tmp_path / "run", track=[])
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "trackers.json").exists()


def test_another_choice_of_trackers_goes_on_with_the_run(recipe, tmp_path, monkeypatch):
    run_killed_at(5, recipe, tmp_path / "run", monkeypatch, track=[])
    assert "resumes from step 3" in run(recipe, tmp_path / "run", track=["tensorboard"])
    assert [s for s, _ in tensorboard(tmp_path / "run")["lr"]] == [4, 5, 6]


def test_the_first_process_alone_opens_them(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    RunLog(tmp_path, open_trackers=lambda *args: opened.append(args) or []).start(0, 1)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    assert opened == []
    log = RunLog(tmp_path, Console(file=io.StringIO()), open_trackers=lambda *args: opened.append(args) or [])
    log.start(0, 1)
    log.close()
    assert [step for step, _ in opened] == [0]


# ---------------------------------------------------------------- the others, with fake modules that record calls


def module(name: str, **content: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = types.SimpleNamespace(origin="a file")  # type: ignore[assignment]
    made.__dict__.update(content)
    return made


class FakeRun:
    def __init__(self, calls: list, **options: Any):
        self.calls, self.id = calls, options.get("id")
        calls.append(("init", options))

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("axis", name, step_metric))

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("log", values.get("step", step), values))

    def finish(self) -> None:
        self.calls.append(("finish",))


class FakeClient:
    """Of MLflow, with its store in the class."""

    calls: list = []  # noqa: RUF012 - made anew by the fixture

    def __init__(self, tracking_uri: str):
        self.calls.append(("open", tracking_uri))

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.calls.append(("experiment", name, artifact_location))
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.calls.append(("init", {"run_name": run_name, "experiment": experiment}))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    def update_run(self, run_id: str, status: str) -> None:
        self.calls.append(("init", {"id": run_id, "status": status}))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert run_id == "abc" and len(params) <= 100
        for key, value in params:
            self.calls.append(("param", key, value))
        for key, value, _, step in metrics:
            self.calls.append(("log", step, {key: value}))

    def set_terminated(self, run_id: str) -> None:
        self.calls.append(("finish",))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """Tracker -> the calls that its module got."""
    noted: dict[str, list] = {name: [] for name in OTHERS}
    for key in (*trackers.QUIET, "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(key, "")  # so that what the code sets is taken back
        monkeypatch.delenv(key)
    FakeClient.calls = noted["mlflow"]
    entities = module("mlflow.entities", Metric=lambda *a: a, Param=lambda *a: a)
    fakes = [
        module("wandb", init=lambda **o: FakeRun(noted["wandb"], **o), Settings=lambda **o: o),
        module("trackio", init=lambda **o: FakeRun(noted["trackio"], **o)),
        module("mlflow", MlflowClient=FakeClient, entities=entities),
        entities,
    ]
    for fake in fakes:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return noted


def of_kind(calls: list, kind: str) -> list:
    return [call[1:] for call in calls if call[0] == kind]


@pytest.mark.parametrize("name", OTHERS)
def test_a_resumed_run_is_one_run_in_the_tracker(recipe, tmp_path, monkeypatch, calls, name):
    folder = tmp_path / "run"
    run_killed_at(5, recipe, folder, monkeypatch, track=[name])
    run(recipe, folder, track=[name])
    steps = [step for step, values in of_kind(calls[name], "log") if "loss/ce" in values]
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6]
    validated = {step: v["val/top1"] for step, v in of_kind(calls[name], "log") if "val/top1" in v}
    assert validated == {e["step"]: e["top1"] for e in events(folder, "validation")}
    assert of_kind(calls[name], "finish") == [(), ()]
    assert not (folder / "tensorboard").exists()
    (first,), (second,) = of_kind(calls[name], "init")
    if name == "wandb":
        assert first["mode"] == "offline" and first["dir"] == str(folder) and first["resume"] == "allow"
        assert first["config"]["optim"]["lr"] == 1e-3 and first["name"] == "tiny"
        assert first["id"] == second["id"] and len(first["id"]) == 16
        assert ("*", "step") in of_kind(calls[name], "axis")  # otherwise W&B rejects repeated steps
    if name == "trackio":
        assert first["name"] == second["name"] != "tiny" and first["resume"] == "allow"
    if name == "mlflow":
        assert first["run_name"] == "tiny" and second == {"id": "abc", "status": "RUNNING"}
        assert of_kind(calls[name], "open")[0] == (f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}",)
        assert ("optim.lr", "0.001") in of_kind(calls[name], "param")


def test_runs_in_different_folders_are_different_runs(recipe, tmp_path, calls):
    for folder in ("a", "b"):
        run(recipe, tmp_path / folder, track=["wandb", "trackio"])
    for name, key in (("wandb", "id"), ("trackio", "name")):
        (a,), (b,) = of_kind(calls[name], "init")
        assert a[key] != b[key]


def test_what_the_environment_asks_for(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    open_trackers(["wandb", "mlflow"], tmp_path, {}, "run")
    (wandb,) = of_kind(calls["wandb"], "init")[0]
    assert (wandb["mode"], wandb["project"]) == ("online", "mine")
    assert of_kind(calls["mlflow"], "open") == [("http://server",)]
    assert of_kind(calls["mlflow"], "experiment") == [("ours", None)]
    assert not (tmp_path / "mlflow").exists()


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("name", OTHERS)
def test_a_missing_tracker_is_reported_before_anything_is_written(recipe, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it could not be found
    with pytest.raises(UserError, match=rf"track: {name} cannot be imported .*\n.*pip install 'scalekd\[{name}\]'"):
        run(recipe, tmp_path / "run", track=[name])
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    """W&B makes a folder `wandb` where it runs, and Python imports it."""
    if "wandb" in sys.modules:
        monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        UserError, match=r"Python found only a folder of that name.\nInstall it with pip install 'scalekd\[wandb\]'"
    ):
        check_trackers(["wandb"])
    sys.modules.pop("wandb", None)


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_failure_is_reported_once_and_the_run_continues(recipe, tmp_path, monkeypatch, calls, name, where):
    def failing(*args, **options):
        raise RuntimeError("no network.\nmore")

    if name == "mlflow":
        method = {"init": "create_run", "log": "log_batch", "finish": "set_terminated"}[where]
        monkeypatch.setattr(FakeClient, method, failing)
    elif where == "init":
        monkeypatch.setattr(sys.modules[name], "init", failing)
    else:
        monkeypatch.setattr(FakeRun, where, failing)
    output = run(recipe, tmp_path / "run", track=["tensorboard", name])
    assert output.count(f"{name} failed and is switched off: no network. The run continues") == 1
    assert "switched off" not in output.replace(f"{name} failed and is switched off", "")
    assert (tmp_path / "run" / "summary.json").is_file()
    assert [s for s, _ in tensorboard(tmp_path / "run")["loss/ce"]] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_does_not_close_is_abandoned(monkeypatch):
    monkeypatch.setattr(trackers, "CLOSING", 0.05)
    lines, end = [], threading.Event()
    Tracker("wandb", Opened(lambda step, values: None, lambda: end.wait() and None), lines.append).close()
    end.set()
    assert len(lines) == 1 and "wandb did not send everything" in lines[0]


def test_tensorboard_on_a_path_that_it_cannot_use(recipe, tmp_path, monkeypatch):
    run_killed_at(5, recipe, tmp_path / "run", monkeypatch, track=[])
    (tmp_path / "run" / "tensorboard").write_text("a file in its way")
    output = run(recipe, tmp_path / "run")
    assert output.count("tensorboard failed and is switched off") == 1
    assert (tmp_path / "run" / "summary.json").is_file()


def test_unknown_names(recipe):
    with pytest.raises(UserError, match=r"track\.1: .*'tensorboard', 'wandb', 'mlflow' or 'trackio'"):
        check_config(recipe | {"track": ["wandb", "tensorbord"]}, "test")
