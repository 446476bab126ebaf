"""The structure of the code: who imports whom, and how long things are."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PYTHON = [
    p for folder in ("src", "tests", "lab", "benchmarks", "examples", "tools") for p in (ROOT / folder).rglob("*.py")
]


def imports_kept(package: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports` on the package in `package`/scalekd, by the contract of this project."""
    linter = Path(sys.executable).parent / "lint-imports"
    command = [str(linter), "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, line",
    [
        ("common/errors.py", "from scalekd.data.images import BadImage"),
        ("train/engine.py", "def later():\n    from scalekd.distill.run import DistillationRun"),
        ("distill/build.py", "from scalekd.transfer.tasks import TASKS"),
        ("runs/students.py", "import scalekd.cli.app"),
    ],
)
def test_an_import_against_the_direction_breaks_the_contract(tmp_path, file, line):
    shutil.copytree(
        ROOT / "src" / "scalekd", tmp_path / "scalekd", ignore=shutil.ignore_patterns("*.safetensors", "data")
    )
    shutil.copytree(ROOT / "src" / "scalekd" / "data", tmp_path / "scalekd" / "data")
    path = tmp_path / "scalekd" / file
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    done = imports_kept(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_the_top_level_holds_packages_and_the_python_interface():
    top = {p.name for p in (ROOT / "src" / "scalekd").iterdir() if p.name != "__pycache__"}
    files = {"__init__.py", "__main__.py", "api.py", "py.typed"}
    packages = {
        "analyze", "checks", "cli", "common", "compare", "config", "cost", "data", "demo", "distill", "heads", "methods",
        "models", "report", "runs", "train", "transfer",
    }  # fmt: skip
    assert top == files | packages


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_a_file_says_what_it_is_and_its_functions_are_short(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            signature_and_body = (
                body[0].lineno - first if not ast.get_docstring(node) else node.body[0].lineno - first
            ) + (node.end_lineno - body[0].lineno + 1)
            assert signature_and_body <= 60, f"{node.name} has {signature_and_body} lines"


def private_imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("scalekd")):
            found += [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
    return found


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_name_is_imported(path):
    assert private_imports(path) == []


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
