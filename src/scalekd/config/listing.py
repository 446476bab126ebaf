"""The list of shipped recipes, and one recipe printed in full with explanations."""

from __future__ import annotations

import re
import textwrap
from itertools import groupby
from typing import Any

import yaml

from scalekd.common.documentation import as_commands
from scalekd.common.yaml_file import parse_yaml

from .recipe import Config, load_recipe
from .recipe_files import header, header_lines, recipe_names, recipe_text, recipe_values

IMAGENET_IMAGES = 1_281_167  # in the training set of ImageNet-1K
WIDTH = 120


def listed() -> list[dict[str, Any]]:
    """The `entry` of each shipped recipe, sorted by name."""
    return [entry(name) for name in recipe_names()]


def entry(recipe: str) -> dict[str, Any]:
    """Summary of a recipe. Values such as `losses` and `epochs` include those of its base."""
    text, values = recipe_text(recipe), recipe_values(recipe)
    return {
        "name": values["name"],
        **{key: as_commands(line) for key, line in header(text).items()},
        "base": parse_yaml(text, recipe).get("base"),
        "student": values["student"]["model"],
        "teacher": (values.get("teacher") or {}).get("model"),
        "losses": values["losses"],
        "epochs": values["train"]["epochs"],
        "batch": values["train"]["batch_size"],
    }


def table(entries: list[dict[str, Any]]) -> str:
    """Two lines per recipe, grouped by teacher: name and status here, then what it stands for and the paper's top-1."""
    lines = ["recipe [its runs here]; below: what it stands for, and who measured the top-1"]
    for group, members in groupby(sorted(entries, key=_group), key=_group):
        lines += ["", group]
        for e in members:
            top1, status = re.match(r"[\d.]+", e["expected"]), re.match(r"[A-Z ]*[A-Z]", e["status"])
            whose = "the paper" if e["name"].startswith("imagenet-") else "measured here"
            figure = f"; {whose}: {top1[0]} %" if top1 else ""
            lines.append(f"  {e['name']}  [{status[0] if status else '-'}]")
            lines += textwrap.wrap(f"{e['stands_for']}{figure}", 79, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _group(e: dict[str, Any]) -> str:
    if not e["name"].startswith("imagenet-"):
        return "your own data and the demo"
    return f"ImageNet-1K, teacher {e['teacher']}" if e["teacher"] else "ImageNet-1K, baselines (no teacher)"


def explained(recipe: str) -> str:
    """The recipe with the values of its base filled in, as valid YAML with comments that explain it."""
    values, config = recipe_values(recipe), load_recipe(recipe)
    text = recipe_text(recipe)
    base = parse_yaml(text, recipe).get("base")
    notes = [f"This is {config.name} with the values of its base, {base}, filled in."] if base else []
    notes += _amount(config)
    lines = [
        *map(as_commands, header_lines(text)),
        "",
        *(f"# {line}" for note in notes for line in textwrap.wrap(note, WIDTH - 2)),
    ]
    for section in sorted(values, key=list(Config.model_fields).index):
        lines += _losses(values[section]) if section == "losses" else _section(section, values[section])
    return "\n".join(lines) + "\n"


def amount(config: Config) -> dict[str, int] | None:
    """Steps and images of a recipe for ImageNet-1K, else None. The last, partial batch of an epoch is not used."""
    if "imagenet" not in (config.data.train or "") or config.data.limit:
        return None
    steps = IMAGENET_IMAGES // config.train.batch_size
    epochs = config.train.epochs
    return {"steps_per_epoch": steps, "steps": steps * epochs, "images_seen": IMAGENET_IMAGES * epochs}


def _amount(config: Config) -> list[str]:
    counts, train = amount(config), config.train
    if counts is None:
        return []
    parts = f", {train.accumulate} x {train.batch_size // train.accumulate}" if train.accumulate > 1 else ""
    return [
        f"On ImageNet-1K: {counts['steps_per_epoch']:,} steps per epoch, {counts['steps']:,} in total, of "
        f"{train.batch_size} images each{parts}; {counts['images_seen']:,} images in total, "
        f"{train.epochs} epochs x {IMAGENET_IMAGES:,}."
    ]


def _losses(losses: dict[str, Any]) -> list[str]:
    """The section as YAML, with the first paragraph of each method's docstring as a comment."""
    from scalekd.methods.names import METHODS

    lines = ["losses:"]
    for name, options in losses.items():
        doc = (METHODS[name].__doc__ or "").strip().split("\n\n")[0]
        lines += [f"  # {line}" for line in textwrap.wrap(" ".join(doc.split()), WIDTH - 4)]
        line = f"  {name}: {_flow(options)}"
        each = [f"    {key}: {_flow(value)}" for key, value in options.items()]
        lines += [line] if len(line) <= WIDTH else [f"  {name}:", *each]
    return lines


def _section(name: str, value: Any) -> list[str]:
    line = f"{name}: {_flow(value)}"
    if len(line) <= WIDTH or not isinstance(value, dict):
        return [line]
    return [f"{name}:", *(f"  {key}: {_flow(inner)}" for key, inner in value.items())]


def _flow(value: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.strip().removesuffix("...").strip()
