"""What an exported detector or segmenter is worth on annotated images: figures in %, as papers have them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from scalekd.common.errors import UserError
from scalekd.common.markdown import table_row
from scalekd.common.text import counted, printable
from scalekd.common.yaml_file import parse_yaml

from .deploy import load
from .detection.coco import Coco, open_coco
from .detection.data import DetectionImages, Scales
from .detection.data import eval_batches as detection_batches
from .detection.scores import Found, average_precision, found, percent
from .predict import how_of
from .segmentation.data import Crops, SegmentImages
from .segmentation.data import eval_batches as segment_batches
from .segmentation.pairs import MASKS, Pairs, classes_file, open_pairs, part_folders, read_classes
from .segmentation.scores import evaluate
from .segmentation.scores import table as class_table
from .tasks import need_extra

FIGURES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP S", "ap_medium": "AP M", "ap_large": "AP L"}

# ---------------------------------------------------------------- detection


def evaluate_detector(
    run: Path, annotations: Path, images: Path, device: torch.device, console: Console, workers: int = 4
) -> dict[str, Any]:
    """Box and mask AP in % of an exported detector on COCO annotations, one image at a time.

    {"task", "weights", "annotations", "images": count, "box" and "mask": {"ap", "ap50", "ap75", "ap_small",
    "ap_medium", "ap_large"}, "per_class": [{"class", "box_ap", "mask_ap", "objects"}], "seconds": of {"reading",
    "model", "encoding", "scores"}}; an AP is None where there is no object.
    console: told what the annotations hold. Raises `UserError`; for classes that are not the detector's, too.
    """
    need_extra("detection")
    detector, card = load(run, "detection")
    coco = open_coco(annotations, images, "--annotations")
    _same_classes(card["classes"], coco.classes, annotations)
    for line in coco.told():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    items = DetectionImages(coco, Scales(channels=len(card["mean"])), None)
    results, seconds = _found_in(detector.to(device), items, workers, device, console)
    start = time.perf_counter()
    shares = average_precision(coco, results)
    seconds["scores"] = time.perf_counter() - start
    return {
        "task": "detection",
        "weights": card["sha256"],
        "annotations": str(annotations),
        "images": len(coco.pictures),
        **{kind: {key: percent(shares[kind][key]) for key in FIGURES} for kind in ("box", "mask")},
        "per_class": _per_class(coco, shares),
        "seconds": {part: round(spent, 3) for part, spent in seconds.items()},
    }


@torch.inference_mode()
def _found_in(
    detector: Any, items: DetectionImages, workers: int, device: torch.device, console: Console
) -> tuple[list[Found], dict[str, float]]:
    """What is found in all images, and the seconds that went into its parts."""
    results: list[Found] = []
    seconds = {"reading": 0.0, "model": 0.0, "encoding": 0.0}
    batches = detection_batches(items, 1, workers, device.type == "cuda")
    before = time.perf_counter()

    def spent_on(part: str) -> None:
        nonlocal before
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seconds[part] += now - before
        before = now

    for batch in track(batches, "images", len(items), console=console, transient=True, disable=not console.is_terminal):
        spent_on("reading")
        predictions = detector(batch.images)
        spent_on("model")
        results += [found(p, int(t["picture"])) for p, t in zip(predictions, batch.targets)]
        spent_on("encoding")
    return results, seconds


def _per_class(coco: Coco, shares: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    objects = Counter(x.label for picture in coco.pictures for x in picture.instances if not x.crowd)
    return [
        {
            "class": name,
            **{f"{kind}_ap": percent(shares[kind]["classes"][name]) for kind in ("box", "mask")},
            "objects": objects[label],
        }
        for label, name in enumerate(coco.classes, 1)
    ]


def detector_table(result: dict[str, Any]) -> str:
    """`evaluate_detector`'s figures as two Markdown tables, and where its time went."""
    lines = [f"| % | {' | '.join(FIGURES.values())} |", "|---" * (len(FIGURES) + 1) + "|"]
    lines += [f"| {kind} | {' | '.join(_shown(result[kind][key]) for key in FIGURES)} |" for kind in ("box", "mask")]
    lines += ["", "| class | box AP | mask AP | objects |", "|---|---|---|---|"]
    for row in result["per_class"]:
        lines.append(table_row([row["class"], _shown(row["box_ap"]), _shown(row["mask_ap"]), str(row["objects"])]))
    parts = ", ".join(f"{part} {spent:.1f}" for part, spent in result["seconds"].items())
    lines += ["", f"{counted(result['images'], 'image')}; seconds: {parts}"]
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# ---------------------------------------------------------------- segmentation


