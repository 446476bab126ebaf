"""Writes the report of one run, finished or not: `scalekd report` and the end of every run. docs/how-to/report.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalekd.analyze.runs import labels
from scalekd.common.errors import UserError, first_line
from scalekd.common.files import make_folder, write_text
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.parallel import pick_device
from scalekd.common.text import duration, in_shell, printable
from scalekd.cost.count import cost
from scalekd.cost.flops import flop_counter
from scalekd.distill.rebuild import read_recipe
from scalekd.distill.run import DistillationRun
from scalekd.models.normalised import Normalised

from .answer_sections import answer_sections, numbers
from .card import load_lines, model_card, queries_line, timm_name, write_card
from .curves import bounds, figure_curves, loss_curves, losses_text, scores_table, time_bars
from .evaluate import MOST_IMAGES, TEACHER, Seen, look
from .feature_sections import cost_section, feature_sections, parts_section
from .folder import RunFolder, load_baseline, read_run, rebuilt
from .label_sets import SeenSets, look_at_sets, set_numbers, set_sections
from .page import code, facts_section, folded, page, section
from .pictures import analysis_sections
from .quantized_section import quantized_block, quantized_section
from .series import events_of, time_use
from .svg import escape, finite
from .transfer_card import transfer_card
from .transfer_sections import figure_sections, teacher_fact, trained_line, use_section

FILE, DATA = "report.html", "report.json"


def write_run_report(
    folder: Path, summary: Mapping[str, Any], facts: Mapping[str, str], run: DistillationRun | None = None
) -> None:
    """Writes report.html, report.json and the model card README.md to the folder, at the end of a run.

    run: a distillation whose student is evaluated on validation images; without it the report has the log only. Errors
    are printed to stderr and not raised, so a finished run does not fail because of its report.
    """
    try:
        seen: Seen | SeenSets | None = None
        left_out = ""
        if run is None:
            pass
        elif run.has_classifier:
            try:
                seen = (
                    look_at_sets(run, run.deployed, summary.get("threshold"))
                    if run.multi_label
                    else look(run, run.deployed)
                )
            except Exception as error:
                left_out = f"The evaluation on images failed: {first_line(error)}"
        else:
            left_out = "The student has no classifier, so it makes no predictions."
        found = replace(read_run(folder), summary=dict(summary))
        _write(found, folder / FILE, facts, seen, [left_out, *found.damage], parts=count_parts(run) if run else None)
    except Exception as error:  # a full disk, a log that was removed, ...
        message = f"no report: {first_line(error)}. The run is finished; `scalekd report {in_shell(folder)}` writes the report."
        print(printable(message), file=sys.stderr)


def report(
    folder: Path,
    device: str | None = None,
    *,
    baselines: Sequence[Path] = (),
    data: str | None = None,
    images: int | None = None,
    analyses: Sequence[Path] = (),
    out: Path | None = None,
) -> tuple[Path, list[str]]:
    """Writes the report of a run's folder; returns its path and what was left out, such as costs or missing data.

    device: by default a GPU if there is one. baselines: folders of other runs with the same classes. data: any source with
    the run's classes, instead of its validation images. images: how many to use at most; 2,000 by default. analyses:
    folders that `scalekd analyze ... --out` wrote. out: the file; report.html in the folder by default. A detector or
    segmenter takes only the last two. Raises `UserError`.
    """
    if images is not None and images < 1:
        raise UserError(f"`images` {images}: must be 1 or more")
    given = {"baselines": baselines, "data": data is not None, "images": images is not None, "device": device}
    unused = " and ".join(f"`{name}`" for name, is_given in given.items() if is_given)
    path = out or folder / FILE
    make_folder(path.parent)
    pictures = analysis_sections(analyses)
    found = read_run(folder)
    others = {label: read_run(path) for label, path in zip(labels([folder, *baselines])[1:], baselines)}
    seen, left_out = None, [line for run in (found, *others.values()) for line in run.damage]
    counted = None
    if found.task:
        if unused:
            raise UserError(
                f"{folder} is a run of {found.task}, whose report is made from its log only; leave out {unused}"
            )
    else:
        seen, why_not = _evaluated(found, others, data, images or MOST_IMAGES, pick_device(device))
        left_out += [why_not] if why_not else []
        try:
            classes = len(seen.classes if isinstance(seen, Seen) else found.card.get("classes") or []) or 1000
            counted = cost(read_recipe(folder), classes=classes)
        except UserError as error:
            left_out.append(f"No costs: {first_line(error)}")
    _write(found, path, found.facts(), seen, left_out, others=others, counted=counted, more=pictures)
    return path, left_out


def _evaluated(
    found: RunFolder, others: Mapping[str, RunFolder], data: str | None, images: int, device: torch.device
) -> tuple[Seen | SeenSets | None, str]:
    """Evaluates the rebuilt run on images, or returns the reason why its own data or teacher cannot be used."""
    try:
        run, deployed = rebuilt(found, data, device)
    except UserError as error:
        if data is not None:
            raise
        return (
            None,
            f"No evaluation on images: {first_line(error).rstrip('.')}. `scalekd report --data SOURCE` uses others.",
        )
    if not run.has_classifier:
        return None, "The student has no classifier, so it makes no predictions."
    students: dict[str, Normalised] = {
        label: load_baseline(other, run.classes, device) for label, other in others.items()
    }
    limits: dict[str, Any] = {"most": images, "seconds": float("inf")}
    with explain_out_of_memory(device, "Try `device` cpu, or close other programs that use it."):
        if run.multi_label:
            return look_at_sets(run, deployed, found.card.get("threshold"), students, **limits), ""
        return look(run, deployed, students, **limits), ""


def count_parts(run: DistillationRun) -> list[dict[str, Any]]:
    """Parameters of models and methods, and the GMACs of each model's forward pass on one image."""
    d = run.distiller
    models = {"student": (run.deployed, d.image_size)}
    models |= {place: (d.teachers[name].view.model, d.teachers[name].size) for name, place in _places(run).items()}
    found: list[dict[str, Any]] = []
    for part, (model, size) in models.items():
        pixels = torch.zeros(1, run.config.data.channels, *size, device=run.device)
        with torch.no_grad(), flop_counter() as counter:
            model.eval()(pixels)
        found.append({"part": part, "params": _size(model), "gmacs": counter.get_total_flops() / 2e9})
    return found + [
        {"part": name, "params": _size(method), "gmacs": None} for name, method in d.methods.items() if _size(method)
    ]


