"""Students beside their teacher: `scalekd analyze similarity`, docs/how-to/analyze.md.

How alike the stages are (CKA), how often they answer the same, whether their confidence can be trusted, which classes
gained over a baseline, and where the queries of the projectors look.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

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
    """The runs' students, as exported, beside their teacher, over the same images.

    data, images: see `open_runs`. baseline: a run to stand first, against which the others' classes gain. pictures: so
    many images for the maps of attention. out: where the figures are to go, asked for here so that a missing package is
    told at once. Raises `UserError`.
    """
    if out is not None:
        figure_class()
    if pictures < 0:
        raise UserError(f"--pictures {pictures}: none (0) or more")
    if batch < LEAST:
        raise UserError(f"--batch {batch}: CKA compares the images of a batch; {LEAST} or more")
    runs = open_runs([*([baseline] if baseline else []), *folders], data, images, batch, device)
    if bare := [t.label for t in runs.trained if not t.student.view.shapes.classes]:
        raise UserError(
            f"{bare[0]} has no classifier to compare answers of; `scalekd probe` tells how good its features are"
        )
    for t in runs.trained:
        t.use("deployed")
    answers, cka, note = _seen(runs)
    found = [
        t.known()
        | answers[t.label].result(TEACHER in answers)
        | {"cka": cka[t.label].result() if t.label in cka else []}
        for t in runs.trained
    ]
    columns = {label: of_one.columns() for label, of_one in answers.items()}
    first, *others = [t.label for t in runs.trained]
    classes = runs.trained[0].classes
    for t in runs.trained:
        t.use("student")  # whom the projectors were trained with
    return runs.known() | {
        "baseline": first if baseline else None,
        "teacher_answers": answers[TEACHER].result(False) if TEACHER in answers else None,
        "cka_images": max((c.images for c in cka.values()), default=0),
        "notes": note,
        "runs": found,
        "gains": {run: class_gains(columns[first], columns[run], classes) for run in others} if baseline else {},
        "columns": columns,
        "classes": classes,
        "image_names": [runs.images.source.where(i) for i in runs.images.indices],
        "attention": attention_maps(runs, pictures) if pictures and not note["maps"] else [],
    }


def _seen(runs: Runs) -> tuple[dict[str, Answers], dict[str, StageCKA], dict[str, str]]:
    """Answers and similarities by label; and why there are none of the teacher's, or no maps, if so."""
    views = [runs.teacher.view, *(t.student.view for t in runs.trained)]
    refusals = [str(view.refusal) for view in views if view.refusal]
    classes, heads = len(runs.trained[0].classes), runs.teacher.view.shapes.classes
    note = {
        "maps": refusals[0] if refusals else "",
        "teacher": "" if heads == classes else f"the teacher answers in {heads} classes, the data have {classes}",
    }
    answers = {t.label: Answers() for t in runs.trained} | ({} if note["teacher"] else {TEACHER: Answers()})
    cka = {} if refusals else {t.label: StageCKA() for t in runs.trained}
    for pixels, targets in runs.batches():
        teacher = runs.teacher.features(pixels, maps=not refusals)
        if not note["teacher"]:
            answers[TEACHER].add(teacher.logits, targets)
        for t in runs.trained:
            student = t.student.features(pixels, maps=not refusals)
            answers[t.label].add(student.logits, targets, None if note["teacher"] else teacher.logits)
            if not refusals:
                cka[t.label].add(*([stage_map(of_one, s) for s in STAGES] for of_one in (student, teacher)))
    return answers, cka, note


# ---------------------------------------------------------------- what is shown and written


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in COLUMNS:
        is_name = column == "model"
        table.add_column(column, overflow="fold", no_wrap=not is_name, justify="left" if is_name else "right")
    for cells in _rows(found):
        table.add_row(*cells)
    console.print(table, markup=False, highlight=False)
    console.print("", *_notes(found), sep="\n", markup=False, highlight=False, soft_wrap=True)


COLUMNS = ("model", "top-1 %", "agree %", "KL", "NLL", "ECE %", "CKA, stages 1 to 4")


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    teacher = found["teacher_answers"]
    for run in [*([{"run": TEACHER} | teacher] if teacher else []), *found["runs"]]:
        beside = [f"{run['agreement']:.2f}", f"{run['kl']:.4f}"] if "kl" in run else ["", ""]
        cka = " ".join(_number(run["cka"][i][i]) for i in range(4)) if run.get("cka") else ""
        name = run["run"] + (" (baseline)" if run["run"] == found["baseline"] else "")
        rows.append([name, f"{run['top1']:.2f}", *beside, f"{run['nll']:.4f}", f"{run['ece']:.2f}", cka])
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _notes(found: dict[str, Any]) -> list[str]:
    notes = [
        "agree: the teacher's answer, right or wrong; KL from the teacher's probabilities, and NLL, in nats; ECE with "
        "15 bins; CKA of a student's stage with the same stage of the teacher."
    ]
    for run, gains in found["gains"].items():
        up, down = gains[0], gains[-1]
        notes.append(
            f"{run} against {found['baseline']}: most gained {printable(up['class'])} ({up['gain']:+.1f} points), "
            f"least {printable(down['class'])} ({down['gain']:+.1f})."
        )
    notes += [f"Left out: {' '.join(reason.split())}." for reason in found["notes"].values() if reason]
    notes += [
        f"{run['run']} is not finished: step {run['step']} of {run['of_steps']}."
        for run in found["runs"]
        if run["step"] < run["of_steps"]
    ]
    return [*notes, f"{found['images']} of {found['of_images']} images of {found['data']}."]


def write(found: dict[str, Any], folder: Path) -> None:
    """results.json, summary.md, and the data and pictures of every part that there is. Raises `UserError`."""
    make_folder(folder)
    apart = ("columns", "image_names", "attention", "classes")
    plain = {key: value for key, value in found.items() if key not in apart}
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
    for i, of_cap in enumerate(found["attention"], 1):
        name = f"attention-{i}"
        _write_attention(of_cap, found["image_names"], folder / f"{name}.csv")
        titles = [found["classes"][target] for target in targets[: len(of_cap["pixels"])]]
        write_figure(draw_attention(of_cap, titles), folder, name)
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


def _write_attention(of_cap: dict[str, Any], names: Sequence[str], path: Path) -> None:
    rows = (
        [name, "mean" if query is None else f"{query[0]},{query[1]}", r, c, values[r][c]]
        for name, maps in zip(names, of_cap["maps"])
        for query, values in maps
        for r, c in np.ndindex(len(values), len(values[0]))
    )
    write_csv(path, ["image", "query", "row", "column", "weight"], rows)


def markdown(found: dict[str, Any], pictures: Sequence[str]) -> str:
    lines = [f"# Beside the teacher {found['teacher']}", "", table_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines += [*map(table_row, _rows(found)), "", *(f"- {note}" for note in _notes(found)), ""]
    for run in found["runs"]:
        if run["cka"]:
            lines += [f"CKA of {run['run']}, {found['cka_images']} images:", ""]
            lines += [table_row(["student \\ teacher", *(f"stage {t}" for t in STAGES)]), "|---|" + "---|" * 4]
            lines += [table_row([f"stage {s}", *map(_number, row)]) for s, row in zip(STAGES, run["cka"])] + [""]
    lines += [
        f"attention-{i}: {of_cap['run']}, {of_cap['projector']}" for i, of_cap in enumerate(found["attention"], 1)
    ]
    return "\n".join([*lines, "", *(f"![{name}]({name}.png)" for name in pictures)]) + "\n"
