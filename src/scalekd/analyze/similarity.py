"""Compares students with their teacher: `scalekd analyze similarity`, docs/how-to/analyze.md.

Similarity of the stages (CKA), agreement of the predictions, calibration, gains by class over a baseline, and the
attention of the projectors' queries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from scalekd.common.errors import UserError
from scalekd.common.files import make_folder, write_text
from scalekd.common.markdown import table_row
from scalekd.common.text import printable
from scalekd.methods.shared import stage_map

from .attention import attention_maps
from .calibration import Answers, class_gains
from .cka import LEAST, StageCKA
from .figures import figure_class, write_csv, write_figure
from .runs import Runs, open_runs
from .similarity_figures import draw_attention, draw_calibration, draw_cka, draw_classes
from .tables import closing_notes, print_table

TEACHER = "the teacher"
STAGES = (1, 2, 3, 4)


@torch.no_grad()
def analyze(
    folders: Sequence[Path],
    data: str | None,
    images: int | None,
    device: torch.device,
    *,
    baseline: Path | None = None,
    pictures: int = 4,
    batch: int = 32,
    out: Path | None = None,
) -> dict[str, Any]:
    """Compares the runs' exported students with their teacher on the same images.

    data, images, batch: see `open_runs`. baseline: a run that the gains by class are measured against. pictures: number
    of images for the attention maps. out: the folder for figures; if given, a missing matplotlib is reported at once.
    Raises `UserError`.
    """
    if out is not None:
        figure_class()
    if pictures < 0:
        raise UserError(f"`pictures` {pictures}: must be 0 or more")
    if batch < LEAST:
        raise UserError(f"`batch` {batch}: must be {LEAST} or more, because CKA compares the images of a batch")
    runs = open_runs([*([baseline] if baseline else []), *folders], data, images, batch, device)
    if without := [t.label for t in runs.trained if not t.student.view.shapes.classes]:
        raise UserError(
            f"{without[0]} has no classifier, so it makes no predictions; use `scalekd probe` for its features"
        )
    for t in runs.trained:
        t.use("deployed")
    answers, cka, left_out = _measured(runs)
    results = [
        t.known()
        | answers[t.label].result(TEACHER in answers)
        | {"cka": cka[t.label].result() if t.label in cka else []}
        for t in runs.trained
    ]
    columns = {label: model.columns() for label, model in answers.items()}
    first, *others = [t.label for t in runs.trained]
    classes = runs.trained[0].classes
    for t in runs.trained:
        t.use("student")  # the weights that the projectors were trained with
    return runs.known() | {
        "baseline": first if baseline else None,
        "teacher_answers": answers[TEACHER].result(False) if TEACHER in answers else None,
        "cka_images": max((c.images for c in cka.values()), default=0),
        "notes": left_out,
        "runs": results,
        "gains": {run: class_gains(columns[first], columns[run], classes) for run in others} if baseline else {},
        "columns": columns,
        "classes": classes,
        "image_names": [runs.images.source.where(i) for i in runs.images.indices],
        "attention": attention_maps(runs, pictures) if pictures and not left_out["maps"] else [],
    }


def _measured(runs: Runs) -> tuple[dict[str, Answers], dict[str, StageCKA], dict[str, str]]:
    """Predictions and similarities by label, and the reasons why `maps` or the `teacher` are left out, or ''."""
    views = [runs.teacher.view, *(t.student.view for t in runs.trained)]
    refusals = [str(view.refusal) for view in views if view.refusal]
    classes, heads = len(runs.trained[0].classes), runs.teacher.view.shapes.classes
    left_out = {
        "maps": refusals[0] if refusals else "",
        "teacher": "" if heads == classes else f"the teacher has {heads} classes and the data {classes}",
    }
    answers = {t.label: Answers() for t in runs.trained} | ({} if left_out["teacher"] else {TEACHER: Answers()})
    cka = {} if refusals else {t.label: StageCKA() for t in runs.trained}
    for pixels, targets in runs.batches():
        teacher = runs.teacher.features(pixels, maps=not refusals)
        if not left_out["teacher"]:
            answers[TEACHER].add(teacher.logits, targets)
        for t in runs.trained:
            student = t.student.features(pixels, maps=not refusals)
            answers[t.label].add(student.logits, targets, None if left_out["teacher"] else teacher.logits)
            if not refusals:
                cka[t.label].add(*([stage_map(features, s) for s in STAGES] for features in (student, teacher)))
    return answers, cka, left_out


# ---------------------------------------------------------------- output


def show(found: dict[str, Any], console: Console) -> None:
    print_table(console, COLUMNS, ("model",), _rows(found), _notes(found))


COLUMNS = ("model", "top-1 %", "agree %", "KL", "NLL", "ECE %", "CKA, stages 1 to 4")


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    teacher = found["teacher_answers"]
    for run in [*([{"run": TEACHER} | teacher] if teacher else []), *found["runs"]]:
        compared = [f"{run['agreement']:.2f}", f"{run['kl']:.4f}"] if "kl" in run else ["", ""]
        cka = " ".join(_number(run["cka"][i][i]) for i in range(4)) if run.get("cka") else ""
        name = run["run"] + (" (baseline)" if run["run"] == found["baseline"] else "")
        rows.append([name, f"{run['top1']:.2f}", *compared, f"{run['nll']:.4f}", f"{run['ece']:.2f}", cka])
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _notes(found: dict[str, Any]) -> list[str]:
    notes = [
        "agree: same prediction as the teacher, right or wrong. KL from the teacher's probabilities and NLL: in nats. "
        "ECE: 15 bins. CKA: each stage of the student with the same stage of the teacher."
    ]
    for run, gains in found["gains"].items():
        up, down = gains[0], gains[-1]
        notes.append(
            f"{run} compared with {found['baseline']}: largest gain {printable(up['class'])} ({up['gain']:+.1f} points), "
            f"smallest {printable(down['class'])} ({down['gain']:+.1f})."
        )
    notes += [f"Left out: {' '.join(reason.split())}." for reason in found["notes"].values() if reason]
    return notes + closing_notes(found)


def write(found: dict[str, Any], folder: Path) -> None:
    """Writes results.json, summary.md, and the data and figures of each part that was measured. Raises `UserError`."""
    make_folder(folder)
    large = ("columns", "image_names", "attention", "classes")
    plain = {key: value for key, value in found.items() if key not in large}
    write_text(folder / "results.json", json.dumps(plain, indent=2) + "\n")
    _write_answers(found, folder)
    pictures = ["calibration"]
    write_figure(draw_calibration(found, TEACHER), folder, "calibration")
    similar = [run for run in found["runs"] if run["cka"]]
    if similar:
        rows = [
            [run["run"], s, t, value]
            for run in similar
            for s, row in zip(STAGES, run["cka"])
            for t, value in zip(STAGES, row)
        ]
        write_csv(folder / "cka.csv", ["run", "student_stage", "teacher_stage", "cka"], rows)
        write_figure(draw_cka(similar), folder, "cka")
        pictures.insert(0, "cka")
    if found["gains"]:
        fields = ["class", "images", "before", "after", "gain", "half_width"]
        rows = [[run, *(row[f] for f in fields)] for run, gains in found["gains"].items() for row in gains]
        write_csv(folder / "classes.csv", ["run", *fields], rows)
        write_figure(draw_classes(found["gains"], found["baseline"]), folder, "classes")
        pictures.append("classes")
    targets = next(iter(found["columns"].values()))["target"]
    for i, attention in enumerate(found["attention"], 1):
        name = f"attention-{i}"
        _write_attention(attention, found["image_names"], folder / f"{name}.csv")
        titles = [found["classes"][target] for target in targets[: len(attention["pixels"])]]
        write_figure(draw_attention(attention, titles), folder, name)
        pictures.append(name)
    write_text(folder / "summary.md", markdown(found, pictures))


def _write_answers(found: dict[str, Any], folder: Path) -> None:
    columns, classes = found["columns"], found["classes"]
    header = ["image", "class", *(f"{label}: {what}" for label in columns for what in ("answer", "confidence"))]
    target = next(iter(columns.values()))["target"]
    rows = (
        [name, classes[target[i]]]
        + [v for c in columns.values() for v in (classes[c["predicted"][i]], round(float(c["confidence"][i]), 6))]
        for i, name in enumerate(found["image_names"])
    )
    write_csv(folder / "answers.csv", header, rows)
    teacher = found["teacher_answers"]
    models = [*([{"run": TEACHER} | teacher] if teacher else []), *found["runs"]]
    fields = ["from", "to", "images", "confidence", "accuracy"]
    bins = [[m["run"], *(b[f] for f in fields)] for m in models for b in m["bins"]]
    write_csv(folder / "calibration.csv", ["model", *fields], bins)


def _write_attention(attention: dict[str, Any], names: Sequence[str], path: Path) -> None:
    rows = (
        [name, "mean" if query is None else f"{query[0]},{query[1]}", r, c, values[r][c]]
        for name, maps in zip(names, attention["maps"])
        for query, values in maps
        for r, c in np.ndindex(len(values), len(values[0]))
    )
    write_csv(path, ["image", "query", "row", "column", "weight"], rows)


def markdown(found: dict[str, Any], pictures: Sequence[str]) -> str:
    lines = [f"# Comparison with the teacher {found['teacher']}", "", table_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines += [*map(table_row, _rows(found)), "", *(f"- {note}" for note in _notes(found)), ""]
    for run in found["runs"]:
        if run["cka"]:
            lines += [f"CKA of {run['run']} on {found['cka_images']} images:", ""]
            lines += [table_row(["student \\ teacher", *(f"stage {t}" for t in STAGES)]), "|---|" + "---|" * 4]
            lines += [table_row([f"stage {s}", *map(_number, row)]) for s, row in zip(STAGES, run["cka"])] + [""]
    lines += [
        f"attention-{i}: {attention['run']}, {attention['projector']}"
        for i, attention in enumerate(found["attention"], 1)
    ]
    return "\n".join([*lines, "", *(f"![{name}]({name}.png)" for name in pictures)]) + "\n"
