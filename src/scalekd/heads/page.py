"""The printed results of `scalekd head`, and the options that use the head in `scalekd train`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from scalekd.common.errors import UserError
from scalekd.common.set_figures import class_lines
from scalekd.common.text import say
from scalekd.common.yaml_file import parse_yaml
from scalekd.models.options import Model

from .linear import STRENGTHS, Choice
from .scores import TEMPERATURES

COLUMNS = {"top1": ("top-1 %", 2), "top5": ("top-5 %", 2), "map": ("mAP %", 2), "f1_macro": ("macro F1", 2)}
COLUMNS |= {"f1_micro": ("micro F1", 2), "nll": ("nll", 4), "ece": ("ECE %", 2)}  # of `scores`: heading and digits


def tell(console: Console, card: dict[str, Any], choice: Choice, out: Path) -> None:
    """Prints the accuracy, calibration and chosen options of a fitted head."""
    what = "images with sets" if card.get("multi_label") else "labels"
    labels = f"{card['labels']} {what} of {len(card['classes'])} classes, {card['features']} features"
    if choice.held_out:
        images = choice.held_out["after"]["images"]
        chosen = (
            f"strength {choice.strength:.3g}, temperature {choice.temperature:.3f}, chosen on {images} held-out images"
        )
        say(console, f"{labels}; {chosen}")
        for line in warnings(choice):
            say(console, line)
    else:
        say(console, f"{labels}; only one per class, so no image could be held out: strength {choice.strength:g}")
    columns = {key: column for key, column in COLUMNS.items() if key in card["validation"]["after"]}
    say(console, f"{'':30}{''.join(f'{name:>9}' for name, _ in columns.values())}{'images':>9}")
    for part, results in (("held out", choice.held_out), ("validation", card["validation"])):
        for when, s in results.items():
            row = "".join(f"{s[key]:9.{digits}f}" for key, (_, digits) in columns.items())
            say(console, f"{part + ', ' + when + ' temperature':30}{row}{s['images']:9}")
    if card.get("multi_label"):
        say(
            console,
            f"F1 in % at threshold {card['threshold']:g}, chosen on held-out images. The classes in validation:",
        )
        for line in class_lines(card["by_class"], f"{out / 'head.json'} has all"):
            say(console, f"  {line}")
    if half := card["draws"]["half_width_95"]:
        name, _ = main_figure(card["validation"]["after"])
        text = f"{len(card['draws']['seeds'])} draws of the labels: {name} {card['draws']['mean']:.2f} ± {half:.2f} %"
        say(console, f"{text} (95 % interval of the mean)")
    say(console, f"{out / 'head.safetensors'}  largest logit difference {card['largest_logit_difference']:.1e}")


def main_figure(scores: dict[str, float]) -> tuple[str, float]:
    """The name and the value in % of the main figure: mAP with sets of classes, else top-1."""
    return ("mAP", scores["map"]) if "map" in scores else ("top-1", scores["top1"])


def warnings(choice: Choice) -> list[str]:
    """Warnings if the strength or the temperature is at the end of its range, or the temperature cannot be chosen."""
    lines = []
    if choice.strength in (STRENGTHS[0], STRENGTHS[-1]):
        lines.append(f"the strength is at the end of the range tried, {STRENGTHS[-1]:g} to {STRENGTHS[0]:g}")
    low, high = TEMPERATURES
    if choice.all_right:
        lines.append("all held-out images are correct, so the temperature cannot be chosen and stays 1")
    elif not 1.01 * low < choice.temperature < high / 1.01:
        lines.append(
            f"the temperature is at the end of the range tried, {low:g} to {high:g}: check the labels, or use more"
        )
    return lines


def tell_use(console: Console, spec: Model, card: dict[str, Any], out: Path) -> None:
    """Prints the options of `scalekd train` for this head, quoted for a shell, and the crop it was fitted with."""
    same = len(set(card["image_size"])) == 1
    values = {
        "teacher.head": _yaml(str(out)),
        "teacher.weights": None if card["weights"] == "pretrained" else _yaml(card["weights"]),
        "teacher.image_size": json.dumps(card["image_size"][0] if same else card["image_size"]),
        "teacher.prefix": spec.prefix and _yaml(spec.prefix),
        "teacher.kwargs": json.dumps(card["kwargs"]) if card["kwargs"] else None,
        "teacher.mean": spec.mean and json.dumps(spec.mean),
        "teacher.std": spec.std and json.dumps(spec.std),
        "data.channels": None if card["channels"] == 3 else json.dumps(card["channels"]),
    }
    if card.get("multi_label"):
        values["losses.kd.probabilities"] = "sigmoid"
    words = ["--teacher", card["model"], *(f"{key}={value}" for key, value in values.items() if value)]
    say(console, f"Use it in `scalekd train` with: {shlex.join(words)}")
    crop = f"augment.crop_pct={card['crop_pct']:g} augment.interpolation={card['interpolation']}"
    say(console, f"Fitted with this crop; train with the same: {crop}")


def _yaml(text: str) -> str:
    """A text as the value of an override, quoted if YAML would not read it as this text."""
    try:
        return text if parse_yaml(text, "") == text else json.dumps(text)
    except UserError:
        return json.dumps(text)
