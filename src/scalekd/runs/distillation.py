"""Runs a distillation recipe: check, train, export, report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from scalekd.checks.preflight import preflight
from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.malloc import keep_freed_memory
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.provenance import made_by
from scalekd.common.stop import StopRequest, current
from scalekd.common.text import counted, say
from scalekd.config.recipe import Config
from scalekd.data.description import tell_data
from scalekd.distill.build import build
from scalekd.distill.run import DistillationRun
from scalekd.distill.teacher_outputs import TeacherOutputs, outputs_name
from scalekd.models.licences import explained
from scalekd.models.options import Model
from scalekd.models.stages import StageView
from scalekd.models.student_file import export_student
from scalekd.models.weights.trained import Loaded
from scalekd.report.run import write_run_report
from scalekd.train.folder import Outcome, open_folder, run_into
from scalekd.train.hardware import for_device
from scalekd.train.run import check_choice, provenance
from scalekd.train.trackers import check_trackers

from .heads import fit_heads, heads_of, with_heads
from .int8 import finish_quantised
from .memory import smaller_steps
from .students import student_card


def execute(
    config: Config,
    folder: Path,
    device: torch.device,
    console: Console,
    *,
    check: bool = True,
    title: str | None = None,
    stop: StopRequest | None = None,
    teacher_outputs: Path | None = None,
    outputs_for: Sequence[str] = (),
    look: bool = True,
) -> dict[str, Any]:
    """Runs a recipe into `folder`, or resumes the run in it. Returns its summary.

    Args:
        check: run the pre-flight before training.
        title: the name on the progress line; by default the recipe's.
        stop: checked between steps.
        teacher_outputs: a folder in which runs that show their teacher the same pixels share its outputs.
        outputs_for: the losses of all runs that share them; the first pass of the teacher then serves them all.
        look: evaluate the student's predictions on validation images for the report; takes a minute at most.

    Raises:
        Stopped: if `stop` was requested; the checkpoint is written.
        UserError: for an error in the recipe or the run; if the folder holds another or a finished run; if another
            process uses it.
    """
    if config.assistant is not None:
        raise UserError("a recipe with an assistant needs two runs; `scalekd train` and `scalekd.train` start both")
    (stop or current()).begin()
    check_teacher_outputs(config, teacher_outputs)
    config = for_device(config, device, folder)
    named = with_heads(config, folder)
    open_folder(folder, named, heads_of(named))
    parallel.wait_for_all()  # rank 0 writes into the folder below, which the others must find unchanged
    config = fit_heads(config, folder, device, console)
    run = checked(config, device, console) if check else _built(config, device, console)
    if teacher_outputs and config.teacher:
        name = outputs_name(config, run.distiller, run.loaded["teacher"], device)
        records = run.total_steps * config.train.accumulate
        run.teacher_outputs = TeacherOutputs(teacher_outputs, name, run.distiller, records, outputs_for)
    return run_into(
        folder,
        run,
        outcome(look),
        console,
        title=title or config.name,
        remedy=smaller_steps(config),
        stop=stop,
        beforehand=heads_of(config),
    )


def check_teacher_outputs(config: Config, folder: Path | None) -> None:
    """Raises `UserError` if the run cannot share its teacher's outputs in `folder`; before anything is built."""
    if folder and config.teachers:
        raise UserError("`teacher_outputs` supports one teacher only; leave it out")
    if folder and config.teacher and parallel.world() > 1:
        raise UserError("`teacher_outputs` supports one process only; leave it out")


def _finish(run: DistillationRun, folder: Path, summary: dict[str, Any], look: bool) -> None:
    file = folder / "student.safetensors"
    summary["student"] = str(file)
    figures = (next(iter(run.figures)), run.chooser, "threshold", "exported", "exported_step")
    card = student_card(run) | {key: summary[key] for key in figures if key in summary}
    student = run.deployed
    if run.config.quantize:
        student, summary["int8_agreement"] = finish_quantised(run, folder, card)
        card = {key: value for key, value in card.items() if key not in ("top1", "map")}  # measured with rounding
    summary["reload_difference"] = export_student(student, file, card)
    write_run_report(folder, summary, facts(run), run if look else None)


def checked(config: Config, device: torch.device, console: Console) -> DistillationRun:
    """Builds a recipe and runs its pre-flight. Writes nothing. Raises `UserError`."""
    if parallel.rank() == 0:
        say(console, "Opening the data and building the models ...")
    run = _built(config, device, console)
    with explain_out_of_memory(device, smaller_steps(config)):
        preflight(run, console)
    return run


def _built(config: Config, device: torch.device, console: Console) -> DistillationRun:
    """Builds a recipe and prints what its data are."""
    check_trackers(config.track)
    if device.type == "cpu":
        keep_freed_memory()
    with explain_out_of_memory(device, smaller_steps(config)):
        run = build(config, device)
    check_choice(run)
    tell_data(console, run.described)
    return run


def outcome(look: bool) -> Outcome:
    """What a distillation adds to its folder. look: as for `execute`."""
    return Outcome("student.json", student_card, partial(_finish, look=look))


def facts(run: DistillationRun) -> dict[str, str]:
    """The facts at the top of a report and a model card: data, models, budget, software and machine."""
    config = run.config
    models = {
        "data": _data_fact(run),
        "student": _model_fact(run.distiller.student_view, config.student, run.loaded["student"]),
    }
    for name, spec in config.all_teachers.items():
        key = config.key_of(name)
        models[key] = _model_fact(run.distiller.teachers[name].view, spec, run.loaded[key])
    return models | {
        "budget": f"{counted(config.train.epochs, 'epoch')}, batch {config.train.batch_size}, {config.optim.name}, lr {config.optim.lr:g}, seed {config.seed}",
        **made_by(provenance(run)),
    }


def _data_fact(run: DistillationRun) -> str:
    data, labelled = run.config.data, run.train_images.labelled
    parts = [f"{data.train}, {labelled} images of {len(run.classes)} classes"] if labelled else []
    if rest := len(run.train_images) - labelled:
        parts.append(f"{rest} images without labels, {data.unlabelled}")
    if not run.has_classifier:
        by = "retrieval" if run.retrieves else "the nearest neighbours of its features"
        parts.append(f"the student has no classifier; validation by {by}")
    return "; ".join([*parts, f"validation on {len(run.val_images)}"])


def _model_fact(view: StageView, spec: Model, loaded: Loaded) -> str:
    millions = sum(p.numel() for p in view.model.parameters()) / 1e6
    licence = f", licence {explained(loaded.licence)}" if loaded.licence else ""
    return f"{spec.model}, {millions:.2f} M parameters, weights: {loaded.source}{licence}"
