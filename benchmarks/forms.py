"""What cheaper forms of ScaleKD save, counted as `scalekd cost` counts: nothing is computed, no machine matters.

    python benchmarks/forms.py --out docs/results/performance

The floor of the arithmetic is the teacher's forward pass and the student's forward and backward pass; a form's extra
is what its step has beyond that.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from harness import about, table, write

from scalekd.config import load_recipe
from scalekd.cost import cost

RECIPES = (
    "imagenet-swin-s-resnet50-traditional",
    "imagenet-swin-l-mobilenetv1-traditional",
    "imagenet-swin-s-mixer-s-advanced",
    "imagenet-swin-l-vit-small-traditional",
)
FORMS = {
    "published": [],
    "tokens=separable": ["losses.scalekd.tokens=separable"],
    "tokens=pointwise": ["losses.scalekd.tokens=pointwise"],
    "tokens=reduced": ["losses.scalekd.tokens=reduced"],
    "shared": ["losses.scalekd.shared=true"],
    "tokens=reduced, shared": ["losses.scalekd.tokens=reduced", "losses.scalekd.shared=true"],
    "tokens=reduced, shared, expansion=1": [
        "losses.scalekd.tokens=reduced",
        "losses.scalekd.shared=true",
        "losses.scalekd.expansion=1",
    ],
}


def count(recipe: str, batch: int) -> dict[str, dict[str, float]]:
    """Form -> GMACs and memory of its step, beside the floor and beside FD."""
    found: dict[str, dict[str, float]] = {}
    for form, overrides in FORMS.items():
        made = cost(load_recipe(recipe, ["train.precision=float32", *overrides]), batch=batch)
        step, parts = made["step"], made["step"]["parts"]
        floor = parts["teacher"]["forward"] + parts["student"]["forward"] + parts["student"]["backward"]
        found[form] = {
            "gmacs": step["total"]["gmacs"],
            "vs floor": step["total"]["gmacs"] / floor,
            "extra": step["total"]["gmacs"] - floor,
            "memory_mb": step["memory_mb"],
            "memory vs fd": made["ratio"]["memory_mb"],
        }
    return found


def lines_of(recipe: str, forms: dict[str, dict[str, float]]) -> list[str]:
    published = forms["published"]["extra"]
    rows = [
        [
            form,
            f"{v['gmacs']:.1f}",
            f"{v['vs floor']:.2f}",
            f"{v['extra'] / published:.0%}",
            f"{v['memory_mb']:.0f}",
            f"{v['memory vs fd']:.2f}",
        ]
        for form, v in forms.items()
    ]
    columns = ["form", "GMACs an image", "vs floor", "extra, of published", "memory MB", "memory vs FD"]
    return [recipe, "", *table(columns, rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="images of a step on one device")
    parser.add_argument("--out", type=Path, metavar="DIR")
    args = parser.parse_args()
    recipes = {recipe: count(recipe, args.batch) for recipe in RECIPES}
    lines = [line for recipe, forms in recipes.items() for line in lines_of(recipe, forms)]
    lines.append(f"Batch {args.batch}, float32, with the recipe's optimiser; counted, not measured.")
    found: dict[str, Any] = about(torch.device("cpu")) | {"batch": args.batch, "recipes": recipes}
    write(args.out, "forms", found, lines)


if __name__ == "__main__":
    main()
