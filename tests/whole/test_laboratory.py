"""The laboratory's files agree: the ladders from lab/ladders.py, the records of their runs, and the tables."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from scalekd.compare.ladder import Job, chosen, jobs, load_ladder
from scalekd.compare.page import markdown
from scalekd.compare.results import known_records, read_records, summary

ROOT = Path(__file__).parents[2]
LAB, RESULTS = ROOT / "lab", ROOT / "docs" / "results" / "lab"
sys.path += [str(LAB), str(ROOT / "benchmarks")]
import ladders  # noqa: E402
import order  # noqa: E402
from tables import shown_part  # noqa: E402

RUN = sorted(folder.name for folder in RESULTS.iterdir() if (LAB / f"{folder.name}.yaml").is_file())

IGNORED_FACTS = {"about": [], "command": "", "versions": {}, "teacher_top1": None, "wall_seconds": 0, "failed": []}


def test_the_ladder_files_follow_from_the_results(monkeypatch, tmp_path):
    monkeypatch.setattr(ladders, "HERE", tmp_path)
    ladders.main()
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written == {name: (LAB / name).read_text() for name in written}
    assert sorted(name.removesuffix(".yaml") for name in written) == RUN


@pytest.mark.parametrize("name", RUN)
def test_every_planned_run_is_recorded(name):
    # the first seed alone; the others differ only in their seed
    ladder = chosen(load_ladder(str(LAB / f"{name}.yaml")), [], [], 1)
    planned = jobs(ladder)
    assert set(known_records(RESULTS / name, planned)) == set(planned)


@pytest.mark.parametrize("name", RUN)
def test_the_table_follows_from_the_records(name):
    ladder = load_ladder(str(LAB / f"{name}.yaml"))
    records = {Job(r["student"], r["method"], r["seed"], None): r for r in read_records(RESULTS / name)}
    ours = [job for job in records if job.student in ladder.students and job.method in ladder.methods]
    assert len(ours) == len(ladder.students) * len(ladder.methods) * len(ladder.seeds)
    page = markdown(summary(ladder, ours, {job: records[job] for job in ours}, **IGNORED_FACTS))
    assert shown_part(page) == shown_part((RESULTS / name / "summary.md").read_text())


def claims(folder: Path) -> Any:
    """The content of order.json without the last digits, which depend on the versions of NumPy and SciPy."""
    return json.loads(
        (folder / "order.json").read_text(), parse_float=lambda text: round(float(f"{float(text):.9g}"), 12)
    )


@pytest.mark.parametrize("name", order.CLAIMS)
def test_the_claims_follow_from_the_records(name, tmp_path):
    out = tmp_path / name
    out.mkdir()
    shutil.copy(RESULTS / name / "results.jsonl", out)
    order.main(out)
    assert claims(out) == claims(RESULTS / name)
    assert shown_part((out / "order.md").read_text()) == shown_part((RESULTS / name / "order.md").read_text())
