"""The printed results of `scalekd head`, and the options that use the head in `scalekd train`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from scalekd.common.errors import UserError
from scalekd.common.text import say
from scalekd.common.yaml_file import parse_yaml
from scalekd.models.options import Model

from .linear import STRENGTHS, TEMPERATURES, Choice


def tell(console: Console, card: dict[str, Any], choice: Choice, out: Path) -> None:
    """Prints the accuracy, calibration and chosen options of a fitted head."""
    labels = f"{card['labels']} labels of {len(card['classes'])} classes, {card['features']} features"
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
    say(console, f"{'':30}{'top-1 %':>9}{'top-5 %':>9}{'nll':>9}{'ECE %':>9}{'images':>9}")
    for part, results in (("held out", choice.held_out), ("validation", card["validation"])):
        for when, s in results.items():
            row = "".join(f"{s[k]:9.{digits}f}" for k, digits in (("top1", 2), ("top5", 2), ("nll", 4), ("ece", 2)))
            say(console, f"{part + ', ' + when + ' temperature':30}{row}{s['images']:9}")
    if half := card["draws"]["half_width_95"]:
        text = f"{len(card['draws']['top1'])} draws of the labels: top-1 {card['draws']['mean']:.2f} ± {half:.2f} %"
        say(console, f"{text} (95 % interval of the mean)")
    say(console, f"{out / 'head.safetensors'}  largest logit difference {card['largest_logit_difference']:.1e}")


def warnings(choice: Choice) -> list[str]:
    """Warnings if the strength or the temperature is at the end of its range, or the temperature cannot be chosen."""
    lines = []
    if choice.strength in (STRENGTHS[0], STRENGTHS[-1]):
        lines.append(f"the strength is at the end of the range tried, {STRENGTHS[-1]:g} to {STRENGTHS[0]:g}")
    low, high = TEMPERATURES
    if choice.held_out["after"]["top1"] == 100:
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
    words = ["--teacher", card["model"], *(f"{key}={value}" for key, value in values.items() if value)]
    say(console, f"Use it in `scalekd train` with: {shlex.join(words)}")
    crop = f"augment.crop_pct={card['crop_pct']:g} augment.interpolation={card['interpolation']}"
    say(console, f"Fitted with: {crop}")


def _yaml(text: str) -> str:
    """A text as the value of an override, quoted if YAML would not read it as this text."""
    try:
        return text if parse_yaml(text, "") == text else json.dumps(text)
    except UserError:
        return json.dumps(text)
