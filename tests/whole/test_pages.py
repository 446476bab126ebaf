"""The documentation is part of the package, and messages name it by a command that an installation has."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scalekd.common.documentation import as_commands, page_text, pages

ROOT = Path(__file__).parents[2]
PATH = re.compile(r"\bdocs/(?!results)[\w/-]+\.md")
COMMAND = re.compile(r"`scalekd docs ([a-z-]+)`")
SHOWN = [f for f in (ROOT / "src" / "scalekd").rglob("*.py") if f.name != "pages.py"]


def texts(file: Path) -> list[str]:
    """All strings of a module that are no docstrings."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [node.value for node in found if id(node) not in docstrings]


def test_docs_lists_and_prints_pages(cli):
    listed = cli("docs")
    assert listed.code == 0 and "any-teacher" in listed.out and "resume-and-scale     Resuming runs" in listed.out
    whole = (ROOT / "docs" / "how-to" / "any-teacher.md").read_text()
    for name in ("any-teacher", "docs/how-to/any-teacher.md", "how-to/any-teacher"):
        assert cli("docs", name).out == whole
    wrong = cli("docs", "any-techer")
    assert wrong.code == 2 and "Did you mean `any-teacher`" in wrong.err
    assert cli("docs", "../../pyproject").code == 2


def test_every_page_but_results_has_a_name_of_its_own():
    files = [f for f in (ROOT / "docs").rglob("*.md") if "results" not in f.parts]
    assert {f.resolve() for f in pages().values()} == set(files) and len(pages()) == len(files)


@pytest.mark.parametrize("file", SHOWN, ids=lambda file: file.stem)
def test_no_message_names_a_page_by_its_path(file):
    for text in texts(file):
        assert not PATH.search(text), text
        for name in COMMAND.findall(text):
            assert page_text(name)


def test_a_shown_recipe_names_pages_by_command(cli):
    assert as_commands("see docs/how-to/plan.md, docs/log.md.") == "see `scalekd docs plan`, `scalekd docs log`."
    shown = cli("recipes", "show", "own-data").out
    assert not PATH.search(shown)


@pytest.mark.slow
def test_the_wheel_has_the_pages(tmp_path):
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "src", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "src").unlink()
    copy = ["cp", "-r", "--no-dereference", str(ROOT / "src"), str(tmp_path / "src")]
    subprocess.run(copy, check=True)
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    inside = [n.removeprefix("scalekd/common/docs/") for n in names if n.startswith("scalekd/common/docs/")]
    assert sorted(inside) == sorted(str(f.relative_to(ROOT / "src/scalekd/common/docs")) for f in pages().values())
