"""What a comparison knows of its runs: one line of results.jsonl for each that is finished, and the summary of all."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError
from scalekd.common.files import write_text
from scalekd.common.intervals import half_width
from scalekd.common.sections import to_yaml
from scalekd.config.losses import written_out
from scalekd.config.recipe import check_config
from scalekd.train.log import read_log
from scalekd.train.resume import recipe_difference

from .ladder import Job, Ladder

Record = dict[str, Any]
FILE = "results.jsonl"


def record_of(job: Job, folder: Path) -> Record | None:
    """The record of the finished run in `folder`; None if there is none, or it is of another recipe."""
    recipe, summary = folder / "recipe.yaml", folder / "summary.json"
    if not summary.is_file() or not recipe.is_file() or recipe_difference(recipe.read_text(), job.config):
        return None
    told, made = json.loads(summary.read_text()), json.loads((folder / "provenance.json").read_text())
    batch = job.config.train.batch_size
    validations = [e for e in read_log(folder) if e["event"] == "validation"]
    curve = {e["step"] * batch: e["top1"] for e in validations}  # a step that was done twice counts once
    return {
        "student": job.student,
        "method": job.method,
        "seed": job.seed,
        "top1": told["top1"],
        "seconds": told["seconds"],
        "steps": told["steps"],
        "curve": sorted(curve.items()),
        "made": {key: made.get(key) for key in ("machine", "scalekd", "torch", "timm", "git")},
        "recipe": recipe_of(job),
    }


def known_records(out: Path, jobs: Iterable[Job], others: Iterable[Path] = ()) -> dict[Job, Record]:
    """The finished runs among `jobs`: from results.jsonl, which may outlive the runs' folders, or from the folders.

    others: folders of other comparisons; a run of theirs counts if its recipe is the same, whatever it is called there.
    """
    of_label = {(job.student, job.method, job.seed): job for job in jobs}
    found: dict[Job, Record] = {}
    for record in read_records(out):
        job = of_label.get((record["student"], record["method"], record["seed"]))
        if job is not None and _same_recipe(record["recipe"], job):
            found[job] = record
    for job in of_label.values():
        if job not in found and (of_folder := record_of(job, out / "runs" / job.folder)):
            found[job] = of_folder
    elsewhere = {_key(r["recipe"]): (r, folder) for folder in others for r in read_records(folder)}
    for job in of_label.values():
        if job not in found and (there := elsewhere.get(_key(recipe_of(job)))):
            record, folder = there
            found[job] = record | {"student": job.student, "method": job.method, "from": str(folder)}
    return found


def recipe_of(job: Job) -> dict[str, Any]:
    """As a record keeps it: what is not as by default, and every option of the losses."""
    return job.config.model_dump(mode="json", exclude_defaults=True) | {"losses": written_out(job.config.losses)}


def _key(recipe: dict[str, Any]) -> str:
    """Equal for recipes that differ in their names only, or in how a number is written: 1 and 1.0."""
    text = json.dumps({k: v for k, v in recipe.items() if k != "name"}, sort_keys=True)
    return json.dumps(json.loads(text, parse_float=_as_short_as_it_gets))


def _as_short_as_it_gets(number: str) -> float:
    value = float(number)
    return int(value) if value.is_integer() else value


def read_records(out: Path) -> list[Record]:
    file = out / FILE
    try:
        return [json.loads(line) for line in file.read_text().splitlines() if line] if file.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}. Move it away; finished runs are found again.") from None


def write_records(out: Path, records: dict[Job, Record]) -> None:
    """results.jsonl anew, in the ladder's order, with the records that are of no job of this comparison kept behind."""
    ours = {(job.student, job.method, job.seed) for job in records}
    others = [r for r in read_records(out) if (r["student"], r["method"], r["seed"]) not in ours]
    lines = [json.dumps(r) + "\n" for r in (*records.values(), *others)]
    write_text(out / FILE, "".join(lines))