def _places(run: DistillationRun) -> dict[str, str]:
    return {taught.label: taught.place for taught in run.taught_by}


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- the page


def _write(
    folder: RunFolder,
    path: Path,
    facts: Mapping[str, str],
    seen: Seen | SeenSets | None,
    left_out: Sequence[str],
    *,
    others: Mapping[str, RunFolder] | None = None,
    parts: list[dict[str, Any]] | None = None,
    counted: dict[str, Any] | None = None,
    more: Sequence[str] = (),
) -> None:
    name = folder.title
    facts = dict(facts) | (teacher_fact(folder) if folder.task else {})
    runs = [*(other.row(label) for label, other in (others or {}).items()), folder.row(name)]
    figures = folder.figures
    main = next(iter(figures))
    teacher = (folder.recipe.get("teacher") or {}).get("top1") if main == "top1" else None
    if not finite(teacher) and main in ("top1", "map"):
        teacher = _teacher_score(seen)
    sections = [
        _opening(folder, facts, left_out),
        scores_table(runs, figures, teacher),
        *(figure_sections(folder) if folder.task else []),
        figure_curves(runs, figures, teacher),
        loss_curves(runs),
        *_seen_sections(seen),
        time_bars(runs, _other_time(folder)),
        cost_section(counted) if counted else parts_section(parts) if parts else "",
        *(feature_sections(seen) if isinstance(seen, Seen) else []),
        "" if folder.task else quantized_section(folder.path),
        *more,
        use_section(folder) if folder.task else _use(folder),
        facts_section(facts),
        _recipe(folder),
    ]
    write_text(path, page(escape(name), sections))
    known = {"facts": dict(facts), "left_out": [line for line in left_out if line], "parts": parts, "cost": counted}
    if folder.task:
        known |= {"validation": folder.last_validation}
    if isinstance(seen, Seen):
        known |= numbers(seen) | {"frequency": seen.spectra, "cka": seen.cka, "distances": seen.distances}
    elif seen:
        known |= set_numbers(seen)
    if path == folder.path / FILE:
        write_text(folder.path / DATA, json.dumps(known, indent=1) + "\n")
        if folder.card.get("kwargs") is not None and folder.weights.is_file():
            text = (
                transfer_card(folder, facts)
                if folder.task
                else model_card(folder, facts, seen, quantized_block(folder.path))
            )
            write_card(folder.path, text)


