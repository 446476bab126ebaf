"""Hints: recipe keys given as options, a missing recipe, a family's name as a model, the options of a method."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from scalekd.common.tables import fitted


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--epochs", "3"], "--epochs is a key of the recipe: write train.epochs=3;"),
        (["--batch-size=8"], "--batch-size is a key of the recipe: write train.batch_size=8;"),
        (["--model"], "write student.model=VALUE or teacher.model=VALUE;"),
        (["--name", "x"], "write optim.name=x or schedule.name=x;"),
    ],
)
def test_an_option_that_is_a_key_of_the_recipe(cli, words, hint):
    result = cli("train", "own-data", *words)
    assert result.code == 2 and (hint in result.err or "write name=x" in result.err)


def test_an_option_that_is_no_key(cli):
    result = cli("train", "own-data", "--nonsense", "3", "optim.lr=0.1")
    assert result.code == 2 and "key of the recipe" not in result.err
    assert "arguments: --nonsense 3;" in result.err  # and not the override, which is fine


@pytest.mark.parametrize(("command", "words"), [("train", "`scalekd recipes`"), ("compare", "own-ladder")])
def test_a_missing_recipe(cli, command, words):
    result = cli(command)
    assert result.code == 2 and words in result.err


def test_a_family_as_a_model(cli):
    result = cli("train", "own-data", "--student", "swin_tiny", "--data", "nowhere", "--dry-run")
    assert result.code == 2 and "start with it: swin_tiny_patch4_window7_224" in result.err


def test_a_method_is_explained(cli):
    result = cli("methods", "dkd")
    assert result.code == 0 and "temperature: T > 0" in result.out and "losses.dkd.beta=2.0" in result.out
    result = cli("methods", "dkdd")
    assert result.code == 2 and "Did you mean `dkd`" in result.err


def test_recipes_in_80_columns_with_the_source_of_each_figure(cli):
    text = cli("recipes").out
    assert max(map(len, text.splitlines())) <= 80 and "top-1 %" not in text
    text = " ".join(text.split())
    assert "; the paper: 82.03 %" in text and "; measured here: 80.15 %" in text


@pytest.mark.parametrize("width", [40, 200])
def test_a_table_breaks_no_name(width):
    screen = Console(file=io.StringIO(), width=width)
    rows = [["swin_large_patch4_window7_224", "a longer text of several words", "12.5"]]
    screen.print(fitted(["model", "what it is for", "number"], rows, screen, ["number"]))
    text = screen.file.getvalue()
    assert "swin_large_patch4_window7_224" in text and "12.5" in text
    assert ("what it is for:" in text) == (width == 40) and max(len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize("command", [("pairs", "Mixer-S"), ("teachers", "test_vit")])
def test_tables_at_80_columns(cli, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = cli(*command).out
    name = "imagenet-swin-l-mixer-s-advanced-1gpu" if command[0] == "pairs" else "test_vit"
    assert name in text and max(len(line.rstrip()) for line in text.splitlines()) <= 80
