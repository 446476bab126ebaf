"""The laboratory's files agree: the ladders that lab/ladders.py writes, what was run of them, and the tables made of that."""

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
from tables import told  # noqa: E402

RUN = sorted(folder.name for folder in RESULTS.iterdir() if (LAB / f"{folder.name}.yaml").is_file())

NOT_LOOKED_AT = {"about": [], "command": "", "versions": {}, "teacher_top1": None, "wall_seconds": 0, "failed": []}


def test_the_ladder_files_are_those_that_the_results_give(monkeypatch, tmp_path):
    monkeypatch.setattr(ladders, "HERE", tmp_path)
    ladders.main()
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written == {name: (LAB / name).read_text() for name in written}
    assert sorted(name.removesuffix(".yaml") for name in written) == RUN


@pytest.mark.parametrize("name", RUN)
def test_no_run_would_be_run_again(name):
    # of the first seed; the others differ by it only
    ladder = chosen(load_ladder(str(LAB / f"{name}.yaml")), [], [], 1)
    planned = jobs(ladder)
    assert set(known_records(RESULTS / name, planned)) == set(planned)


@pytest.mark.parametrize("name", RUN)
def test_the_table_is_that_of_the_records(name):
    ladder = load_ladder(str(LAB / f"{name}.yaml"))
    records = {Job(r["student"], r["method"], r["seed"], None): r for r in read_records(RESULTS / name)}
    ours = [job for job in records if job.student in ladder.students and job.method in ladder.methods]
    assert len(ours) == len(ladder.students) * len(ladder.methods) * len(ladder.seeds)
    page = markdown(summary(ladder, ours, {job: records[job] for job in ours}, **NOT_LOOKED_AT))
    assert told(page) == told((RESULTS / name / "summary.md").read_text())


def claims(folder: Path) -> Any:
    """As written, less the last digits, which hang on the releases of NumPy and SciPy."""
    return json.loads(
        (folder / "order.json").read_text(), parse_float=lambda text: round(float(f"{float(text):.9g}"), 12)
    )


@pytest.mark.parametrize("name", order.CLAIMS)
def test_the_claims_are_those_of_the_records(name, tmp_path):
    out = tmp_path / name
    out.mkdir()
    shutil.copy(RESULTS / name / "results.jsonl", out)
    order.main(out)
    assert claims(out) == claims(RESULTS / name)
    assert told((out / "order.md").read_text()) == told((RESULTS / name / "order.md").read_text())
