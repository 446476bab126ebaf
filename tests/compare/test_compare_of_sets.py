"""`scalekd compare` on images with sets of labels: mAP in place of top-1, and what cannot be compared."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import comparisons
import launcher
import pytest
import yaml
from labelled_sets import write_sets
from scipy import stats
from whole_runs import TINY, changed

from scalekd.common.errors import UserError
from scalekd.compare.figure import open_data, refuse_other_figures
from scalekd.compare.ladder import jobs, load_ladder
from scalekd.compare.page import html, markdown
from scalekd.compare.plot import curve_plot, gain_plot
from scalekd.compare.results import read_records, summary, write_records

TABLE = "labels.csv:separator=pipe"
METHODS = {
    "none": {"teacher": None, "losses": {"bce": {}}},
    "KD": {"losses": {"bce": {}, "kd": {"probabilities": "sigmoid"}}},
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write_sets(root / "train", 24)
    write_sets(root / "val", 12, seed=1)
    return root


@pytest.fixture
def ladder_file(tables, tmp_path):
    """`ladder_file(**fields)` -> the path of a ladder on the tiny recipe with sets of labels, two seeds of one epoch."""
    data = {"train": str(tables / "train" / TABLE), "val": str(tables / "val" / TABLE)}
    recipe = changed(TINY, data=data, losses={"bce": {}}, train={"epochs": 1})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))

    def write(**fields: Any) -> str:
        values = {"name": "try", "recipe": "tiny.yaml", "methods": METHODS, "baseline": "none", "seeds": [0, 1]}
        (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(values | fields, sort_keys=False))
        return str(tmp_path / "ladder.yaml")

    return write


@pytest.mark.slow
def test_a_comparison_of_map_and_a_second_call(ladder_file, tmp_path):
    out = tmp_path / "out"
    file = ladder_file()
    started = launcher.start("-m", "scalekd", "compare", file, "--out", out, "--device", "cpu", fork_server=True)
    text, err = started.communicate(timeout=250)
    assert started.returncode == 0, err
    assert text.count(": mAP ") == 4 and "top-1" not in text
    made = json.loads((out / "summary.json").read_text())
    assert made["metric"] == "mAP %" and made["teacher_top1"] is None
    rows = made["students"]["test_resnet"]
    for method in METHODS:
        runs = [json.loads((out / f"runs/test_resnet/{method}/seed-{s}/summary.json").read_text()) for s in (0, 1)]
        assert rows[method]["map"] == [run["map"] for run in runs] and "top1" not in rows[method]
        assert len(rows[method]["curve"]) == 1
    gains = [b - a for a, b in zip(rows["none"]["map"], rows["KD"]["map"])]
    assert rows["KD"]["gains"] == gains and rows["KD"]["gain"] == pytest.approx(statistics.mean(gains))
    for name in ("summary.md", "report.html", "gain.svg", "curves.svg"):
        page = (out / name).read_text()
        assert "top-1" not in page and ("mAP" in page or name == "gain.svg")
    again = launcher.start("-m", "scalekd", "compare", file, "--out", out, "--device", "cpu", fork_server=True)
    text, err = again.communicate(timeout=250)
    assert again.returncode == 0 and "4 of them already finished" in text, err


def record(job, figures: dict[str, float]) -> dict[str, Any]:
    made = {"machine": "m", "git": "abc", "scalekd": "1", "torch": "2", "timm": "1"}
    whole = {"student": job.student, "method": job.method, "seed": job.seed, "seconds": 9.0, "steps": 3, "curve": []}
    return whole | figures | {"made": made, "recipe": job.config.model_dump(mode="json")}


def test_means_and_paired_tests_of_map_are_those_of_scipy(ladder_file, tmp_path):
    maps = {"none": [50.0, 52.0, 51.0], "KD": [51.5, 52.5, 52.0]}
    ladder = load_ladder(ladder_file(seeds=[0, 1, 2]))
    records = {job: record(job, {"map": maps[job.method][job.seed]}) for job in jobs(ladder)}
    write_records(tmp_path, records)
    assert read_records(tmp_path) == [json.loads(json.dumps(r)) for r in records.values()]
    rows = summary(ladder, list(records), records, metric="mAP %")["students"]["test_resnet"]
    low, high = stats.t.interval(0.95, 2, statistics.mean(maps["KD"]), stats.sem(maps["KD"]))
    assert rows["KD"]["map"] == maps["KD"] and rows["KD"]["ci95"] == pytest.approx((high - low) / 2)
    assert rows["KD"]["p"] == pytest.approx(stats.ttest_rel(maps["KD"], maps["none"]).pvalue)
    for wrong in ({}, {"top1": 50.0, "map": 50.0}, {"map": 101.0}):
        (tmp_path / "results.jsonl").write_text(json.dumps(record(next(iter(records)), wrong)) + "\n")
        with pytest.raises(UserError, match=r"line 1: .*(top1|map)"):
            read_records(tmp_path)


def test_pages_have_map_wherever_they_had_top1():
    found = comparisons.summary(metric="mAP %", teacher_top1=None)
    for methods in found["students"].values():
        for cell in methods.values():
            cell["map"] = cell.pop("top1")
    drawn = [markdown(found), html(found), gain_plot(found), curve_plot(found)]
    before = comparisons.summary(teacher_top1=None)
    plain = [markdown(before), html(before), gain_plot(before), curve_plot(before)]
    for page, other in zip(drawn, plain):
        assert "top-1" not in page and "top1" not in page and "Accuracy" not in page
        assert page == other.replace("top-1 %", "mAP %").replace("Accuracy over", "mAP over")


def test_methods_of_different_labels_are_not_mixed(ladder_file, image_folder):
    one = {"teacher": None, "data": {"train": str(image_folder / "train"), "val": str(image_folder / "val")}}
    planned = jobs(load_ladder(ladder_file(methods=METHODS | {"one": one})))
    told = "test_resnet, none have sets of labels, those of test_resnet, one one label each.*mAP and top-1"
    with pytest.raises(UserError, match=told):
        open_data(planned)


def test_losses_that_do_not_suit_are_told_at_once_before_any_run(ladder_file, cli, tmp_path):
    methods = METHODS | {"dist": {"losses": {"ce": {}, "dist": {}}}, "fd": {"losses": {"bce": {}, "fd": {}}}}
    refused = cli("compare", ladder_file(methods=methods), "--out", tmp_path / "out")
    assert refused.code == 2 and "test_resnet, dist: 1 problem" in refused.err and "own-labels-ladder" in refused.err
    assert refused.err.count("needs one class per image") == 2 and "losses.dist" in refused.err
    assert "fd" not in refused.err and not list((tmp_path / "out").glob("runs/*"))


def test_finished_runs_of_other_labels_do_not_count(ladder_file):
    planned = jobs(load_ladder(ladder_file()))
    refuse_other_figures({planned[0]: {"map": 1.0}}, several=True)
    with pytest.raises(
        UserError, match="the labels changed since test_resnet none seed 0 was finished: its figure is top-1"
    ):
        refuse_other_figures({planned[0]: {"top1": 1.0}}, several=True)


def test_the_shipped_ladder_s_losses_suit_sets(ladder_file):
    shipped = load_ladder("own-labels-ladder")
    assert open_data(
        jobs(load_ladder(ladder_file(methods=dict(shipped.methods), baseline=shipped.baseline)))
    ).multi_label
