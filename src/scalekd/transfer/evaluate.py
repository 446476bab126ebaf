"""Evaluates an exported detector or segmenter on annotated images, with the metrics of papers, in %."""

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
from scalekd.data.description import FIRST, KEY, classes_of, part, tell_data
from scalekd.models.inputs import card_statistics

from .detection.coco import Coco, open_coco
from .detection.data import DetectionImages, Scales
from .detection.data import eval_batches as detection_batches
from .detection.scores import Detections, average_precision, detections, percent
from .exported_model import load
from .predict import choose_inference
from .segmentation.data import Crops, SegmentationImages
from .segmentation.data import eval_batches as segmentation_batches
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

    Returns {"task", "weights", "annotations", "images": count, "box" and "mask": {"ap", "ap50", "ap75", "ap_small",
    "ap_medium", "ap_large"}, "per_class": [{"class", "box_ap", "mask_ap", "objects"}], "seconds": {"reading", "model",
    "encoding", "scores"}}; an AP without objects is None. A detector without masks has no mask AP. Prints a summary of
    the annotations on `console`.
    Raises `UserError`, also if the classes are not the detector's.
    """
    need_extra("detection")
    detector, card = load(run, "detection")
    coco = open_coco(annotations, images, "`annotations`", masks=detector.has_masks)
    _expect_classes(card["classes"], coco.classes, annotations)
    described = describe_coco(coco, str(annotations))
    tell_data(console, described)
    for line in coco.summary():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    items = DetectionImages(coco, Scales(channels=len(card["mean"])), None)
    results, seconds = _detect_all(detector.to(device), items, workers, device, console)
    start = time.perf_counter()
    shares = average_precision(coco, results)
    seconds["scores"] = time.perf_counter() - start
    return {
        "task": "detection",
        "weights": card["sha256"],
        "annotations": str(annotations),
        "images": len(coco.pictures),
        KEY: described,
        **{kind: {key: percent(shares[kind][key]) for key in FIGURES} for kind in shares},
        "per_class": _per_class(coco, shares),
        "seconds": {part: round(spent, 3) for part, spent in seconds.items()},
    }


def describe_coco(coco: Coco, annotations: str) -> dict[str, Any]:
    """As `scalekd.data.description` makes it; the size of a class is its number of objects."""
    left = {kind: {"count": len(at), "example": at[0]} for kind, at in coco.problems.items()}
    labels = [x.label - 1 for picture in coco.pictures for x in picture.instances if not x.crowd]
    validation = part(len(coco.pictures), annotations, "", left)
    return {"validation": validation, "classes": classes_of(coco.classes, labels, "objects"), "notes": []}


@torch.inference_mode()
def _detect_all(
    detector: Any, items: DetectionImages, workers: int, device: torch.device, console: Console
) -> tuple[list[Detections], dict[str, float]]:
    """The detections in all images, and the seconds spent on reading, model and encoding."""
    results: list[Detections] = []
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
        results += [detections(p, int(t["picture"])) for p, t in zip(predictions, batch.targets)]
        spent_on("encoding")
    return results, seconds


def _per_class(coco: Coco, shares: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    objects = Counter(x.label for picture in coco.pictures for x in picture.instances if not x.crowd)
    return [
        {
            "class": name,
            **{f"{kind}_ap": percent(shares[kind]["classes"][name]) for kind in shares},
            "objects": objects[label],
        }
        for label, name in enumerate(coco.classes, 1)
    ]


def detector_table(result: dict[str, Any]) -> str:
    """The result of `evaluate_detector` as two Markdown tables and a line on the time spent."""
    kinds = [kind for kind in ("box", "mask") if kind in result]
    lines = [f"| % | {' | '.join(FIGURES.values())} |", "|---" * (len(FIGURES) + 1) + "|"]
    lines += [f"| {kind} | {' | '.join(_cell(result[kind][key]) for key in FIGURES)} |" for kind in kinds]
    head = ["class", *(f"{kind} AP" for kind in kinds), "objects"]
    lines += ["", table_row(head), "|---" * len(head) + "|"]
    for row in result["per_class"]:
        lines.append(table_row([row["class"], *(_cell(row[f"{kind}_ap"]) for kind in kinds), str(row["objects"])]))
    parts = ", ".join(f"{part} {spent:.1f}" for part, spent in result["seconds"].items())
    lines += ["", f"{counted(result['images'], 'image')}; seconds: {parts}"]
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
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
    """mIoU and accuracies in % of an exported segmenter.

    data: a folder as for `open_segments`. Its validation part is used, or all of it if it has no parts.
    mode: `whole` or `sliding`; default: as in the run's validation. classes: a file with class names; default: that
    of `data`.
    Returns the keys of `segmentation.scores.scores` and "task", "weights", "data", "images", "inference".
    Raises `UserError`, also if the classes are not the segmenter's.
    """
    need_extra("segmentation")
    model, card = load(run, "segmentation")
    pairs = _open_evaluated(data, classes, card, run)
    inference = choose_inference(model, card, mode)
    channels = len(card["mean"])
    validation = part(len(pairs), str(data), "", pairs.left_out)
    classes_found = {"count": len(pairs.classes), "first": list(pairs.classes[:FIRST])}
    described = {"validation": validation, "classes": classes_found, "notes": []}
    tell_data(console, described)
    items = SegmentationImages(pairs, Crops(size=(card["short"], card["short"]), channels=channels), None)
    mean, std = card_statistics(card, device)
    batches = segmentation_batches(items, 1, workers, device.type == "cuda")
    tracked = track(batches, "images", len(items), console=console, transient=True, disable=not console.is_terminal)
    scores = evaluate(model.to(device), tracked, mean, std, device, pairs.classes, inference)
    source = {
        "task": "segmentation",
        "weights": card["sha256"],
        "data": str(data),
        "images": len(pairs),
        KEY: described,
    }
    return source | {"inference": mode or card["inference"]} | scores


def _open_evaluated(data: Path, classes: Path | None, card: dict[str, Any], run: Path) -> Pairs:
    """The images and masks to evaluate on. Raises `UserError`."""
    if not data.is_dir():
        raise UserError(f"`data`: {data} is not a folder")
    file = classes or classes_file(data)
    names = read_classes(file)
    _expect_classes(card["classes"], names, file)
    part = part_folders(data, "val") or part_folders(data, "test")
    if part is None:
        masks = next((data / name for name in MASKS if (data / name).is_dir()), None)
        if masks is None or not (data / "images").is_dir() or part_folders(data, "train"):
            raise UserError(
                f"`data`: {data} has no validation images; it needs images/validation and annotations/validation, "
                "or val/images and val/masks, or only images and masks"
            )
        _refuse_training_data(data, run)
        part = data / "images", masks
    return open_pairs(*part, names, card["reduce_zero_label"])


def _refuse_training_data(data: Path, run: Path) -> None:
    """Raises `UserError` if the run was trained on this folder, which has no validation part."""
    recipe = (run if run.is_dir() else run.parent) / "recipe.yaml"
    if not recipe.is_file():
        return
    values = parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe))
    root = (values.get("data") or {}).get("root") if isinstance(values, dict) else None
    if isinstance(root, str) and Path(root).expanduser().resolve() == data.resolve():
        raise UserError(
            f"`data`: {run} was trained on most of {data}, which has no validation part; choose other images with "
            "`data`. The card has the metrics of the held-out images"
        )


def _expect_classes(model: Sequence[str], data: Sequence[str], file: Path) -> None:
    """Raises `UserError` if the model's and the data's classes differ."""
    if list(model) == list(data):
        return
    missing, unknown = [name for name in model if name not in data], [name for name in data if name not in model]
    reasons = [
        f"{reason}: {', '.join(names[:5])}"
        for reason, names in (("missing", missing), ("unknown to the model", unknown))
        if names
    ]
    raise UserError(
        f"{file} has {len(data)} classes, the model {len(model)} others; "
        f"{printable('; '.join(reasons)) or 'the same names in another order'}. Evaluate on data with the same classes."
    )


def segmenter_table(result: dict[str, Any]) -> str:
    """The result of `evaluate_segmenter` as a line and a Markdown table."""
    return (
        f"mIoU {result['miou']:.2f} %  pixel accuracy {result['pixel_accuracy']:.2f} %  mean accuracy "
        f"{result['mean_accuracy']:.2f} %  on {result['images']} images, inference {result['inference']}\n\n"
        + class_table(result)
    )
