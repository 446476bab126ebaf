"""Counts how the cost of a step grows with the teacher, the image size and the batch, as forms.py does.

    python benchmarks/growth.py --out docs/results/performance

Reports multiply-adds per image relative to the floor's, and memory per device relative to plain feature distillation
(`fd`). Computes and times nothing. `python benchmarks/tables.py` draws the figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from forms import Step, count
from harness import about, table, write
from parts import OPTIONS

from scalekd.config.recipe import load_recipe

FORMS = {name: OPTIONS[name] for name in ("published form", "tokens=reduced, shared")}
TO_RESNET, TO_VIT = "imagenet-swin-s-resnet50-traditional", "imagenet-swin-l-vit-small-traditional"
BATCH = 32  # unless the batch grows: 256 on 8 GPUs, as in the paper
BATCHES = (8, 16, 32, 64, 128, 256)
SIZES = (128, 224, 384)
EVA = "{model: eva_large_patch14_196, image_size: 224, cuts: [5, 11, 21, 23]}"
TEACHERS = {
    "Swin-T": ["teacher.model=swin_tiny_patch4_window7_224"],
    "Swin-S": [],
    "Swin-B": ["teacher.model=swin_base_patch4_window7_224", "losses.scalekd.heads=[8, 16]"],
    "Swin-L": ["teacher.model=swin_large_patch4_window7_224", "losses.scalekd.heads=[16, 24]"],
    "EVA-L": [f"teacher={EVA}", "losses.scalekd.heads=[8, 8]"],
}
VIT_B = ["teacher.model=vit_base_patch16_224", "losses.scalekd.heads=[12, 12]"]
Steps = dict[str, Step]


def steps(recipe: str, overrides: list[str], batches: Sequence[int] = (BATCH,)) -> dict[int, Steps]:
    return count(load_recipe(recipe, ["train.precision=float32", *overrides]), FORMS, batches)


def measure() -> Iterator[dict[str, Any]]:
    """What grows, of which pair, and the steps at each point; yields again after each point added to `at`."""
    swin_s = steps(TO_RESNET, [], (BATCH, *BATCHES))
    at = {str(batch): swin_s[batch] for batch in BATCHES}
    yield {"grows": "batch", "of": "Swin-S to ResNet-50, 224 pixels, SGD", "at": at}
    part: dict[str, Any] = {"grows": "teacher", "of": f"to ResNet-50, 224 pixels, batch {BATCH}, SGD", "at": {}}
    for name, overrides in TEACHERS.items():
        part["at"][name] = (steps(TO_RESNET, overrides) if overrides else swin_s)[BATCH]
        yield part
    for student, recipe in (("ResNet-50", TO_RESNET), ("ViT-S/16", TO_VIT)):
        part = {"grows": "pixels", "of": f"ViT-B/16 to {student}, batch {BATCH}, SGD", "at": {}}
        for size in SIZES:
            part["at"][str(size)] = steps(recipe, [*VIT_B, f"data.image_size={size}"])[BATCH]
            yield part


def lines_of(found: dict[str, Any]) -> list[str]:
    names = ["fd", *FORMS]
    lines = []
    for part in found["growth"]:
        rows = []
        for point, at in part["at"].items():
            batch = int(point) if part["grows"] == "batch" else BATCH
            row = [point, f"{at['floor']['gmacs']:.1f}"]
            row += [f"{at[name]['gmacs'] / at['floor']['gmacs']:.2f}" for name in names]
            row += [f"{at['fd']['memory_mb'] / batch:.0f}"]
            row += [f"{at[name]['memory_mb'] / at['fd']['memory_mb']:.2f}" for name in FORMS]
            rows.append(row)
        columns = [part["grows"], "floor: GMACs an image", *(f"{name}: vs floor" for name in names)]
        columns += ["fd: MB an image", *(f"{name}: vs fd" for name in FORMS)]
        lines += [part["of"], "", *table(columns, rows), ""]
    return [
        *lines,
        "float32; counted, not measured. Memory is all that a device holds but for what lives for a moment only.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR")
    args = parser.parse_args()
    found: dict[str, Any] = about(torch.device("cpu")) | {"forms": FORMS, "growth": []}
    for part in measure():  # written after every point, as all of them take a minute or more
        if part not in found["growth"]:
            found["growth"].append(part)
        write(args.out, "growth", found, lines_of(found))


if __name__ == "__main__":
    main()
