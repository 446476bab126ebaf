"""What the documentation names is there: commands, recipes, options, files."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from scalekd.cli import transfer as transfer_cli
from scalekd.cli.app import parse, parser
from scalekd.cli.options import recipe_overrides
from scalekd.common.sections import fields_at
from scalekd.common.yaml_file import parse_yaml
from scalekd.compare.ladder import jobs, ladder_names, load_ladder
from scalekd.config.losses import options_of
from scalekd.config.recipe import Config, check_config, load_recipe
from scalekd.config.recipe_files import recipe_names, recipe_text
from scalekd.methods.names import METHODS
from scalekd.transfer import config as transfer

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "src").rglob("*.yaml"))]
TRANSFER_RECIPES = [name for shelf in transfer.SHELVES.values() for name in recipe_names(shelf)]
TO_BE_WRITTEN = {
    "src/scalekd/methods/similarity.py",
    "tests/methods/test_similarity.py",
}  # in docs/how-to/add-a-method.md

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w./-])(?:src|docs|tests|tools|examples|benchmarks)/[\w./-]*[\w/]")
KEY = re.compile(
    r"(?<![\w./-])(?:data|augment|student|teacher|losses|train|optim|schedule|backbone|detector|segmenter)\.(?!(?:py|json|safetensors|onnx|int8|pt)\b)[\w.]+(?=[=`])"
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def each(pattern: re.Pattern[str], files: list[Path] = DOCS) -> list[tuple[str, str]]:
    """(file, what the pattern finds in it), once each."""
    found = [(relative(f), m[0]) for f in files if f.is_file() for m in pattern.finditer(f.read_text())]
    return list(dict.fromkeys(found))


def commands() -> list[tuple[str, str]]:
    """(file, command line) of every `scalekd ...` in a code block, and in a recipe's header."""
    found = []
    for file in DOCS:
        blocks = [m[2] for m in FENCE.finditer(file.read_text())] if file.is_file() else []
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        found += [(relative(file), line.split("scalekd ", 1)[1]) for line in lines if is_command(line)]
    texts = {name: recipe_text(name) for name in recipe_names()}
    texts |= {f.stem: f.read_text() for f in SOURCES if f.suffix == ".yaml" and "transfer" in f.parts}
    for name, text in texts.items():
        line = re.search(r"^# command: +(.*?)(  .*)?$", text, re.MULTILINE)
        if line:
            found.append((name, line[1].split("scalekd ", 1)[1]))
    return found


def is_command(line: str) -> bool:
    return re.match(r"\$? *(HF_HUB_OFFLINE=1 )?(\.venv/bin/)?(torchrun .* -m |python -m )?scalekd ", line) is not None


def test_there_is_something_to_look_at():
    files = {file for file, _ in commands()}
    assert {"README.md", "docs/tutorials/own-data.md", "own-data"} <= files
    assert len(each(PATH)) > 20 and len(each(KEY)) > 5


@pytest.mark.parametrize("file, line", commands())
def test_a_command_line_is_understood(file, line):
    args = parse(shlex.split(line, comments=True))
    if hasattr(args, "task"):
        if getattr(args, "recipe", None) in recipe_names(transfer.SHELVES[args.task]):
            args.backbone = args.backbone and "resnet50"  # in place of a run's folder
            transfer.load(args.task, args.recipe, [*transfer_cli.shortcuts(args), *args.overrides])
    elif hasattr(args, "ladder"):
        if args.ladder in ladder_names():
            assert jobs(load_ladder(args.ladder), recipe_overrides(args))
        else:
            assert (ROOT / args.ladder).parent.name == "lab"  # a file, of the laboratory
    elif hasattr(args, "overrides") and not hasattr(args, "recipe"):
        load_recipe("demo", args.overrides)  # they change a run's own recipe
    elif hasattr(args, "overrides") and not args.recipe.endswith(".yaml"):
        load_recipe(args.recipe, recipe_overrides(args))
    if getattr(args, "show", None):
        assert args.show[0] == "show" and args.show[1] in (*recipe_names(), "NAME")


COMMANDS = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))


@pytest.mark.parametrize("file, line", each(re.compile(r"`scalekd [^`\n]+`")))
def test_a_command_in_a_sentence_exists(file, line):
    words = line.strip("`").split()[1:]
    assert words[0].startswith("-") or words[0] in COMMANDS
    if words[:2] == ["recipes", "show"] or words[0] == "train":
        assert words[-1].isupper() or set(words) & set(recipe_names()) or len(words) == 1


@pytest.mark.parametrize("file, path", each(PATH, DOCS + SOURCES))
def test_a_path_is_there(file, path):
    assert (ROOT / path).exists() or path in TO_BE_WRITTEN


@pytest.mark.parametrize(
    "file, link", each(re.compile(r"\]\((?!https?:|#|mailto:)[^)\s]+\)")) or [("README.md", "](.)")]
)
def test_a_link_leads_somewhere(file, link):
    assert ((ROOT / file).parent / link[2:-1].split("#")[0]).exists()


@pytest.mark.parametrize("file, name", each(re.compile(r"`(imagenet|own|demo)-[\w-]+`")))
def test_a_recipe_is_shipped(file, name):
    assert name.strip("`") in [*recipe_names(), *ladder_names(), *TRANSFER_RECIPES]


@pytest.mark.parametrize("file, key", each(KEY))
def test_a_key_exists(file, key):
    section, field, *rest = key.split(".")
    if section == "losses":
        assert field in METHODS
        assert not rest or rest[0] in {"weight", *options_of(METHODS[field])}
    else:
        schemas = (Config, *transfer.SCHEMAS.values())
        assert any(section in s.model_fields and field in fields_at([section], s) for s in schemas)


LOSSES = [
    (file, text)
    for file, text in each(re.compile(r"losses: \{.*\}"))
    if file not in ("docs/how-to/add-a-method.md", "docs/how-to/compare.md")
]


@pytest.mark.parametrize("file, text", LOSSES)
def test_losses_are_a_recipe_s(file, text):
    losses = parse_yaml(text.strip("`"), file)["losses"]
    teacher = {"model": "test_vit"} if any(getattr(METHODS[n], "needs_teacher", True) for n in losses) else None
    values = {"name": "x", "data": {"train": "x"}, "student": {"model": "test_resnet"}, "teacher": teacher}
    check_config(values | {"losses": losses, "train": {"epochs": 1, "batch_size": 2}}, file)


ON_LOGITS = {
    m for m in METHODS if not getattr(METHODS[m], "needs_maps", True) and getattr(METHODS[m], "needs_teacher", True)
}
ONE_LABEL = {m for m in METHODS if getattr(METHODS[m], "one_label", "")}


@pytest.mark.parametrize(
    "file, text, names",
    [
        ("labels", r"\| (.*) \| yes; they need no classifier", set(METHODS) - ONE_LABEL - {"bce", "asl"}),
        ("labels", r"\| (.*) \| no: they need one class", ONE_LABEL),
        (
            "unlabelled",
            r"that read labels \(([^)]*)\)",
            {m for m in METHODS if getattr(METHODS[m], "needs_targets", False)},
        ),
        ("several-teachers", r"Losses on logits alone \(([^)]*)\)", ON_LOGITS),
    ],
)
def test_a_list_of_losses_is_complete(file, text, names):
    listed = re.search(text, (ROOT / "docs" / "how-to" / f"{file}.md").read_text())
    assert listed is not None and set(re.findall(r"`(\w+)`", listed[1])) == names
