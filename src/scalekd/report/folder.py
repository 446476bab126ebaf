"""Reads a run's folder, of any task and finished or not, and rebuilds the run."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import is_file, reject_links
from scalekd.common.provenance import made_by
from scalekd.common.set_figures import SET_FIGURES
from scalekd.common.text import counted
from scalekd.common.yaml_file import parse_yaml
from scalekd.config.recipe import Config
from scalekd.data.sources.open import evaluated_part
from scalekd.data.split import class_difference
from scalekd.distill.rebuild import load_trained, read_recipe, rebuild
from scalekd.distill.run import DistillationRun
from scalekd.models.inputs import card_statistics
from scalekd.models.licences import explained
from scalekd.models.normalised import Normalised
from scalekd.models.stages import StageView
from scalekd.models.student_file import create_student, load_student
from scalekd.models.weights.card import read_card
from scalekd.train import checkpoint
from scalekd.train.log import read_log
from scalekd.transfer.tasks import TASKS, TaskName, architecture, task_of

from .curves import TOP1, ReportRun
from .damage import FIGURES, KNOWN, MADE, RESULTS, check_sections, intact_card, intact_events, intact_json
from .series import events_of


@dataclass
class RunFolder:
    """The files of a run's folder."""

    path: Path
    recipe: dict[str, Any]
    recipe_text: str
    events: list[dict[str, Any]]
    summary: dict[str, Any]  # empty unless finished
    made: dict[str, Any]  # provenance.json
    known: dict[str, Any]  # report.json of an earlier report
    card: dict[str, Any]  # of the student, detector or segmenter; empty until it is written
    damage: list[str]  # lines on what is damaged and left out

    @property
    def task(self) -> TaskName | None:
        """None: a distillation."""
        return task_of(self.recipe)

    @property
    def weights(self) -> Path:
        """The file of the deployed model, which exists once the run is finished."""
        return self.path / weights_name(self.task)

    @property
    def title(self) -> str:
        """The folder's name, and the recipe's if it differs."""
        folder, recipe = self.path.resolve().name, self.recipe.get("name")
        return f"{folder} (recipe {recipe})" if recipe and recipe != folder else folder

    @property
    def exports_best(self) -> bool:
        """Whether the run exported its best weights instead of its last ones (`train.export`)."""
        return self.summary.get("exported") == "best"

    @property
    def last_validation(self) -> dict[str, Any]:
        """The last validation, or that of the exported weights if these are the best ones."""
        validations = events_of(self.events, "validation") or [{}]
        if self.exports_best:
            step = self.summary.get("exported_step")
            return next((e for e in validations if e.get("step") == step), validations[-1])
        return validations[-1]

    @property
    def figures(self) -> dict[str, str]:
        """The figures that its validations logged, key -> name, the main one first."""
        logged = self.last_validation
        neighbours = f"{logged['neighbours']}-nn " if "neighbours" in logged else ""
        few = 0 < len(self.card.get("classes") or []) <= 5  # every answer is among the first five
        default = SET_FIGURES if self.card.get("multi_label") else TOP1
        covered = (
            TOP1 if "neighbours" in logged and "knn" in logged else ("top5",) * few
        )  # the k-NN figure is the top-1
        keys = [key for key in FIGURES if key in logged and key not in covered]
        main = (self.recipe.get("train") or {}).get("best_by")
        keys.sort(key=lambda key: key != main)  # the others keep their order
        return {key: neighbours * (key == "top1") + FIGURES[key] for key in keys} or default

    @property
    def step(self) -> tuple[int, int | None]:
        """The last logged step and the number of steps."""
        steps = events_of(self.events, "step")
        return (steps[-1]["step"], steps[-1].get("steps")) if steps else (0, None)

    @property
    def score(self) -> float | None:
        key = next(iter(self.figures))
        validations = [e[key] for e in events_of(self.events, "validation") if key in e]
        return self.summary.get(key, validations[-1] if validations else None)

    def row(self, label: str) -> ReportRun:
        score, seconds = self.score, self.summary.get("seconds")
        if seconds is None:
            elapsed = [e["elapsed_s"] for e in events_of(self.events, "validation") if "elapsed_s" in e]
            seconds = elapsed[-1] if elapsed else None
        losses = self.recipe.get("losses") or {}
        return ReportRun(
            label,
            self.events,
            [] if score is None else [score],
            [] if seconds is None else [seconds],
            losses if isinstance(losses, dict) else {},
        )

    def facts(self) -> dict[str, str]:
        """The facts in the report.json of an earlier report, or else those from the recipe and the provenance."""
        if isinstance(self.known.get("facts"), dict):
            return {str(k): str(v) for k, v in self.known["facts"].items()}
        facts: dict[str, str] = {}
        data = self.recipe.get("data") or {}
        if parts := [
            f"{key} {data[key]}" for key in ("train", "val", "unlabelled", "annotations", "root") if data.get(key)
        ]:
            facts["data"] = ", ".join(parts)
        if self.task:
            facts["model"] = f"{architecture(self.recipe)} on {(self.recipe.get('backbone') or {}).get('model', '')}"
        for role, loaded in (self.made.get("weights") or {}).items():
            model = (
                self.recipe.get(role) or (self.recipe.get("teachers") or {}).get(role.removeprefix("teachers.")) or {}
            )
            facts[role] = f"{model.get('model', '')}, weights: {loaded.get('source')}".lstrip(", ")
            facts[role] += f", licence {explained(str(loaded['licence']))}" if loaded.get("licence") else ""
        train, optim = self.recipe.get("train") or {}, self.recipe.get("optim") or {}
        if unit := next((unit for unit in ("epoch", "iteration") if f"{unit}s" in train), None):
            budget = [counted(train[f"{unit}s"], unit), f"batch {train.get('batch_size')}", f"{optim.get('name')}"]
            facts["budget"] = ", ".join([*budget, f"lr {optim.get('lr')}", f"seed {self.recipe.get('seed')}"])
        return facts | made_by(self.made)