def _seen_sections(seen: Seen | SeenSets | None) -> list[str]:
    if isinstance(seen, SeenSets):
        return set_sections(seen)
    return answer_sections(seen) if seen else []


def _teacher_score(seen: Seen | SeenSets | None) -> float | None:
    """The teacher's main figure in %, if it was measured on all validation images."""
    if seen is None or seen.images != seen.of_images:
        return None
    results, key = (seen.figures, "map") if isinstance(seen, SeenSets) else (seen.results, "top1")
    return results[TEACHER][key] if TEACHER in results else None


def _opening(folder: RunFolder, facts: Mapping[str, str], left_out: Sequence[str]) -> str:
    """Models, final result, and what is missing on the page, in a few sentences."""
    lines = [f"{trained_line(folder, facts) if folder.task else _taught_line(folder.recipe)}."]
    key, name = next(iter(folder.figures.items()))
    if finite(folder.score):
        images = [e.get("images") for e in events_of(folder.events, "validation")][-1:]
        interval = f" [{bounds(folder.score, images[0])}]" if key == "top1" and images and images[0] else ""
        lines.append(f"{name}: {folder.score:.2f} %{interval}.")
    if "exported_step" in folder.summary:
        which = "best" if folder.exports_best else "last"
        best = f"; the best were after step {folder.summary.get('best_step')}" * (which == "last")
        lines.append(f"Exported: the {which} weights, after step {folder.summary['exported_step']}{best}.")
    if ended := folder.summary.get("ended_early"):
        lines.append(f"Ended early (train.patience): {ended}.")
    if "queries" in folder.last_validation:
        lines.append(f"{queries_line(folder.last_validation)}.")
    if not folder.summary:
        step, steps = folder.step
        lines.append(f"Not finished: step {step}" + (f" of {steps}." if steps else "."))
    missing = "".join(f'<p class="note">{escape(line)}</p>' for line in left_out if line)
    return "".join(f"<p>{escape(line)}</p>" for line in lines) + missing


def _taught_line(recipe: Mapping[str, Any]) -> str:
    teachers = [recipe["teacher"]] if recipe.get("teacher") else [*(recipe.get("teachers") or {}).values()]
    text = f"{(recipe.get('student') or {}).get('model', 'The student')} "
    text += f"taught by {' + '.join(t.get('model', '') for t in teachers)}" if teachers else "without a teacher"
    losses = losses_text(recipe.get("losses") or {})
    return f"{text}, with {losses}" if losses else text


def _other_time(folder: RunFolder) -> str:
    """A sentence on the share of a run's time that was not training steps."""
    use, seconds = time_use(folder.events), folder.row("").seconds
    batch = (folder.recipe.get("train") or {}).get("batch_size")
    step, _ = folder.step
    if use is None or not seconds or not isinstance(batch, int):
        return ""
    training = min(use[0] * step * batch, seconds[0])
    return (
        f"Training steps took {duration(training)} of {duration(seconds[0])}; the rest, {1 - training / seconds[0]:.0%}, was "
        "validation, checkpoints and start-up."
    )


def _use(folder: RunFolder) -> str:
    if folder.card.get("kwargs") is None:
        return ""
    note = "Run this in the run's folder; it needs timm only. README.md is a model card; `scalekd export --onnx` writes ONNX."
    if not folder.weights.is_file():
        note = "`scalekd export` writes student.safetensors and timm's config.json from a checkpoint first."
    return section("Use the student", code(load_lines(folder.card, timm_name(folder))), note)


def _recipe(folder: RunFolder) -> str:
    made = json.dumps(folder.made, indent=1)
    parts = [folded("recipe.yaml", code(_cut(folder.recipe_text)))]
    parts += [folded("provenance.json", code(_cut(made)))] if folder.made else []
    return section("Settings and provenance", "".join(parts))


def _cut(text: str, most: int = 30_000) -> str:
    return text if len(text) <= most else f"{text[:most]}\n... ({len(text):,} characters in all)"
