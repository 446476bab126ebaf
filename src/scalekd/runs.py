"""A run from its recipe to its folder: check, train, export, report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import checkpoint, parallel
from .build import Run, build
from .config import Augment, Config, Data, Model, height_and_width
from .data import Images, eval_batches, eval_transform, same_classes
from .errors import UserError, counted, first_line, printable
from .evaluate import evaluate
from .export import create_student, export_onnx, export_student, load_student, read_card
from .loaded import Loaded
from .memory import keep_freed_memory
from .preflight import preflight
from .provenance import made_by, provenance
from .report.run import write_run_report
from .run_folder import Outcome, open_folder, run_into
from .run_head import fit_heads, heads_of, with_heads
from .shortages import shortages_told, smaller_steps
from .sources import open_source, pair_of
from .stages import StageView
from .stop import StopRequest
from .teacher_outputs import TeacherOutputs, outputs_name
from .trackers import check_trackers


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
    look: bool = True,
) -> dict[str, Any]:
    """Runs a recipe into `folder`, or goes on with the run that is there. Returns its summary.

    check: pre-flight before training. stop: looked at between steps; `Stopped` is raised with the run saved.
    look: at the student's answers to validation images, for the report; a minute at most.
    teacher_outputs: a folder where runs that show their teacher the same pixels share what it gives.
    Raises `UserError`, also when the folder holds another or a finished run, or when another process trains in it.
    """
    if config.assistant is not None:
        raise UserError("a recipe with an assistant is two runs: `scalekd train` makes both")
    named = with_heads(config, folder)
    open_folder(folder, named, heads_of(named))
    parallel.wait_for_all()  # rank 0 writes into the folder below
    config = fit_heads(config, folder, device, console)
    run = checked(config, device, console) if check else _built(config, device)
    if teacher_outputs and config.teachers:
        raise UserError("--teacher-outputs goes with one teacher; leave it out")
    if teacher_outputs and config.teacher:
        if parallel.world() > 1:
            raise UserError("--teacher-outputs goes with one process; leave it out")
        name = outputs_name(config, run.distiller, run.loaded["teacher"])
        records = run.total_steps * config.train.accumulate
        run.teacher_outputs = TeacherOutputs(teacher_outputs, name, run.distiller, records)
    return run_into(
        folder,
        run,
        outcome(look),
        console,
        title=title or config.name,
        way_out=smaller_steps(config),
        stop=stop,
        beforehand=heads_of(config),
    )


def _finish(run: Run, folder: Path, summary: dict[str, Any], look: bool) -> None:
    file = folder / "student.safetensors"
    summary["student"] = str(file)
    summary["reload_difference"] = export_student(run.deployed, file, student_card(run) | {"top1": summary["top1"]})
    write_run_report(folder, summary, facts(run), run if look else None)


def checked(config: Config, device: torch.device, console: Console) -> Run:
    """Builds a recipe and runs its pre-flight; writes nothing. Raises `UserError`."""
    run = _built(config, device)
    with shortages_told(device, smaller_steps(config)):
        preflight(run, console)
    return run


def _built(config: Config, device: torch.device) -> Run:
    check_trackers(config.track)
    if device.type == "cpu":
        keep_freed_memory()
    with shortages_told(device, smaller_steps(config)):
        return build(config, device)


def student_card(run: Run) -> dict[str, Any]:
    """What someone needs to use the exported student, beside its weights."""
    config = run.config
    return {
        "model": config.student.model,
        "kwargs": run.loaded["student"].kwargs,
        "classes": run.classes if run.has_classifier else [],
        "image_size": list(height_and_width(config.data.image_size)),
        "mean": as_written(run.distiller.student_mean),
        "std": as_written(run.distiller.student_std),
        "interpolation": config.augment.interpolation,
        "crop_pct": config.augment.crop_pct,
        "teacher": " + ".join(spec.model for spec in config.all_teachers.values()) or None,
        "losses": config.losses,
        "provenance": provenance(run),
    }


def as_written(values: torch.Tensor) -> list[float]:
    """0.485 and not 0.48500001430511475: the shortest decimals that are the same float32."""
    return [float(str(v)) for v in values.flatten().cpu().numpy()]


def outcome(look: bool) -> Outcome:
    return Outcome("student.json", student_card, partial(_finish, look=look))


def facts(run: Run) -> dict[str, str]:
    config = run.config
    told = {
        "data": _data_fact(run),
        "student": _model_fact(run.distiller.student_view, config.student, run.loaded["student"]),
    }
    for name, spec in config.all_teachers.items():
        place = config.place_of(name)
        told[place] = _model_fact(run.distiller.teachers[name].view, spec, run.loaded[place])
    return told | {
        "budget": f"{counted(config.train.epochs, 'epoch')}, batch {config.train.batch_size}, {config.optim.name}, lr {config.optim.lr:g}, seed {config.seed}",
        **made_by(provenance(run)),
    }


def _data_fact(run: Run) -> str:
    data, labelled = run.config.data, run.train_images.labelled
    parts = [f"{data.train}, {labelled} images of {len(run.classes)} classes"] if labelled else []
    if rest := len(run.train_images) - labelled:
        parts.append(f"{rest} images without labels, {data.unlabelled}")
    if not run.has_classifier:
        parts.append("the student has no classifier; validation by the nearest neighbours of its features")
    return "; ".join([*parts, f"validation on {len(run.val_images)}"])


def _model_fact(view: StageView, spec: Model, loaded: Loaded) -> str:
    millions = sum(p.numel() for p in view.model.parameters()) / 1e6
    return f"{spec.model}, {millions:.2f} M parameters, weights: {loaded.source}"


def export_run(folder: Path, which: str, onnx: bool, console: Console) -> None:
    """Writes student.safetensors, its card and, if asked, student.onnx from a run's `best` or `last` checkpoint.

    Needs neither the run's data nor its teacher. Raises `UserError`.
    """
    state_file, card_file = folder / f"{which}.pt", folder / "student.json"
    if not card_file.is_file() or not state_file.is_file():
        raise UserError(
            f"{folder} has no {which} checkpoint to export; is it a run's folder that reached its first validation?"
        )
    state, card = checkpoint.load(state_file), read_card(card_file)
    student = create_student(card, card_file)
    try:
        top1 = float(state["progress"]["history"][-1]["top1"] if which == "last" else state["top1"])
        student.load_state_dict(state["deployed" if which == "last" else "student"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{state_file} is not a checkpoint of {card_file}'s student: {first_line(error)}") from None
    card = {key: value for key, value in card.items() if key != "sha256"} | {"top1": top1}
    file = folder / "student.safetensors"
    difference = export_student(student, file, card)
    told = f"{file}  timm loads it back: largest difference of logits {difference:.1e}"
    console.print(printable(told), highlight=False, markup=False, soft_wrap=True)
    if onnx:
        difference = export_onnx(student, folder / "student.onnx", card)
        told = f"{folder / 'student.onnx'}  onnxruntime: largest difference of logits {difference:.1e}"
        console.print(printable(told), highlight=False, markup=False, soft_wrap=True)


def evaluate_student(path: Path, source_text: str, device_name: str | None) -> dict[str, float]:
    """Top-1, top-5 and loss of an exported student on any data source. Raises `UserError` if classes differ."""
    student, card = load_student(path)
    if not card["classes"]:
        raise UserError(
            f"{path} has no classifier: its losses read no logits. `scalekd probe` tells how good its features are"
        )
    device = parallel.pick_device(device_name)
    source = open_source(source_text, "--data")
    if not same_classes(card["classes"], source.classes):
        if pair := pair_of(source_text):
            raise UserError(
                f"--data: {source_text} has a part to train on and one to validate on; write --data {pair[1]}"
            )
        raise UserError(
            f"--data has other classes than the student knows: {', '.join(source.classes[:4])}, ... ({len(source.classes)}) "
            f"against {', '.join(card['classes'][:4])}, ... ({len(card['classes'])})"
        )
    data = Data.model_validate({"train": source_text, "image_size": card["image_size"], "channels": len(card["mean"])})
    augment = Augment(interpolation=card["interpolation"], crop_pct=card["crop_pct"])
    images = Images(source, range(len(source)), eval_transform(data, augment), None)
    mean, std = (torch.tensor(card[k], device=device).view(1, -1, 1, 1) for k in ("mean", "std"))
    with shortages_told(device, "Try --device cpu."):
        return evaluate(
            student.to(device),
            eval_batches(images, min(256, len(images)), data.workers, device.type == "cuda"),
            mean,
            std,
            device,
        )