def _same_recipe(recipe: dict[str, Any], job: Job) -> bool:
    named = recipe | {"name": job.config.name}  # of a run taken from another comparison it is the one there
    try:
        return not recipe_difference(to_yaml(check_config(named, "record")), job.config)
    except UserError:  # of another version
        return False


# ---------------------------------------------------------------- the summary


def summary(ladder: Ladder, jobs: Sequence[Job], records: dict[Job, Record], **told: Any) -> dict[str, Any]:
    """Means, intervals and paired tests of all finished runs; told: what else the page shows."""
    students = list(dict.fromkeys(job.student for job in jobs))
    result: dict[str, Any] = {
        "name": ladder.name,
        "title": ladder.title or ladder.name,
        "metric": "top-1 %",
        "baseline": ladder.baseline,
        "seeds": list(ladder.seeds),
        "planned": len(jobs),
        "finished": len(records),
        "run_seconds": round(sum(r["seconds"] for r in records.values()), 1),
        "commits": sorted({r["made"]["git"] for r in records.values() if r["made"]["git"]}),
        "machine": "; ".join(sorted({r["made"]["machine"] for r in records.values()})),
        "students": {},
    } | told
    for student in students:
        by_method = {
            method: {job.seed: r for job, r in records.items() if (job.student, job.method) == (student, method)}
            for method in ladder.methods
        }
        rows = {method: _alone(by_seed) for method, by_seed in by_method.items()}
        base = by_method[ladder.baseline]
        for method, by_seed in by_method.items():
            if method != ladder.baseline:
                rows[method] |= against(by_seed, base)
        correct(rows)
        for row in rows.values():
            row["reach"] = _reach(row["curve"], rows[ladder.baseline])
        result["students"][student] = rows
    return result


def _alone(by_seed: dict[int, Record]) -> dict[str, Any]:
    top1 = [r["top1"] for r in by_seed.values()]
    samples = [dict(r["curve"]) for r in by_seed.values()]
    shared = sorted(set.intersection(*(set(s) for s in samples))) if samples else []
    return {
        "seeds": list(by_seed),
        "top1": top1,
        "mean": statistics.mean(top1) if top1 else None,
        "ci95": half_width(top1),
        "seconds": statistics.median(r["seconds"] for r in by_seed.values()) if top1 else None,
        "steps": max((r["steps"] for r in by_seed.values()), default=None),
        "curve": [[n, statistics.mean(s[n] for s in samples)] for n in shared],
    }


def against(by_seed: dict[int, Record], base: dict[int, Record]) -> dict[str, Any]:
    """The differences between two rows' runs of the same seeds, their mean, and a t-test of it. Seed -> record."""
    from scipy.stats import ttest_1samp

    gains = [r["top1"] - base[seed]["top1"] for seed, r in by_seed.items() if seed in base]
    testable = len(gains) > 1 and max(gains) > min(gains)
    return {
        "pairs": len(gains),
        "gains": gains,
        "gain": statistics.mean(gains) if gains else None,
        "gain_ci95": half_width(gains),
        "p": float(ttest_1samp(gains, 0).pvalue) if testable else None,
        "p_holm": None,
    }


def _reach(curve: list[list[float]], base: dict[str, Any]) -> float | None:
    """The samples after which a mean curve is where the baseline ends, as a share of the baseline's; None if it never is.

    On straight lines between validations; with the first one, if it is there already.
    """
    if not curve or not base["curve"]:
        return None
    (x, y), goal, whole = curve[0], base["curve"][-1][1], base["curve"][-1][0]
    if y >= goal:
        return x / whole
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 >= goal:
            return (x0 + (x1 - x0) * (goal - y0) / (y1 - y0)) / whole
    return None


def correct(rows: dict[str, dict[str, Any]]) -> None:
    """Holm's correction over the tests of all rows, in place."""
    tested = sorted((row for row in rows.values() if row.get("p") is not None), key=lambda row: row["p"])
    highest = 0.0
    for i, row in enumerate(tested):
        highest = max(highest, min(1.0, row["p"] * (len(tested) - i)))
        row["p_holm"] = highest
