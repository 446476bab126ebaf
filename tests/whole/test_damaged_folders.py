"""`scalekd report` on folders whose files are cut off, emptied, retyped, huge or incomplete: a page or a message."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalekd.common.errors import UserError
from scalekd.compare.report import report_any
from scalekd.report import run as report_run

FILES = [
    "recipe.yaml", "log.jsonl", "summary.json", "student.json", "provenance.json", "report.json", "last.pt",
    "student.safetensors", "README.md",
]  # fmt: skip
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
]


def raw_mutations(data: bytes) -> Iterator[bytes]:
    yield from (
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{}",
        b"{",
        data[: len(data) // 2],
        data[:-3],
        b"[" * 9999,
    )
    yield data[: len(data) // 2] + bytes(8) + data[len(data) // 2 + 8 :]


def value_mutations(value: Any) -> Iterator[Any]:
    """`value` with any one of its parts, at any depth, removed or replaced."""
    yield from VALUES
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: other} for other in value_mutations(inner))
    elif isinstance(value, list):
        for i, inner in list(enumerate(value))[:3]:
            yield from ([*value[:i], other, *value[i + 1 :]] for other in value_mutations(inner))


def mutations(folder: Path) -> dict[str, list[Callable[[], bytes | str]]]:
    """File -> functions that make contents that it could have; only a few of them are called."""
    found: dict[str, list[Callable[[], bytes | str]]] = {}
    for name in FILES:
        data = (folder / name).read_bytes()
        found[name] = [partial(bytes, raw) for raw in raw_mutations(data)]
        if name == "recipe.yaml":
            found[name] += [partial(yaml.safe_dump, v) for v in value_mutations(yaml.safe_load(data))]
        elif name == "log.jsonl":
            lines = data.decode().splitlines()
            for i, line in enumerate(lines):
                found[name] += [partial(with_line, lines, i, v) for v in value_mutations(json.loads(line))]
        elif name.endswith(".json"):
            found[name] += [partial(json.dumps, v) for v in value_mutations(json.loads(data))]
    return found


def with_line(lines: list[str], i: int, value: Any) -> str:
    return "\n".join([*lines[:i], json.dumps(value), *lines[i + 1 :]])


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
    chosen = random.Random(0)
    for name, contents in mutations(damaged.run).items():
        for made in chosen.sample(contents, min(number, len(contents))):
            content = made()
            content = content.encode() if isinstance(content, str) else content
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