def read_run(folder: Path) -> RunFolder:
    """Raises `UserError` for a folder that holds no run."""
    recipe = folder / "recipe.yaml"
    if not is_file(recipe):
        raise UserError(
            f"{folder} is neither a run nor a comparison (no recipe.yaml, no summary.json of `scalekd compare`); choose a "
            "folder that `scalekd train` or `scalekd compare` wrote"
        )
    reject_links(folder)
    try:
        text = recipe.read_text(encoding="utf-8")
        events = read_log(folder) if is_file(folder / "log.jsonl") else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from None
    values = parse_yaml(text, str(recipe))
    check_sections(values, str(recipe))
    task = task_of(values)
    found = [
        intact_events(events, str(folder / "log.jsonl")),
        intact_json(folder / "summary.json", RESULTS),
        intact_json(folder / "provenance.json", MADE),
        intact_json(folder / "report.json", KNOWN),
        intact_card((folder / weights_name(task)).with_suffix(".json"), task),
    ]
    kept: list[Any] = [*(part for part, _ in found), [line for _, lines in found for line in lines]]
    return RunFolder(folder, values, text, *kept)


def weights_name(task: TaskName | None) -> str:
    return TASKS[task].weights if task else "student.safetensors"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; empty if there is none, because a report shows what is available."""
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if is_file(file) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def rebuilt(folder: RunFolder, data: str | None, device: torch.device) -> tuple[DistillationRun, nn.Module]:
    """The run with the weights of its last checkpoint, and the student that is deployed.

    data: a source to use instead of the recipe's. Without last.pt the exported student is used, without methods.
    Raises `UserError` if there is neither, or if the data or the teacher cannot be opened.
    """
    config = read_recipe(folder.path)
    run = rebuild(config if data is None else _with_data(config, data), device)
    classes = folder.card.get("classes")
    if classes and data is not None and list(classes) != list(run.classes):
        raise UserError(f"`data`: {data} has other classes than the run: {class_difference(classes, run.classes)}")
    student, last = run.distiller.student, folder.path / "last.pt"
    try:
        state = checkpoint.load(last)
    except UserError:
        _load_exported(student, folder.path / "student.safetensors")
        run.distiller.methods = nn.ModuleDict()  # untrained, so there is nothing to analyse
        return run, student
    load_trained(run, state, last)
    if folder.exports_best:
        deployed = copy.deepcopy(student)
        _load_exported(deployed, folder.path / "student.safetensors")
        return run, deployed
    if all(torch.equal(a, b) for a, b in zip(state["student"].values(), state["deployed"].values())):
        return run, student
    deployed = copy.deepcopy(student)
    deployed.load_state_dict(state["deployed"])
    return run, deployed


def _load_exported(student: nn.Module, weights: Path) -> None:
    if not is_file(weights):
        raise UserError(
            f"{weights.parent} has no checkpoint that can be read (last.pt) and no exported student"
        ) from None
    try:
        student.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{weights} does not fit {weights.parent / 'recipe.yaml'}: {first_line(error)}") from None


def _with_data(config: Config, data: str) -> Config:
    source = evaluated_part(data)
    other = {"train": source, "val": source, "limit": None, "unlabelled": None, "unlabelled_limit": None}
    small = {"batch_size": 2, "accumulate": 1}  # the source may be too small for a training batch
    return config.model_copy(
        update={"data": config.data.model_copy(update=other), "train": config.train.model_copy(update=small)}
    )


def load_baseline(folder: RunFolder, classes: list[str], device: torch.device) -> Normalised:
    """Another run's student, the exported one or else that of its last checkpoint. Raises `UserError`."""
    if is_file(folder.path / "student.safetensors"):
        model, card = load_student(folder.path)
    else:
        card_file, last = folder.path / "student.json", folder.path / "last.pt"
        if not is_file(card_file) or not is_file(last):
            raise UserError(f"`baselines`: {folder.path} has no student yet")
        card = read_card(card_file)
        model = create_student(card, card_file)
        try:
            model.load_state_dict(checkpoint.load(last)["deployed"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"`baselines`: {last} does not fit {card_file}: {first_line(error)}") from None
    if card["classes"] != classes:
        raise UserError(f"`baselines`: {folder.path} was trained for other classes; choose a run with the same classes")
    size = (card["image_size"][0], card["image_size"][1])
    view = StageView(model.to(device).eval(), name=card["model"], image_size=size)
    mean, std = card_statistics(card, device)
    return Normalised(view, size, mean, std)
