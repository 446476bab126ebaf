"""Makes the table and the figures of lab/transfer.sh's runs.

    python lab/transfer.py runs/transfer docs/results/transfer
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from scalekd.common.intervals import half_width
from scalekd.transfer.deploy import load
from scalekd.transfer.detection.coco import open_coco
from scalekd.transfer.detection.pictures import picture
from scalekd.transfer.segmentation.overlay import overlay
from scalekd.transfer.segmentation.pairs import open_segments

STARTS = ("distilled", "supervised", "scratch")
FIGURES = {
    "segment": {"miou": "mIoU %", "pixel_accuracy": "pixel accuracy %"},
    "detect": {"mask_ap": "mask AP %", "box_ap": "box AP %"},
}
PICTURES, TILE = 4, 256


def figures(runs: Path, task: str) -> dict[str, Any]:
    """start -> figure -> its values by seed; for starts with weights also the gains over scratch with the same seed."""
    found: dict[str, Any] = {}
    for start in STARTS:
        files = sorted(runs.glob(f"{task}-{start}-*/summary.json"))
        summaries = [json.loads(file.read_text()) for file in files]
        found[start] = {key: {s["seed"]: s[key] for s in summaries} for key in FIGURES[task]}
        found[start]["seconds"] = [s["seconds"] for s in summaries]
    return found


def row(found: dict[str, Any], start: str, keys: dict[str, str]) -> str:
    cells = []
    for key in keys:
        values, base = found[start][key], found["supervised"][key]
        cells.append(spread(list(values.values())))
        gains = [value - base[seed] for seed, value in values.items() if seed in base]
        cells.append("" if start == "supervised" else spread(gains, sign="+"))
    return f"| {start} | {' | '.join(cells)} | {len(found[start]['seconds'])} |"


def spread(values: list[float], sign: str = "") -> str:
    half = half_width(values)
    return f"{statistics.fmean(values):{sign}.2f}" + (f" ± {half:.2f}" if half is not None else "") if values else "-"


def table(found: dict[str, Any], task: str) -> list[str]:
    keys = FIGURES[task]
    heads = " | ".join(f"{name} | over supervised" for name in keys.values())
    lines = [f"| {task}, backbone | {heads} | seeds |", "|---" * (2 + 2 * len(keys)) + "|"]
    return [*lines, *(row(found, start, keys) for start in STARTS), ""]


@torch.no_grad()
def pictures(runs: Path, task: str, out: Path) -> None:
    """Predictions of the first seed's models in a few validation scenes: one row per start, the ground truth below."""
    scenes = runs / "scenes"
    rows: list[list[Image.Image]] = []
    if task == "segment":
        _, pairs = open_segments(scenes, classes=scenes / "classes-with-background.txt")
        shown = [pairs[i] for i in range(PICTURES)]
        for start in STARTS:
            model, card = load(runs / f"segment-{start}-0", "segmentation")
            mean, std = (torch.tensor(card[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
            rows.append([])
            for image, _ in shown:
                pixels = TF.pil_to_tensor(image.convert("L"))[None] / 255
                classes = model((pixels - mean) / std).argmax(1)[0]
                rows[-1].append(coloured(image, classes.numpy(), pairs.classes))
        rows.append([coloured(image, mask, pairs.classes) for image, mask in shown])
    else:
        coco = open_coco(scenes / "instances_val.json", scenes / "images", "validation")
        files = [p.path for p in coco.pictures[:PICTURES]]
        for start in STARTS:
            model, card = load(runs / f"detect-{start}-0", "detection")
            rows.append([])
            for file in files:
                image = Image.open(file).convert("L")
                pixels = TF.pil_to_tensor(image)
                (found,) = model([pixels])
                rows[-1].append(picture(image, found, card["classes"]))
    sheet = Image.new("RGB", (PICTURES * TILE, len(rows) * TILE), "white")
    for y, of_start in enumerate(rows):
        for x, image in enumerate(of_start):
            sheet.paste(image.resize((TILE, TILE)), (x * TILE, y * TILE))
    sheet.quantize(128).save(out / f"{task}.png", optimize=True)


def coloured(image: Image.Image, classes: Any, names: Any) -> Image.Image:
    """Without the legend at the side."""
    return overlay(image, classes, names, without=["background"]).crop((0, 0, TILE, TILE))


def main(runs: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        "# A distilled backbone at work",
        "",
        "`lab/transfer.sh` made these. Mean ± half of the 95 % interval over seeds (Student's t); beside it the same of",
        "the differences from the supervised backbone, seed by seed. In the pictures the rows are: distilled, supervised,",
        "scratch; below them, for segmentation, the truth.",
        "",
    ]
    results = {}
    for task in FIGURES:
        results[task] = figures(runs, task)
        if any(results[task][start]["seconds"] for start in STARTS):
            lines += table(results[task], task)
        if all((runs / f"{task}-{start}-0" / "summary.json").is_file() for start in STARTS):
            pictures(runs, task, out)
    made = next(iter(runs.glob("*/provenance.json")))
    results["made"] = {
        k: v for k, v in json.loads(made.read_text()).items() if k in ("machine", "torch", "timm", "git")
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "summary.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
