"""benchmarks/gpu.py runs whole on a CPU with tiny models; a row that fails, hangs or crashes costs that row only."""

from __future__ import annotations

import inspect
import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_table  # noqa: E402
from gpu_models import LEVERS, recipe  # noqa: E402
from gpu_speed import covered  # noqa: E402
from row_worker import Worker  # noqa: E402

NEEDS_A_GPU = {"tiny default 8 tf32", "tiny kd 8 graphs"}
SHOWN = NEEDS_A_GPU | {
    "tiny floor 8 plain", "tiny literal 8 plain", "tiny fd 8 plain", "tiny default 8 plain", "tiny default 8 float32",
    "tiny default 8 streams", "tiny kd 8 teacher+compile",
}  # fmt: skip


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """The rows of the whole script, from its file."""
    out = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    gpu.run(gpu.rows(tiny=True), "cpu", time.monotonic() + 280, out)
    return gpu.read(out)


def test_every_part_runs_without_a_gpu(entries):
    assert len(entries) == len(gpu.rows(tiny=True))
    assert {entry["part"] for entry in entries} == set(gpu.PARTS)
    assert {entry["name"] for entry in entries if "error" in entry} == NEEDS_A_GPU
    for entry in entries:
        if entry["name"] in NEEDS_A_GPU:
            assert "needs a GPU" in entry["error"]
        elif entry["part"] == "checks":
            assert entry["result"]["passed"], entry
        elif entry["part"] in ("speed", "input"):
            assert entry["result"]["images_per_s"] > 0
    methods = next(e["result"] for e in entries if e["name"] == "float32, every method")
    assert 0 < methods["scalekd"]["gradient"] < 1e-4  # against float64: not zero, so it compares


def test_its_page(entries, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    for entry in entries:  # as if it had been a GPU that `plan` knows
        if entry["name"] == "environment":
            entry["result"] |= {"machine": "NVIDIA H200", "memory_gb": 150.1}
        if entry["part"] == "speed" and "result" in entry:
            entry["result"] |= {"peak_mb": 1000.0, "busy": 0.5}
    entries = [e for e in entries if e["part"] != "speed" or e["name"] in SHOWN]
    rows.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    figures = tmp_path / "gpus.json"
    figures.write_text(json.dumps({"a100": {"steps": []}}))
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(rows), "--out", str(tmp_path), "--figures", str(figures)])
    gpu_table.main()
    page = (tmp_path / "nvidia-h200.md").read_text()
    floor, default = (gpu_table.speed_of(entries, "tiny", form, 8, "plain") for form in ("floor", "default"))
    assert f"| default, plain | {default['images_per_s']:,.0f} |" in page
    assert f"| {default['ms'][0] / floor['ms'][0]:.2f} |" in page
    assert "| float32, every method | passed |" in page and "| 1.00 | 1.00 | 50 |" in page
    assert "tiny default 8 tf32: UserError: train.tf32 needs a GPU" in page
    known = json.loads(figures.read_text())
    assert known.keys() == {"a100", "h200"} and known["h200"]["device"] == "NVIDIA H200"
    steps = {step["step"]: step for step in known["h200"]["steps"]}
    assert set(steps) == {
        "tiny fd 8 plain",
        "tiny default 8 plain",
        "tiny default 8 float32",
        "tiny kd 8 teacher+compile",
    }
    assert steps["tiny default 8 float32"]["half"] is False and steps["tiny kd 8 teacher+compile"]["compiled"] is True
    assert steps["tiny default 8 plain"]["flops_per_image"] > steps["tiny fd 8 plain"]["flops_per_image"]


def test_the_real_rows_call_the_tested_functions_with_valid_options():
    real, tiny = gpu.rows(tiny=False), gpu.rows(tiny=True)
    names = [row.name for row in real]
    assert len(set(names)) == len(names) > 500
    assert {f"swin-l-vit-s published 64 {levers}" for levers in LEVERS} < set(names) and "floor 64 teacher" not in str(
        names
    )
    assert {row.function for row in real} == {row.function for row in tiny}
    for row in {row.function: row for row in real}.values():
        module, _, name = row.function.rpartition(".")
        inspect.signature(getattr(import_module(module), name)).bind(**row.options, device="cuda")
    steps = [row.options for row in real if row.function == "gpu_speed.step_speed"]
    assert {options["levers"] for options in steps} <= LEVERS.keys()
    for pair, form, levers in {(o["pair"], o["form"], o["levers"]) for o in steps}:
        recipe(pair, form, 64, LEVERS[levers])  # raises if the values cannot go together


def test_a_row_that_fails_hangs_or_crashes_costs_that_row_only():
    worker = Worker()
    try:
        assert worker.call("json.dumps", {"obj": [1]}, 30) == {"result": "[1]"}
        first = worker.process.pid
        assert worker.call("json.loads", {"s": "{"}, 30)["error"].startswith("JSONDecodeError: ")
        assert worker.call("subprocess.check_call", {"args": ["echo", "not an answer"]}, 30) == {"result": 0}
        assert worker.process.pid == first  # one process for all of them
        began = time.monotonic()
        hung = worker.call("subprocess.check_call", {"args": ["sleep", "60"]}, 0.5)
        assert hung == {"error": "stopped at its limit of 0 s"} and time.monotonic() - began < 20
        assert worker.call("os._exit", {"status": 3}, 30) == {"error": "the process ended: exit code 3"}
        assert worker.call("json.dumps", {"obj": 2}, 30) == {"result": "2"}
    finally:
        worker.close()


def test_missing_rows_are_run_and_others_are_not(tmp_path, monkeypatch, capsys):
    made = [
        gpu.Row("checks", "good", "json.dumps", {"obj": 1, "sort_keys": True}, 30),
        gpu.Row("checks", "bad", "json.loads", {"s": "{"}, 30),
    ]
    monkeypatch.setattr(gpu, "rows", lambda tiny: iter(made))
    monkeypatch.setattr(Worker, "call", lambda self, name, options, limit: answers.pop(0))
    out = tmp_path / "new" / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(out)])
    answers = [{"result": {"passed": True}}, {"error": "RuntimeError: of\ntwo lines"}]
    gpu.main()
    assert "ERROR RuntimeError: of\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--missing"])
    answers = [{"result": {"passed": False}}]
    gpu.main()
    assert not answers and "failed: bad" in capsys.readouterr().out
    rows = gpu.read(out)
    assert [(row["name"], row["result"]["passed"]) for row in rows] == [("good", True), ("bad", False)]
    answers = [{"error": "worse"}] * 2
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    gpu.main()
    assert gpu.read(out) == rows  # an error does not replace a result


def test_rows_after_the_deadline_are_not_run(tmp_path, capsys):
    made = [gpu.Row("checks", "late", "json.dumps", {}, 30)]
    assert gpu.run(made, "cpu", time.monotonic(), tmp_path / "rows.jsonl") == []
    assert "1 rows were not run" in capsys.readouterr().out


def test_the_share_of_time_in_which_something_runs():
    assert covered([]) is None
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.8), (7, 10)]) == pytest.approx(7 / 10)
