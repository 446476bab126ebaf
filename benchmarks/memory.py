"""Counts the peak memory of a step of ScaleKD's forms relative to plain feature distillation, on no particular machine.

    python benchmarks/memory.py --out docs/results/performance

The step runs on fake tensors, which have shapes but no values. `scalekd.cost.peak` follows every storage from the
operation that creates it to its last reference. Gradients exist all the time, as in the buckets of DDP, which the
paper's 8 GPUs used. Memory inside an operation, such as the workspace of a convolution, is not counted. The optimiser
is the recipe's; the papers use 32 images per GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from harness import about, table, write
from torch._subclasses.fake_tensor import FakeTensorMode

from scalekd import Distiller
from scalekd.config.recipe import Config, load_recipe
from scalekd.cost.count import fixed_bytes
from scalekd.cost.flops import flop_counter
from scalekd.cost.peak import held_in_a_step
from scalekd.distill.build import untrained

RECIPES = {  # with the memory of ScaleKD relative to FD from the paper's Table 15, if it has the pair
    "imagenet-swin-s-resnet50-traditional": 6.65 / 3.66,
    "imagenet-swin-b-resnet50-traditional": 7.26 / 3.66,
    "imagenet-swin-l-resnet50-traditional": 9.11 / 4.72,
    "imagenet-swin-l-vit-small-advanced": None,
}
CHEAPER = {"tokens": "reduced", "shared": True}
NARROW = {"shared": True, "expansion": 1}  # the default of scalekd
GROUPED = NARROW | {"tokens": "grouped"}  # for CNN students
AGAIN = {"grad_checkpointing": True}
FORMS: dict[str, dict[str, Any] | None] = {  # options of scalekd; None: without it
    "floor": None,
    "fd": None,
    "published": {},
    "published, checkpointed": AGAIN,
    "shared-narrow": NARROW,
    "shared-narrow, checkpointed": NARROW | AGAIN,
    "grouped-shared-narrow": GROUPED,
    "grouped-shared-narrow, checkpointed": GROUPED | AGAIN,
    "reduced-shared": CHEAPER,
    "reduced-shared, checkpointed": CHEAPER | AGAIN,
}
SETTINGS = (("float32", 32), ("float32", 128), ("bf16", 32), ("bf16", 128))  # precision, images a GPU
IMAGES = 2  # enough to count multiply-adds per image


def losses_of(form: str, recipe: Config) -> dict[str, dict[str, Any]]:
    """Losses of a form. The floor has those that read logits: the recipe's task loss and KD."""
    if form == "fd":
        return {name: options for name, options in recipe.losses.items() if name in ("ce", "bce")} | {"fd": {}}
    options = FORMS[form]
    others = {name: given for name, given in recipe.losses.items() if name != "scalekd"}
    return others if options is None else others | {"scalekd": recipe.losses["scalekd"] | options}


def count(name: str) -> dict[str, Any]:
    """Form -> multiply-adds (G) per image, and its peaks in MB of 10^6 bytes by setting."""
    recipe = load_recipe(name)
    found = {}
    for form in FORMS:
        with torch.device("meta"):
            distiller = untrained(recipe, 1000, losses_of(form, recipe))
        with FakeTensorMode(allow_non_fake_inputs=True):
            distiller._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
            distiller.train()
            peaks = [peak(distiller, precision, batch) for precision, batch in SETTINGS]
            with flop_counter() as counter:  # separately: the counter keeps references to recomputed tensors
                peak(distiller, "float32", IMAGES)
            # after a backward pass, as the optimiser's state is that of a step
            fixed = sum(value or 0 for value in fixed_bytes(distiller, recipe).values())
        found[form] = {
            "gmacs": counter.get_total_flops() / 2 / IMAGES / 1e9,
            "fixed_mb": fixed / 1e6,
            "peak_mb": {
                f"{precision}, {batch}": (fixed + p) / 1e6
                for (precision, batch), p in zip(SETTINGS, peaks, strict=True)
            },
        }
    return found


def peak(distiller: Distiller, precision: str, batch: int) -> int:
    pixels, targets = torch.empty(batch, 3, *distiller.image_size), torch.empty(batch, dtype=torch.int64)
    return held_in_a_step(distiller, pixels, targets, precision != "float32")[1]


def lines_of(recipe: str, forms: dict[str, Any]) -> list[str]:
    paper = RECIPES[recipe]
    rows = []
    for form, found in forms.items():
        ratios = [f"{mb / forms['fd']['peak_mb'][key]:.2f}" for key, mb in found["peak_mb"].items()]
        paper_text = f"{paper:.2f}" if paper and form == "published" else ""
        rows.append(
            [form, f"{found['gmacs']:.1f}", f"{found['fixed_mb'] / 1e3:.2f}"]
            + [f"{mb / 1e3:.2f}, {times}" for mb, times in zip(found["peak_mb"].values(), ratios, strict=True)]
            + [paper_text]
        )
    settings = [f"{precision}, {batch} images: GB, of FD's" for precision, batch in SETTINGS]
    return [recipe, "", *table(["form", "GMACs an image", "fixed GB", *settings, "paper, of FD's"], rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR")
    args = parser.parse_args()
    recipes = {recipe: count(recipe) for recipe in RECIPES}
    lines = [line for recipe, forms in recipes.items() for line in lines_of(recipe, forms)]
    lines.append(
        "Counted on fake tensors, not measured. Fixed: weights, gradients, optimiser's state, averaged weights. "
        f"GMACs: in a batch of {IMAGES}; what is done once a batch weighs more there."
    )
    found = about(torch.device("cpu")) | {"machine": "counted", "recipes": recipes}
    write(args.out, "memory", found, lines)


if __name__ == "__main__":
    main()
