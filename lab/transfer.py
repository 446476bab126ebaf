"""Makes the tables, and pictures, of the runs of lab/transfer.sh and lab/transfer-teacher.sh, which call it."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from scalekd.common.intervals import half_width
from scalekd.transfer.detection.coco import open_coco
from scalekd.transfer.detection.pictures import picture
from scalekd.transfer.exported_model import load
from scalekd.transfer.segmentation.overlay import overlay
from scalekd.transfer.segmentation.pairs import open_segments

SEGMENT, DETECT = (
    {"miou": "mIoU %", "pixel_accuracy": "pixel accuracy %"},
    {"mask_ap": "mask AP %", "box_ap": "box AP %"},
)


class Study(NamedTuple):
    """What the runs of a script compare."""

    title: str
    script: str
    column: str  # what the starts differ in
    starts: tuple[str, ...]
    base: str  # the start from which the others' differences are told
    note: str
    tasks: dict[str, dict[str, str]]  # the metrics of each, with their names
    pictures: bool


STUDIES = {
    "backbones": Study(
        "A distilled backbone at work",
        "lab/transfer.sh",
        "backbone",
        ("distilled", "supervised", "scratch"),
        "supervised",
        "the supervised backbone, seed by seed. In the pictures the rows are: distilled, supervised,\nscratch; below them, for "
        "segmentation, the truth.",
        {"segment": SEGMENT, "detect": DETECT},
        True,
    ),
    "teachers": Study(
        "A teacher in the loop of detectors and segmenters",
        "lab/transfer-teacher.sh",
        "teacher",
        ("alone", "mlp", "cap"),
        "alone",
        "the run of the same seed without a teacher. mlp and cap are projectors.",
        {"segment": SEGMENT, "detect": DETECT, "retinanet": {"box_ap": "box AP %"}},
        False,
    ),
}
PICTURES, TILE = 4, 256


def figures(runs: Path, task: str, starts: Sequence[str], keys: Iterable[str]) -> dict[str, Any]:
    """start -> metric of `keys` -> its values by seed; start -> `seconds` -> the runs' times."""
    results: dict[str, Any] = {}
    for start in starts:
        files = sorted(runs.glob(f"{task}-{start}-*/summary.json"))
        summaries = [json.loads(file.read_text()) for file in files]
        results[start] = {key: {s["seed"]: s[key] for s in summaries} for key in keys}
        results[start]["seconds"] = [s["seconds"] for s in summaries]
    return results


def row(results: dict[str, Any], start: str, keys: Iterable[str], base: str) -> str:
    """A row of the table: each metric, and its differences from the start `base` of the same seed."""
    cells = []
    for key in keys:
        values, others = results[start][key], results[base][key]
        cells.append(spread(list(values.values())))
        gains = [value - others[seed] for seed, value in values.items() if seed in others]
        cells.append("" if start == base else spread(gains, sign="+"))
    return f"| {start} | {' | '.join(cells)} | {len(results[start]['seconds'])} |"


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± half the 95 % interval."""
    half = half_width(values)
    return f"{statistics.fmean(values):{sign}.2f}" + (f" ± {half:.2f}" if half is not None else "") if values else "-"


def table(results: dict[str, Any], title: str, keys: dict[str, str], base: str) -> list[str]:
    """Lines of the Markdown table of a task. title: of the first column. keys: metrics and their names."""
    heads = " | ".join(f"{name} | over {base}" for name in keys.values())
    lines = [f"| {title} | {heads} | seeds |", "|---" * (2 + 2 * len(keys)) + "|"]
    return [*lines, *(row(results, start, keys, base) for start in results if results[start]["seconds"]), ""]


@torch.no_grad()
def pictures(runs: Path, task: str, starts: Sequence[str], out: Path) -> None:
    """Draws predictions of the first seed's models on a few validation scenes: a row per start, then the truth."""
    scenes = runs / "scenes"
    rows: list[list[Image.Image]] = []
    if task == "segment":
        _, pairs = open_segments(scenes, classes=scenes / "classes-with-background.txt")
        samples = [pairs[i] for i in range(PICTURES)]
        for start in starts:
            model, card = load(runs / f"segment-{start}-0", "segmentation")
            mean, std = (torch.tensor(card[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
            rows.append([])
            for image, _ in samples:
                pixels = TF.pil_to_tensor(image.convert("L"))[None] / 255
                classes = model((pixels - mean) / std).argmax(1)[0]
                rows[-1].append(coloured(image, classes.numpy(), pairs.classes))
        rows.append([coloured(image, mask, pairs.classes) for image, mask in samples])
    else:
        coco = open_coco(scenes / "instances_val.json", scenes / "images", "validation")
        files = [p.path for p in coco.pictures[:PICTURES]]
        for start in starts:
            model, card = load(runs / f"detect-{start}-0", "detection")
            rows.append([])
            for file in files:
                image = Image.open(file).convert("L")
                pixels = TF.pil_to_tensor(image)
                (prediction,) = model([pixels])
                rows[-1].append(picture(image, prediction, card["classes"]))
    sheet = Image.new("RGB", (PICTURES * TILE, len(rows) * TILE), "white")
    for y, row_of_images in enumerate(rows):
        for x, image in enumerate(row_of_images):
            sheet.paste(image.resize((TILE, TILE)), (x * TILE, y * TILE))
    sheet.quantize(128).save(out / f"{task}.png", optimize=True)


def coloured(image: Image.Image, classes: Any, names: Any) -> Image.Image:
    """The overlay without its legend."""
    return overlay(image, classes, names, without=["background"]).crop((0, 0, TILE, TILE))


def main(name: str, runs: Path, out: Path) -> None:
    """name: of one of `STUDIES`."""
    study, results = STUDIES[name], dict[str, Any]()
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# {study.title}",
        "",
        f"`{study.script}` made these. Mean ± half of the 95 % interval over seeds (Student's t), then the same of",
        f"the differences from {study.note}",
        "",
    ]
    for task, keys in study.tasks.items():
        results[task] = figures(runs, task, study.starts, keys)
        if any(found["seconds"] for found in results[task].values()):
            lines += table(results[task], f"{task}, {study.column}", keys, study.base)
        if study.pictures and all((runs / f"{task}-{start}-0" / "summary.json").is_file() for start in study.starts):
            pictures(runs, task, study.starts, out)
    made = next(iter(runs.glob("*/provenance.json")))
    results["made"] = {
        k: v for k, v in json.loads(made.read_text()).items() if k in ("machine", "torch", "timm", "git")
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "summary.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
