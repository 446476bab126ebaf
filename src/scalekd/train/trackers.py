"""Where a run's scalars go beside `log.jsonl`: TensorBoard, W&B, MLflow, trackio. None of them can stop a run.

The log is the truth. A tracker that fails, for want of a network or of space, is told once and left out from there.
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
CLOSING = (
    60.0  # seconds to send what is left; a tracker without a network must not keep the student from being exported
)

# What these libraries would send, ask or print unasked; whoever has set one of these keeps it.
QUIET = {
    "WANDB_SILENT": "true",  # prints nothing, and never asks for a login
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Opened(NamedTuple):
    write: Callable[[int, dict[str, float]], None]
    finish: Callable[[], None]
    id: str | None = None  # what finds the same run again


class Tracker:
    """`scalars` and `close` never raise: after the first failure they do nothing."""

    def __init__(self, name: str, opened: Opened, say: Callable[[str], None]):
        self.name, self.opened, self.say = name, opened, say
        self.failed = False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.failed:
            return
        try:
            self.opened.write(step, values)
        except Exception as error:  # whatever it is, it is not worth a run
            self.failed = True
            _tell(self.name, error, self.say)

    def close(self) -> None:
        """Waits for `CLOSING` seconds at most."""
        thread = threading.Thread(target=self._finish, daemon=True)
        thread.start()
        thread.join(CLOSING)
        if thread.is_alive():
            self.say(
                f"{self.name} has not sent everything within {CLOSING:.0f} s, and is left; log.jsonl has all of it"
            )

    def _finish(self) -> None:
        try:
            self.opened.finish()
        except Exception as error:
            if not self.failed:
                _tell(self.name, error, self.say)


def _tell(name: str, error: Exception, say: Callable[[str], None]) -> None:
    reason = printable(first_line(error)).rstrip(".")
    say(f"{name} is left out from here: {reason}. The run goes on; log.jsonl has everything")


def check_trackers(names: Iterable[str]) -> None:
    """Imports what is named. Raises `UserError` for what is not installed."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    for name in names:
        try:
            module = importlib.import_module(MODULES[name])
        except ImportError as error:
            raise UserError(
                f"track: {name} cannot be imported ({first_line(error)}).\n"
                f"Install it, pip install 'scalekd[{name}]', or take it out of track."
            ) from None
        if module.__spec__ is None or module.__spec__.origin is None:  # W&B's own folder in the working directory
            raise UserError(
                f"track: {name} is not installed; a folder of that name lies here.\nInstall it: pip install 'scalekd[{name}]'"
            )


def open_trackers(
    names: Iterable[str],
    folder: Path,
    config: dict[str, Any],
    run_name: str,
    step: int = 0,
    say: Callable[[str], None] = print,
) -> list[Tracker]:
    """Opens each tracker, or the run that it has for `folder` already. One that fails is told and left out.

    step: the last one done; what a tracker holds of later steps is dropped where it can drop something.
    """
    check_trackers(names)
    file = folder / "trackers.json"
    known = _ids(file)
    trackers, found = [], dict(known)
    for name in dict.fromkeys(names):
        try:
            opened = OPEN[name](folder, config, run_name, step, known.get(name))
        except Exception as error:
            _tell(name, error, say)
            continue
        trackers.append(Tracker(name, opened, say))
        if opened.id:
            found[name] = opened.id
    if found != known:
        write_text(file, json.dumps(found, indent=2) + "\n")
    return trackers


def _ids(file: Path) -> dict[str, str]:
    try:
        ids = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in ids.items()} if isinstance(ids, dict) else {}


# ---------------------------------------------------------------- one function per tracker


def _tensorboard(folder: Path, config: dict[str, Any], run_name: str, step: int, known: str | None) -> Opened:
    """Event files written here, not by `SummaryWriter`: its thread would end a full disk in a trace."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import summary

    logs = folder / "tensorboard"
    logs.mkdir(exist_ok=True)
    again = any(logs.iterdir())
    file = open(logs / f"events.out.tfevents.{time.time_ns()}", "xb", buffering=0)  # noqa: SIM115 - until close()
    records = RecordWriter(file)

    def add(**content: Any) -> None:
        records.write(Event(wall_time=time.time(), **content).SerializeToString())

    add(file_version="brain.Event:2")
    if again:  # what older files hold from this step on is not shown
        add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
    else:
        add(summary=summary.text("config", f"```\n{json.dumps(config, indent=2)}\n```"))

    def write(at: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            add(step=at, summary=summary.scalar(name, value))

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
        mode=os.environ.get("WANDB_MODE", "offline"),  # nothing leaves the machine unasked; `wandb sync` sends it later
        settings=wandb.Settings(init_timeout=30, console="off"),
    )
    # W&B refuses a step below the last it has seen, as after a resume; with an axis of our own it does not
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Opened(lambda at, values: run.log(values | {"step": at}), run.finish, run.id)


def _mlflow(folder: Path, config: dict[str, Any], run_name: str, step: int, known: str | None) -> Opened:
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    place = (folder / "mlflow").resolve()
    if not uri:
        place.mkdir(exist_ok=True)
        uri = f"sqlite:///{place / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    if known:
        client.update_run(known, status="RUNNING")
        run_id = known
    else:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(title)
        artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (place / "artifacts").as_uri()
        of = experiment.experiment_id if experiment else client.create_experiment(title, artifact_location=artifacts)
        run_id = client.create_run(of, run_name=run_name).info.run_id
        params = [Param(key, value[:500]) for key, value in _flat(config)]
        for first in range(0, len(params), 100):  # its most at once
            client.log_batch(run_id, params=params[first : first + 100])

    def write(at: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        plain = {name.replace("@", "/"): value for name, value in values.items()}  # it takes no @ in a name
        client.log_batch(run_id, metrics=[Metric(name, value, now, at) for name, value in plain.items()])

    return Opened(write, lambda: client.set_terminated(run_id), run_id)


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """{"optim": {"lr": 0.1}} -> [("optim.lr", "0.1")]."""
    flat = []
    for key, value in values.items():
        flat += _flat(value, f"{before}{key}.") if isinstance(value, dict) else [(f"{before}{key}", str(value))]
    return flat


def _trackio(folder: Path, config: dict[str, Any], run_name: str, step: int, known: str | None) -> Opened:
    import trackio

    name = known or f"{run_name}-{secrets.token_hex(3)}"  # it finds runs by name, in a store that runs share
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
        with contextlib.suppress(AttributeError):  # it would say at the end that it finishes once more
            atexit.unregister(trackio._cleanup_current_run)

    return Opened(lambda at, values: run.log(values, step=at), finish, name)


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
