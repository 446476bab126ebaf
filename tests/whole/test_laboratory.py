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
import newer  # noqa: E402
import order  # noqa: E402
from tables import shown_part  # noqa: E402

RUN = sorted(folder.name for folder in RESULTS.iterdir() if (LAB / f"{folder.name}.yaml").is_file())
NEWER = {"newer-search", "newer-edges", "newer", "label-free", "vit-search", "newer-vit"}  # written by newer.py

IGNORED_FACTS = {"about": [], "command": "", "versions": {}, "teacher_top1": None, "wall_seconds": 0, "failed": []}


def test_the_ladder_files_follow_from_the_results(monkeypatch, tmp_path):
    monkeypatch.setattr(ladders, "HERE", tmp_path)
    ladders.main()
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written == {name: (LAB / name).read_text() for name in written}
    assert sorted(name.removesuffix(".yaml") for name in written) == [name for name in RUN if name not in NEWER]


def test_the_ladders_of_newer_methods_follow_from_the_results(monkeypatch, tmp_path):
    monkeypatch.setattr(ladders, "HERE", tmp_path)
    newer.main()
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written.keys() >= {"newer-search.yaml", "vit-search.yaml"}
    assert {name.removesuffix(".yaml") for name in written} <= NEWER
    assert written == {name: (LAB / name).read_text() for name in written}


def test_the_newer_methods_stand_at_their_best_tries(monkeypatch, tmp_path):
    monkeypatch.setattr(ladders, "HERE", tmp_path)
    shutil.copy(LAB / "base.yaml", tmp_path)
    newer.main()
    recorded = {}
    for name in ("newer-search", "vit-search"):
        labels = list(load_ladder(str(tmp_path / f"{name}.yaml")).methods)
        recorded[name] = {
            label: 50.0 + number for number, label in enumerate(labels)
        }  # the last try of each is the best
    recorded["newer-edges"] = {"WKD-F x30": 99.0}
    known = newer.top1
    monkeypatch.setattr(newer, "top1", lambda name: recorded.get(name) or known(name))
    newer.main()
    edges, students, vit = (
        load_ladder(str(tmp_path / f"{name}.yaml")) for name in ("newer-edges", "newer", "newer-vit")
    )
    assert {"WKD-L x30", "WKD-L x100", "FM x30"} < set(edges.methods) and "WKD-L x10" not in edges.methods
    assert students.methods["WKD-F"]["losses"]["wkd_f"] == {"weight": 30.0}
    assert students.methods["VkD"]["losses"]["vkd"] == {"weight": 10.0}
    assert students.methods["WTTM"]["losses"]["kd"] == {"weight": 3, "temperature": 4, "variant": "wttm"}
    assert vit.methods["Lift"]["losses"]["mse"] == {"weight": 10, "lifted": True}
    assert vit.methods["Lift, no teacher"]["teacher"] is None
    assert len(jobs(vit)) == 3 * len(vit.methods) and len(jobs(students)) == 9 * len(students.methods)


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