def evaluate_segmenter(
    run: Path,
    data: Path,
    device: torch.device,
    console: Console,
    mode: str | None = None,
    classes: Path | None = None,
    workers: int = 4,
) -> dict[str, Any]:
    """mIoU and accuracies in % of an exported segmenter: `segment_eval.scores`, with "task", "weights", "data",
    "images" and "inference" beside them.

    data: a folder as `open_segments` takes it. Its validation part is read; where it has no parts, all of it.
    mode: whole or sliding, else as the run was validated. classes: a file with their names, else that of `data`.
    Raises `UserError`; for classes that are not the segmenter's, too.
    """
    need_extra("segmentation")
    model, card = load(run, "segmentation")
    pairs = _pairs_of(data, classes, card, run)
    how = how_of(model, card, mode)
    channels = len(card["mean"])
    items = SegmentImages(pairs, Crops(size=(card["short"], card["short"]), channels=channels), None)
    mean, std = (torch.tensor(card[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))
    batches = segment_batches(items, 1, workers, device.type == "cuda")
    shown = track(batches, "images", len(items), console=console, transient=True, disable=not console.is_terminal)
    scores = evaluate(model.to(device), shown, mean, std, device, pairs.classes, how)
    told = {"task": "segmentation", "weights": card["sha256"], "data": str(data), "images": len(pairs)}
    return told | {"inference": mode or card["inference"]} | scores


def _pairs_of(data: Path, classes: Path | None, card: dict[str, Any], run: Path) -> Pairs:
    """The images and masks to evaluate on. Raises `UserError`."""
    if not data.is_dir():
        raise UserError(f"--data: {data} is not a folder")
    file = classes or classes_file(data)
    names = read_classes(file)
    _same_classes(card["classes"], names, file)
    part = part_folders(data, "val")
    if part is None:
        masks = next((data / name for name in MASKS if (data / name).is_dir()), None)
        if masks is None or not (data / "images").is_dir() or part_folders(data, "train"):
            raise UserError(
                f"--data: {data} has nothing to evaluate on: there must be images/validation and "
                "annotations/validation, or val/images and val/masks, or images and masks alone"
            )
        _refuse_trained_on(data, run)
        part = data / "images", masks
    return open_pairs(*part, names, card["reduce_zero_label"])


def _refuse_trained_on(data: Path, run: Path) -> None:
    """A folder without parts that the run was trained on, but for a tenth, would give figures of training images."""
    recipe = (run if run.is_dir() else run.parent) / "recipe.yaml"
    if not recipe.is_file():
        return
    values = parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe))
    root = (values.get("data") or {}).get("root") if isinstance(values, dict) else None
    if isinstance(root, str) and Path(root).expanduser().resolve() == data.resolve():
        raise UserError(
            f"--data: {run} was trained on most of {data}, which has no validation part of its own, so its figures "
            "would say little. Name other images; those of the held-out part are in the card"
        )


def _same_classes(ours: Sequence[str], theirs: Sequence[str], where: Path) -> None:
    if list(ours) == list(theirs):
        return
    odd = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    what = ("missing there", "unknown to the model")
    told = [f"{reason}: {', '.join(names[:5])}" for reason, names in zip(what, odd) if names]
    raise UserError(
        f"{where} has other classes than the model, {len(theirs)} and {len(ours)}; "
        f"{printable('; '.join(told)) or 'the same names in another order'}. Evaluate on data with the same classes."
    )


def segmenter_table(result: dict[str, Any]) -> str:
    """`evaluate_segmenter`'s figures as a line and a Markdown table."""
    return (
        f"mIoU {result['miou']:.2f} %  pixel accuracy {result['pixel_accuracy']:.2f} %  mean accuracy "
        f"{result['mean_accuracy']:.2f} %  on {result['images']} images, inference {result['inference']}\n\n"
        + class_table(result)
    )
