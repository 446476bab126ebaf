"""Records of a comparison's finished runs, one line of results.jsonl each, and their statistics."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import write_text
from scalekd.common.intervals import half_width
from scalekd.common.sections import to_yaml
from scalekd.common.text import printable, shortened
from scalekd.config.losses import written_out
from scalekd.config.recipe import check_config
from scalekd.methods.names import METHODS
from scalekd.train.hardware import held_in
from scalekd.train.log import read_log
from scalekd.train.resume import recipe_difference

from .figure import figure_in
from .ladder import Job, Ladder, plain

Record = dict[str, Any]
FILE = "results.jsonl"


def record_of(job: Job, folder: Path) -> Record | None:
    """The record of the finished run in `folder`; None if it is unfinished or has another recipe."""
    recipe, summary = folder / "recipe.yaml", folder / "summary.json"
    if not summary.is_file() or not recipe.is_file() or recipe_difference(recipe.read_text(), job.config):
        return None
    try:
        result, made = json.loads(summary.read_text()), json.loads((folder / "provenance.json").read_text())
        return _record(job, folder, result, made)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} holds a finished run whose files are damaged ({first_line(error)}); remove the folder to run it again"
        ) from None


def _record(job: Job, folder: Path, result: dict[str, Any], made: dict[str, Any]) -> Record:
    batch = job.config.train.batch_size
    validations = [e for e in read_log(folder) if e["event"] == "validation"]
    figure = figure_in(result)
    curve = {e["step"] * batch: e[figure] for e in validations}  # a validation repeated after a resume counts once
    return {
        "student": job.student,
        "method": job.method,
        "seed": job.seed,
        figure: result[figure],
        "seconds": result["seconds"],
        "steps": result["steps"],
        "curve": sorted(curve.items()),
        "made": {key: made.get(key) for key in ("machine", "scalekd", "torch", "timm", "git")},
        "recipe": recipe_of(job),
    }


def known_records(out: Path, jobs: Iterable[Job], others: Iterable[Path] = ()) -> dict[Job, Record]:
    """The records of the finished runs among `jobs`.

    They come from results.jsonl (the runs' folders may be deleted), from the runs' folders, or from `others`, the
    folders of other comparisons. A run of another comparison counts if its recipe is the same, whatever its labels.
    """
    by_label = {(job.student, job.method, job.seed): job for job in jobs}
    records: dict[Job, Record] = {}
    for record in read_records(out):
        job = by_label.get((record["student"], record["method"], record["seed"]))
        if job is not None and _same_recipe(record["recipe"], job):
            records[job] = record
    for job in by_label.values():
        if job not in records and (from_folder := record_of(job, out / "runs" / job.folder)):
            records[job] = from_folder
    # also of `out`: labels of a ladder may change between versions
    elsewhere = {_key(r["recipe"]): (r, folder) for folder in (out, *others) for r in read_records(folder)}
    for job in by_label.values():
        if job not in records and (equal := elsewhere.get(_key(recipe_of(job)))):
            record, folder = equal
            run = folder / "runs" / plain(record["student"]) / plain(record["method"]) / f"seed-{record['seed']}"
            named = {"student": job.student, "method": job.method, "from": str(folder)}
            records[job] = {"run": str(run)} | record | named
    return records


def held_values(out: Path) -> dict[str, Any]:
    """`precision` and `channels_last` of the runs that began in `out` before, for recipes that say `auto`; or {}."""
    trains = [record["recipe"].get("train") or {} for record in read_records(out)[:1]]
    for recipe in () if trains else sorted((out / "runs").rglob("recipe.yaml"))[:1]:
        trains = [held_in(recipe.parent)]
    return {"precision": "float32", "channels_last": False} | trains[0] if trains else {}


def recipe_of(job: Job) -> dict[str, Any]:
    """The recipe in a record: every key that differs from its default, and every option of the losses."""
    return job.config.model_dump(mode="json", exclude_defaults=True) | {"losses": written_out(job.config.losses)}


def _key(recipe: dict[str, Any]) -> str:
    """A key for a recipe. Equal for recipes that differ only in name, data workers, or how a number is written (1, 1.0).

    Options of the losses that the version which wrote the recipe did not have get their defaults.
    """
    data = {k: v for k, v in (recipe.get("data") or {}).items() if k != "workers"}
    defaults = written_out({name: {} for name in recipe["losses"] if name in METHODS})
    losses = {name: defaults.get(name, {}) | o for name, o in recipe["losses"].items()}
    whole = recipe | {"data": data, "losses": losses}
    text = json.dumps({k: v for k, v in whole.items() if k != "name"}, sort_keys=True)
    return json.dumps(json.loads(text, parse_float=_integer_if_whole))


def _integer_if_whole(number: str) -> float:
    value = float(number)
    return int(value) if value.is_integer() else value


class _Made(BaseModel):
    machine: str
    git: str | None


class _Written(BaseModel):
    """The keys of a record that are read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    student: str
    method: str
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    top1: Annotated[float, Field(ge=0, le=100)] | None = None
    map: Annotated[float, Field(ge=0, le=100)] | None = None
    seconds: Annotated[float, Field(ge=0, lt=1e12)]
    steps: Annotated[int, Field(ge=0, lt=2**53)]
    curve: list[tuple[Annotated[int, Field(gt=0, lt=2**53)], Annotated[float, Field(ge=0, le=100)]]]
    made: _Made
    recipe: dict[str, Any]
    run: str = ""

    @model_validator(mode="after")
    def _has_a_figure(self) -> _Written:
        if (self.top1 is None) == (self.map is None):
            raise ValueError("it needs either top1 or map")
        return self


def read_records(out: Path) -> list[Record]:
    """The lines of results.jsonl in `out`; empty without the file. Raises `UserError` if it is broken."""
    file = out / FILE
    number = 0
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        records = []
        for line in lines:
            number += 1
            if line:
                records.append(json.loads(line))
                _check(records[-1])
        return records
    except (OSError, ValueError, RecursionError) as error:
        text = f"line {number}: {_fault(error)}" if number else first_line(error)
        raise UserError(
            f"{file} cannot be read: {shortened(text, 300)}. Move it away; finished runs are then read from their folders."
        ) from None


def _check(record: Any) -> None:
    """Raises `ValueError` unless the record has what is read of it."""
    losses = _Written.model_validate_json(json.dumps(record)).recipe.get("losses")
    if not isinstance(losses, dict) or not all(isinstance(options, dict) for options in losses.values()):
        raise ValueError("recipe.losses is unusable")
    for section in ("train", "data"):
        if not isinstance(record["recipe"].get(section) or {}, dict):
            raise ValueError(f"recipe.{section} is unusable")


def _fault(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return first_line(error)
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ")


def write_records(out: Path, records: dict[Job, Record]) -> None:
    """Rewrites results.jsonl in the ladder's order; records of other jobs in the file are kept at its end."""
    ours = {(job.student, job.method, job.seed) for job in records}
    others = [r for r in read_records(out) if (r["student"], r["method"], r["seed"]) not in ours]
    lines = [json.dumps(r) + "\n" for r in (*records.values(), *others)]
    write_text(out / FILE, "".join(lines))


def _same_recipe(recipe: dict[str, Any], job: Job) -> bool:
    named = recipe | {"name": job.config.name}  # a run from another comparison has that comparison's name
    try:
        return not recipe_difference(to_yaml(check_config(named, "record")), job.config)
    except UserError:  # written by another version
        return False


# ---------------------------------------------------------------- the summary


def summary(ladder: Ladder, jobs: Sequence[Job], records: dict[Job, Record], **facts: Any) -> dict[str, Any]:
    """Means, 95 % intervals and paired t-tests of all finished runs.

    facts: added to the summary, for the page: metric (top-1 % by default), about, command, versions, teacher_top1,
        wall_seconds, failed.
    """
    students = list(dict.fromkeys(job.student for job in jobs))
    key = figure_in(next(iter(records.values()), {"top1": None}))
    result: dict[str, Any] = {
        "name": ladder.name,
        "title": printable(ladder.title or ladder.name),
        "metric": "top-1 %",
        "baseline": ladder.baseline,
        "seeds": list(ladder.seeds),
        "planned": len(jobs),
        "finished": len(records),
        "run_seconds": round(sum(r["seconds"] for r in records.values()), 1),
        "commits": sorted({r["made"]["git"] for r in records.values() if r["made"]["git"]}),
        "machine": "; ".join(sorted({r["made"]["machine"] for r in records.values()})),
        "students": {},
    } | facts
    for student in students:
        by_method = {
            method: {job.seed: r for job, r in records.items() if (job.student, job.method) == (student, method)}
            for method in ladder.methods
        }
        rows = {method: _alone(by_seed, key) for method, by_seed in by_method.items()}
        base = by_method[ladder.baseline]
        for method, by_seed in by_method.items():
            if method != ladder.baseline:
                rows[method] |= against(by_seed, base)
        correct(rows)
        for row in rows.values():
            row["reach"] = _reach(row["curve"], rows[ladder.baseline])
        result["students"][student] = rows
    return result


def _alone(by_seed: dict[int, Record], key: str) -> dict[str, Any]:
    """A method's row of the summary without its difference to the baseline. Seed -> record. key: of the figure."""
    figures = [r[key] for r in by_seed.values()]
    samples = [dict(r["curve"]) for r in by_seed.values()]
    shared = sorted(set.intersection(*(set(s) for s in samples))) if samples else []
    return {
        "seeds": list(by_seed),
        key: figures,
        "mean": statistics.mean(figures) if figures else None,
        "ci95": half_width(figures),
        "seconds": statistics.median(r["seconds"] for r in by_seed.values()) if figures else None,
        "steps": max((r["steps"] for r in by_seed.values()), default=None),
        "curve": [[n, statistics.mean(s[n] for s in samples)] for n in shared],
    }


def against(by_seed: dict[int, Record], base: dict[int, Record]) -> dict[str, Any]:
    """Differences in top-1, or mAP, in points between runs of the same seed, their mean, and its paired t-test.

    Seed -> record.
    """
    from scipy.stats import ttest_1samp

    gains = [r[figure_in(r)] - base[seed][figure_in(r)] for seed, r in by_seed.items() if seed in base]
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
    """The share of the baseline's samples after which `curve` reaches the baseline's final value; None if never.

    Linear between validations. A curve that is there at its first validation gets that validation's share.
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
    """Sets `p_holm` of all rows in place: `p` with Holm's correction for the number of tests."""
    tested = sorted((row for row in rows.values() if row.get("p") is not None), key=lambda row: row["p"])
    highest = 0.0
    for i, row in enumerate(tested):
        highest = max(highest, min(1.0, row["p"] * (len(tested) - i)))
        row["p_holm"] = highest
