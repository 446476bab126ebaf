"""The examples run unchanged, each as a process of its own."""

from __future__ import annotations

from pathlib import Path

import launcher
import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_an_example_runs_and_prints_finite_losses(example, tmp_path):
    done = launcher.run(example, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'total'" in done.stdout and "nan" not in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def test_there_is_an_example_of_every_kind_of_loop():
    assert {example.name for example in EXAMPLES} >= {"own_loop.py", "accelerate_loop.py", "fabric_loop.py"}


def test_examples_are_short_and_listed_in_their_readme():
    listed = (EXAMPLES[0].parent / "README.md").read_text()
    for example in EXAMPLES:
        assert len(example.read_text().splitlines()) < 40
        assert f"`{example.name}`" in listed
