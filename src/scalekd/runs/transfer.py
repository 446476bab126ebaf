"""Trains a detector or segmenter from a recipe into a folder: pre-flight, training, export, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from scalekd.checks.loop_teacher import teacher_checks
from scalekd.checks.model import licence_check, weights_check
from scalekd.checks.step import Screen
from scalekd.common import parallel
from scalekd.common.malloc import keep_freed_memory
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.provenance import made_by
from scalekd.common.stop import StopRequest, current
from scalekd.common.text import counted, say
from scalekd.data.description import tell_data
from scalekd.models.licences import explained
from scalekd.models.weights.trained import Loaded
from scalekd.report.run import write_run_report
from scalekd.train.folder import Outcome, open_folder, run_into
from scalekd.train.hardware import for_device
from scalekd.train.run import check_choice, provenance
from scalekd.train.trackers import check_trackers
from scalekd.transfer.config import Detection, LoopTeacher, Segmentation
from scalekd.transfer.detection import run as detect
from scalekd.transfer.exported_model import export
from scalekd.transfer.segmentation import run as segment
from scalekd.transfer.tasks import architecture


def build(config: Detection | Segmentation, device: torch.device) -> detect.DetectionRun | segment.SegmentationRun:
    """Opens the data and builds model, optimiser and schedule. Raises `UserError`."""
    return detect.build(config, device) if isinstance(config, Detection) else segment.build(config, device)


def train(
    config: Detection | Segmentation,
    folder: Path,
    device: torch.device,
    console: Console,
    *,
    stop: StopRequest | None = None,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Trains into `folder`, or resumes the run in it. Returns its summary, or None for a dry run.

    dry_run: stop after the pre-flight and write nothing.
    Raises `UserError`, and `Stopped` when a signal stopped the run after its checkpoint.
    """
    (stop or current()).begin()
    config = for_device(config, device, folder)
    if not dry_run:
        open_folder(folder, config)
        parallel.wait_for_all()  # all processes check the folder before rank 0 writes into it
    check_trackers(config.track)
    if device.type == "cpu":
        keep_freed_memory()
    remedy = _memory_remedy(config)
    if parallel.rank() == 0:
        say(console, "Opening the data and building the models ...")
    with explain_out_of_memory(device, remedy):
        run = build(config, device)
        check_choice(run)
        preflight(run, console)
    if dry_run:
        return None
    outcome = Outcome(f"{run.task.trained}.json", _card, _finish)
    return run_into(folder, run, outcome, console, title=config.name, remedy=remedy, stop=stop)


def preflight(run: Any, console: Console) -> None:
    """Prints the data, and checks the weights of backbone and teacher and two training steps. Raises `UserError`."""
    tell_data(console, run.described)
    if parallel.rank() == 0:
        for line in run.data_summary():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    config, loaded = run.config, run.loaded["backbone"]
    taught = f" <- {config.teacher.model}" if config.teacher else ""
    screen = Screen(f"{config.backbone.model}{taught}, {architecture(config.model_dump())}", console)
    screen.show([weights_check(config.backbone, loaded, config.seed), *licence_check("backbone", loaded)])
    if config.teacher:
        screen.show(teacher_checks(config.teacher, run.loaded["teacher"], run.model.teacher))
    screen.finish(run)


def _memory_remedy(config: Any) -> str:
    """How to use less memory."""
    train = config.train
    parts = 2 * train.accumulate
    more = f"train.accumulate={parts} (the same batch in more parts), or " * (
        train.batch_size % (parts * parallel.world()) == 0
    )
    current = f"train.batch_size={train.batch_size} train.accumulate={train.accumulate}"
    teacher = ", or a smaller teacher.image_size" if config.teacher else ""
    return f"The run uses {current}; try {more}smaller images{teacher}."


def _card(run: Any) -> dict[str, Any]:
    return run.card() | {"provenance": provenance(run)}


def _finish(run: Any, folder: Path, summary: dict[str, Any]) -> None:
    file = folder / run.task.weights
    figures = {key: summary[key] for key in run.figures}
    summary["model"] = str(file)
    summary["reload_difference"] = export(run.deployed, file, _card(run) | {"figures": figures})
    write_run_report(folder, summary, facts(run))


def facts(run: Any) -> dict[str, str]:
    """Facts for the report: data, model, backbone, budget, and what made the run."""
    config, loaded, teacher = run.config, run.loaded["backbone"], run.config.teacher
    millions = sum(p.numel() for p in run.student.parameters()) / 1e6
    epochs = counted(run.epochs(run.total_steps), "epoch")
    return {
        "data": run.data_summary()[0],
        "model": f"{architecture(config.model_dump())} on {config.backbone.model}, {millions:.2f} M parameters",
        "backbone": f"{config.backbone.model}, weights: {loaded.source}",
        **({"teacher": _teacher_fact(teacher, run.loaded["teacher"])} if teacher else {}),
        "budget": f"{epochs}, {counted(run.total_steps, 'step')}, batch {config.train.batch_size}, {config.optim.name}, "
        f"lr {config.optim.lr:g}, stage decay {config.optim.stage_decay:g}, seed {config.seed}",
        **made_by(provenance(run)),
    }


def _teacher_fact(teacher: LoopTeacher, loaded: Loaded) -> str:
    licence = f", licence {explained(loaded.licence)}" if loaded.licence else ""
    return (
        f"{teacher.model}, in training only, weights: {loaded.source}{licence}; projector {teacher.projector}, loss weight "
        f"{teacher.weight:g}"
    )
