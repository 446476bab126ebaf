"""`scalekd report` on folders whose files are cut off, emptied, retyped, huge or incomplete: a page or a message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from damage import some_of

from scalekd.common.errors import UserError
from scalekd.compare.report import report_any
from scalekd.report import run as report_run

FILES = [
    "recipe.yaml", "log.jsonl", "summary.json", "student.json", "provenance.json", "report.json", "last.pt",
    "student.safetensors", "README.md",
]  # fmt: skip


@pytest.fixture
def damaged(finished, tmp_path, monkeypatch):
    """(name, content) -> the lines that the report of the run with this file prints; raises anything but `UserError`.

    The run's images are gone, which makes a report take milliseconds.
    """
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace(str(finished), str(tmp_path / "gone")))

    def no_costs(*_, **__):
        raise UserError("not counted")

    def reported(name: str, content: bytes | None) -> list[str]:
        if name != "recipe.yaml":
            monkeypatch.setattr(report_run, "cost", no_costs)  # half a second each
        before = {file: (run / file).read_bytes() for file in FILES}
        (run / name).write_bytes(content) if content is not None else (run / name).unlink()
        try:
            _, lines = report_any(run, "cpu")
            assert (run / "report.html").read_text().endswith("</html>\n")
            return lines
        except UserError as error:
            assert len(str(error).splitlines()) <= 40
            return [str(error)]
        finally:
            for file, data in before.items():
                (run / file).write_bytes(data)

    reported.run = run
    return reported


def check(damaged, number: int) -> None:
    for name, content in some_of(damaged.run, FILES, number):
        try:
            damaged(name, content)
        except Exception as error:
            raise AssertionError(f"{name}: {content[:3000]!r}") from error


def test_a_damaged_file_never_ends_in_a_traceback(damaged):
    check(damaged, 4)


@pytest.mark.slow
def test_many_damaged_files(damaged):
    check(damaged, 40)


@pytest.mark.parametrize("name", ["summary.json", "provenance.json", "report.json", "student.json"])
def test_what_is_damaged_is_named(damaged, name):
    assert any(f"{name} " in line and "left out" in line for line in damaged(name, b'{"a": 1'))


def test_damaged_values_are_named_and_others_are_shown(damaged):
    summary = json.loads((damaged.run / "summary.json").read_text())
    lines = damaged("summary.json", json.dumps(summary | {"top1": "high", "seconds": float("nan")}).encode())
    assert any("summary.json has unusable values, which are left out: top1, seconds" in line for line in lines)
    log = (damaged.run / "log.jsonl").read_text()
    assert any(
        "1 events have unusable" in line
        for line in damaged("log.jsonl", log.replace('"lr": ', '"lr": "x", "b": ', 1).encode())
    )
    (line,) = damaged("recipe.yaml", b"name: x\nstudent: 3\ndata: {}\n")
    assert "recipe.yaml is not a recipe: unusable values at student" in line


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(damaged, name):
    damaged(name, None)
