"""Sends a run's scalars to TensorBoard, W&B, MLflow or trackio, in addition to `log.jsonl`.

A tracker cannot stop a run: if it fails, for example without a network or disk space, a message is printed and the
tracker is switched off.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import write_text
from scalekd.common.text import printable

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
PROJECT = "scalekd"
CLOSING = 60.0  # seconds for a tracker to finish; without a network it must not delay the export of the student

# Environment variables that keep these libraries from printing, prompting and sending telemetry; the user's own
# values take precedence.
QUIET = {
    "WANDB_SILENT": "true",  # no output, no login prompt
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Opened(NamedTuple):
    write: Callable[[int, dict[str, float]], None]
    finish: Callable[[], None]
    id: str | None = None  # identifies the run on resume


class Tracker:
    """An open tracker. `scalars` and `close` never raise; after the first failure they do nothing."""

    def __init__(self, name: str, opened: Opened, say: Callable[[str], None]):
        self.name, self.opened, self.say = name, opened, say
        self.failed = False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.failed:
            return
        try:
            self.opened.write(step, values)
        except Exception as error:  # no tracker error is worth a run
            self.failed = True
            _report_failure(self.name, error, self.say)

    def close(self) -> None:
        """Waits at most `CLOSING` seconds."""
        thread = threading.Thread(target=self._finish, daemon=True)
        thread.start()
        thread.join(CLOSING)
        if thread.is_alive():
            self.say(f"{self.name} did not send everything within {CLOSING:.0f} s; log.jsonl has all values")

    def _finish(self) -> None:
        try:
            self.opened.finish()
        except Exception as error:
            if not self.failed:
                _report_failure(self.name, error, self.say)


def _report_failure(name: str, error: Exception, say: Callable[[str], None]) -> None:
    reason = printable(first_line(error)).rstrip(".")
    say(f"{name} failed and is switched off: {reason}. The run continues; log.jsonl has all values")


def check_trackers(names: Iterable[str]) -> None:
    """Imports the trackers. Raises `UserError` if one is not installed."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    for name in names:
        try:
            module = importlib.import_module(MODULES[name])
        except ImportError as error:
            raise UserError(
                f"track: {name} cannot be imported ({first_line(error)}).\n"
                f"Install it with pip install 'scalekd[{name}]', or remove it from track."
            ) from None
        if module.__spec__ is None or module.__spec__.origin is None:  # a folder, such as W&B's
            raise UserError(
                f"track: {name} is not installed; Python found only a folder of that name.\n"
                f"Install it with pip install 'scalekd[{name}]', or remove it from track."
            )


def open_trackers(
    names: Iterable[str],
    folder: Path,
    config: dict[str, Any],
    run_name: str,
    step: int = 0,
    say: Callable[[str], None] = print,
) -> list[Tracker]:
    """Opens each tracker, or reopens its run for `folder`. If one fails, a message is printed and it is skipped.

    step: the last step done. Trackers that can do so drop the values of later steps.
    """
    check_trackers(names)
    file = folder / "trackers.json"
    known = _ids(file)
    trackers, ids = [], dict(known)
    for name in dict.fromkeys(names):
        try:
            opened = OPEN[name](folder, config, run_name, step, known.get(name))
        except Exception as error:
            _report_failure(name, error, say)
            continue
        trackers.append(Tracker(name, opened, say))
        if opened.id:
            ids[name] = opened.id
    if ids != known:
        write_text(file, json.dumps(ids, indent=2) + "\n")
    return trackers


def _ids(file: Path) -> dict[str, str]:
    try:
        ids = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in ids.items()} if isinstance(ids, dict) else {}


# ---------------------------------------------------------------- one function per tracker


def _tensorboard(folder: Path, config: dict[str, Any], run_name: str, step: int, known: str | None) -> Opened:
    """Writes event files directly: `SummaryWriter` writes in a thread, where a full disk ends in a traceback."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import summary

    logs = folder / "tensorboard"
    logs.mkdir(exist_ok=True)
    resumed = any(logs.iterdir())
    file = open(logs / f"events.out.tfevents.{time.time_ns()}", "xb", buffering=0)  # noqa: SIM115 - until close()
    records = RecordWriter(file)

    def add(**content: Any) -> None:
        records.write(Event(wall_time=time.time(), **content).SerializeToString())

    add(file_version="brain.Event:2")
    if resumed:  # TensorBoard hides the values that older files hold for later steps
        add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
    else:
        add(summary=summary.text("config", f"```\n{json.dumps(config, indent=2)}\n```"))

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            add(step=step, summary=summary.scalar(name, value))

    return Opened(write, file.close)


def _wandb(folder: Path, config: dict[str, Any], run_name: str, step: int, known: str | None) -> Opened:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_name,
        id=known or secrets.token_hex(8),
        resume="allow",
        config=config,
        dir=str(folder),
        mode=os.environ.get("WANDB_MODE", "offline"),  # by default nothing is sent; `wandb sync` uploads it later
        settings=wandb.Settings(init_timeout=30, console="off"),
    )
    # W&B rejects steps that go back, as after a resume; it accepts them on an axis defined here
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Opened(lambda step, values: run.log(values | {"step": step}), run.finish, run.id)


def _mlflow(folder: Path, config: dict[str, Any], run_name: str, step: int, known: str | None) -> Opened:
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    store = (folder / "mlflow").resolve()
    if not uri:
        store.mkdir(exist_ok=True)
        uri = f"sqlite:///{store / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    if known:
        client.update_run(known, status="RUNNING")
        run_id = known
    else:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(title)
        artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (store / "artifacts").as_uri()
        experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(title, artifact_location=artifacts)
        )
        run_id = client.create_run(experiment_id, run_name=run_name).info.run_id
        params = [Param(key, value[:500]) for key, value in _flat(config)]
        for first in range(0, len(params), 100):  # MLflow's maximum per call
            client.log_batch(run_id, params=params[first : first + 100])

    def write(step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        plain = {name.replace("@", "/"): value for name, value in values.items()}  # MLflow allows no @ in a name
        client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in plain.items()])

    return Opened(write, lambda: client.set_terminated(run_id), run_id)


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """{"optim": {"lr": 0.1}} -> [("optim.lr", "0.1")]."""
    flat = []
    for key, value in values.items():
        flat += _flat(value, f"{before}{key}.") if isinstance(value, dict) else [(f"{before}{key}", str(value))]
    return flat


def _trackio(folder: Path, config: dict[str, Any], run_name: str, step: int, known: str | None) -> Opened:
    import trackio

    name = known or f"{run_name}-{secrets.token_hex(3)}"  # trackio identifies runs by name, in one store for all
    with contextlib.redirect_stdout(io.StringIO()):
        run = trackio.init(
            project=PROJECT,
            name=name,
            config=config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def finish() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            run.finish()
        with contextlib.suppress(AttributeError):  # otherwise trackio prints at exit that it finishes the run again
            atexit.unregister(trackio._cleanup_current_run)

    return Opened(lambda step, values: run.log(values, step=step), finish, name)


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
