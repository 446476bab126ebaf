"""A run from its recipe to its folder: check, train, export, report."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import checkpoint, parallel
from .config import Augment, Config, Data, height_and_width, to_yaml
from .data import Images, eval_batches, eval_transform
from .engine import Run, build, train
from .errors import UserError
from .evaluate import evaluate
from .export import create_student, export_onnx, export_student, load_student, read_card
from .memory import keep_freed_memory
from .preflight import preflight
from .report import ReportRun, write_report
from .runlog import RunLog, read_log
from .sources import open_source
from .version import __version__


def execute(
    config: Config,
    folder: Path,
    device: torch.device,
    console: Console,
    *,
    check: bool = True,
    title: str | None = None,
) -> dict[str, Any]:
    """Runs a recipe into `folder`, or goes on with the run that is there. Returns its summary.

    check: pre-flight before training. Raises `UserError`, also when the folder holds another or a finished run.
    """
    open_folder(folder, config)
    parallel.wait_for_all()  # rank 0 writes into the folder below
    run = checked(config, device, console) if check else _built(config, device)
    if parallel.rank() == 0:
        write_folder(folder, run)
    parallel.wait_for_all()
    log = RunLog(folder, console, title or config.name)
    try:
        summary = train(run, folder, log)
    finally:
        log.close()
    if parallel.rank() == 0:
        summary["student"] = str(folder / "student.safetensors")
        summary["reload_difference"] = export_student(
            run.deployed, folder / "student.safetensors", student_card(run) | {"top1": summary["top1"]}
        )
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        teacher = config.teacher.top1 if config.teacher else None
        write_report(
            folder / "report.html",
            title=title or config.name,
            facts=facts(run),
            teacher_top1=teacher,
            runs=[ReportRun(config.name, read_log(folder), [summary["top1"]], [summary["seconds"]], config.losses)],
        )
    return summary


def checked(config: Config, device: torch.device, console: Console) -> Run:
    """Builds a recipe and runs its pre-flight; writes nothing. Raises `UserError`."""
    run = _built(config, device)
    preflight(run, console)
    return run


def _built(config: Config, device: torch.device) -> Run:
    if device.type == "cpu":
        keep_freed_memory()
    return build(config, device)


def open_folder(folder: Path, config: Config) -> None:
    """Refuses a folder that holds something else, another recipe's run or a finished one. Writes nothing."""
    recipe = folder / "recipe.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give --out a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not recipe.is_file():
        raise UserError(f"{folder} is not empty and holds no run; give --out another folder")
    if recipe.read_text() != to_yaml(config):
        raise UserError(
            f"{folder} holds a run of another recipe (first difference: {_difference(recipe.read_text(), to_yaml(config))}).\n"
            "Give --out another folder, or remove this one."
        )
    if (folder / "summary.json").is_file():
        raise UserError(
            f"{folder} holds this run, finished. Give --out another folder, or remove this one to run it again."
        )


def _difference(old: str, new: str) -> str:
    before, now = old.splitlines(), new.splitlines()
    for a, b in zip(before, now):
        if a != b:
            return f"`{a.strip()}` there, `{b.strip()}` now"
    return "more lines in one than in the other"


def write_folder(folder: Path, run: Run) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(to_yaml(run.config))
        (folder / "provenance.json").write_text(json.dumps(provenance(run), indent=2) + "\n")
        (folder / "student.json").write_text(json.dumps(student_card(run), indent=2) + "\n")  # for `scalekd export`
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}. Give --out a folder that you may write to."
        ) from None


def provenance(run: Run) -> dict[str, Any]:
    """What made this run: versions, command, machine, weights by checksum, git state."""
    import timm
    import torchvision

    return {
        "command": shlex.join(["scalekd", *sys.argv[1:]]),
        "scalekd": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "machine": machine(run.device),
        "processes": parallel.world(),
        "git": git_state(),
        "weights": {role: vars(loaded) for role, loaded in run.loaded.items()},
    }


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            model,
        )
    return f"CPU, {model}, {torch.get_num_threads()} threads"


def git_state() -> str | None:
    """The commit of the code that runs, with '+' if it has local changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "."], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit[:12] + ("+" if changed else "")


def student_card(run: Run) -> dict[str, Any]:
    """What someone needs to use the exported student, beside its weights."""
    config = run.config
    return {
        "model": config.student.model,
        "kwargs": run.loaded["student"].kwargs,
        "classes": run.classes,
        "image_size": list(height_and_width(config.data.image_size)),
        "mean": run.distiller.student_mean.flatten().tolist(),
        "std": run.distiller.student_std.flatten().tolist(),
        "interpolation": config.augment.interpolation,
        "crop_pct": config.augment.crop_pct,
        "teacher": config.teacher.model if config.teacher else None,
        "losses": config.losses,
        "provenance": provenance(run),
    }


def facts(run: Run) -> dict[str, str]:
    config = run.config
    told = {
        "data": f"{config.data.train}, {len(run.train_images)} images of {len(run.classes)} classes; validation on {len(run.val_images)}",
        "student": _model_fact(run, "student"),
    }
    if config.teacher:
        told["teacher"] = _model_fact(run, "teacher")
    made = provenance(run)
    return told | {
        "budget": f"{config.train.epochs} epochs, batch {config.train.batch_size}, {config.optim.name}, lr {config.optim.lr:g}, seed {config.seed}",
        "machine": made["machine"],
        "versions": f"scalekd {__version__}, torch {made['torch']}, timm {made['timm']}",
        "command": made["command"],
    }


def _model_fact(run: Run, role: str) -> str:
    view = run.distiller.student_view if role == "student" else run.distiller.teacher_view
    assert view is not None
    millions = sum(p.numel() for p in view.model.parameters()) / 1e6
    return f"{getattr(run.config, role).model}, {millions:.2f} M parameters, weights: {run.loaded[role].source}"


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
    top1 = state["history"][-1]["top1"] if which == "last" else state["top1"]
    student = create_student(card, card_file)
    student.load_state_dict(state["deployed" if which == "last" else "student"])
    card = {key: value for key, value in card.items() if key != "sha256"} | {"top1": top1}
    file = folder / "student.safetensors"
    difference = export_student(student, file, card)
    console.print(f"{file}  timm loads it back: largest difference of logits {difference:.1e}", highlight=False)
    if onnx:
        difference = export_onnx(student, folder / "student.onnx", card)
        console.print(
            f"{folder / 'student.onnx'}  onnxruntime: largest difference of logits {difference:.1e}", highlight=False
        )


def evaluate_student(path: Path, source_text: str, device_name: str | None) -> dict[str, float]:
    """Top-1, top-5 and loss of an exported student on any data source. Raises `UserError` if classes differ."""
    student, card = load_student(path)
    device = parallel.pick_device(device_name)
    source = open_source(source_text, "--data")
    if list(source.classes) != list(card["classes"]):
        raise UserError(
            f"--data has other classes than the student knows: {', '.join(source.classes[:4])}, ... ({len(source.classes)}) "
            f"against {', '.join(card['classes'][:4])}, ... ({len(card['classes'])})"
        )
    data = Data.model_validate({"train": source_text, "image_size": card["image_size"], "channels": len(card["mean"])})
    augment = Augment(interpolation=card["interpolation"], crop_pct=card["crop_pct"])
    images = Images(source, range(len(source)), eval_transform(data, augment), None)
    mean, std = (torch.tensor(card[k], device=device).view(1, -1, 1, 1) for k in ("mean", "std"))
    return evaluate(
        student.to(device),
        eval_batches(images, min(256, len(images)), data.workers, device.type == "cuda"),
        mean,
        std,
        device,
    )
