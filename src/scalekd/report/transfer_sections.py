"""Sections of the page of a detector or segmenter: backbone, last validation, and how to use the model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd.common.text import counted
from scalekd.transfer.tasks import TASKS, architecture

from .answer_sections import name
from .curves import losses_text
from .damage import TAUGHT, intact_json
from .folder import RunFolder
from .page import NONE, code, section, table
from .predictions import worst_and_best
from .svg import escape, finite

AP = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "S", "ap_medium": "M", "ap_large": "L"}
SHARES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}
NAMED = 10  # classes without a value that are listed, at most
TEACHER = "backbone's teacher"  # the name of a fact


def teacher_fact(folder: RunFolder) -> dict[str, str]:
    """The teacher of the backbone, if its weights are the student of a run whose folder still exists."""
    weights = (folder.recipe.get("backbone") or {}).get("weights")
    if not isinstance(weights, str) or weights in ("pretrained", "random"):
        return {}
    card, _ = intact_json(Path(weights).expanduser().parent / "student.json", TAUGHT)
    loaded = (folder.made.get("weights") or {}).get("backbone") or {}
    if Path(weights).name == "student.safetensors" and loaded.get("sha256") != card.get("sha256"):
        return {}  # the folder has another student now
    if not card.get("teacher"):
        return {}
    losses = losses_text(card.get("losses") or {})
    return {TEACHER: f"{card['teacher']}, with {losses}" if losses else str(card["teacher"])}


def trained_line(folder: RunFolder, facts: Mapping[str, str]) -> str:
    """Such as: Mask R-CNN on resnet18, weights: runs/kd/student.safetensors, the student of vit_small_patch14_dinov2."""
    backbone = facts.get("backbone") or (folder.recipe.get("backbone") or {}).get("model", "a backbone")
    taught = f", the student of {facts[TEACHER]}" if TEACHER in facts else ""
    teacher = folder.recipe.get("teacher")
    beside = f", beside {teacher.get('model')} while it was trained" if isinstance(teacher, dict) else ""
    return f"{architecture(folder.recipe)} on {backbone}{taught}{beside}"


# ---------------------------------------------------------------- figures


def figure_sections(folder: RunFolder) -> list[str]:
    """Sections on the last validation; empty without one."""
    last = folder.last_validation
    if not last:
        return []
    return _detection(last) if folder.task == "detection" else _segmentation(last)


def figure_rows(task: str | None, last: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of metrics, in %; a dash for missing values."""
    if task == "detection":
        kinds = [kind for kind in ("box", "mask") if kind == "box" or has_masks(last)]
        rows = [[kind, *(shown(last.get(f"{kind}_{key}")) for key in AP)] for kind in kinds]
        return ["%", *AP.values()], rows
    return ["figure", "%"], [[name, shown(last.get(key))] for key, name in SHARES.items()]


def has_masks(validation: Mapping[str, Any]) -> bool:
    """Whether the detector that was validated predicts masks."""
    return "mask_ap" in validation or "box_ap" not in validation


def shown(value: Any) -> str:
    return f"{value:.2f}" if finite(value) else NONE


def _detection(last: Mapping[str, Any]) -> list[str]:
    note = (
        "COCO's metrics. AP: precision averaged over recalls, classes and overlaps (IoU) from 0.50 to 0.95. AP50 and AP75: at IoU "
        "0.50 and 0.75. S, M, L: objects of less than 32x32 pixels, up to 96x96, and larger. A dash: no such objects."
    )
    classes = last.get("classes") or {}
    rows = [[label, shown(ap)] for label, ap in sorted(classes.items(), key=_worst) if finite(ap)]
    without = [label for label, ap in classes.items() if not finite(ap)]
    kind = "mask" if has_masks(last) else "box"
    head = ["class", f"{kind} AP (%)"]
    return [
        section(f"At the end{_on(last)}", table(*figure_rows("detection", last), "numbers"), note),
        _by_class(f"{kind.title()} AP by class", head, rows, without, "because the images have no such object"),
    ]


def _segmentation(last: Mapping[str, Any]) -> list[str]:
    classes = last.get("per_class") or []
    note = (
        f"mIoU: the mean over {last.get('classes_counted')} of {len(classes)} classes, those that are in the "
        "masks or were predicted. Mean accuracy: over the classes in the masks. Pixel accuracy: the share of "
        f"{last.get('pixels') or 0:,} pixels that were classified correctly."
    )
    counted_classes = sorted((c for c in classes if finite(c.get("iou"))), key=lambda c: (c["iou"], c["class"]))
    rows = [
        [c["class"], shown(c["iou"]), shown(c.get("accuracy")), f"{c.get('pixels') or 0:,}"] for c in counted_classes
    ]
    without = [c["class"] for c in classes if not finite(c.get("iou"))]
    head = ["class", "IoU (%)", "accuracy (%)", "pixels"]
    return [
        section(f"At the end{_on(last)}", table(*figure_rows("segmentation", last), "numbers"), note),
        _by_class("IoU by class", head, rows, without, "because they are neither in the masks nor predicted"),
    ]


def _worst(item: tuple[str, Any]) -> tuple[float, str]:
    return (item[1] if finite(item[1]) else 0.0, item[0])


def _on(last: Mapping[str, Any]) -> str:
    return f", on {counted(last['images'], 'validation image')}" if last.get("images") is not None else ""


def _by_class(title: str, head: list[str], rows: list[list[str]], without: list[str], why: str) -> str:
    kept, note = worst_and_best(rows)
    if without:
        more = f" and {len(without) - NAMED} more" if len(without) > NAMED else ""
        note += f" Without a value, {why}: {', '.join(map(name, without[:NAMED]))}{more}."
    return section(title, table(head, [[name(row[0]), *row[1:]] for row in kept], "numbers"), escape(note))


# ---------------------------------------------------------------- use


def use_section(folder: RunFolder) -> str:
    task = str(folder.task)
    if not folder.weights.is_file():
        return section(
            "Use the model",
            "",
            f"{folder.weights.name} is written at the end of the run; the same `{TASKS[task].command} train` resumes it.",
        )
    note = (
        f"This needs scalekd[{task}]. {given_by(folder)} README.md in the run's folder is a model card; `{folder.weights.stem}.json` "
        "describes how to use the weights."
    )
    content = code(predict_line(task, folder.path)) + code(load_lines(task, folder.path))
    return section("Use the model", content, escape(note))


def given_by(folder: RunFolder) -> str:
    """What the model takes and returns."""
    masks = folder.task == "detection" and has_masks(folder.last_validation)
    return f"{GIVES[str(folder.task)]}{'; masks (N, 1, H, W), probabilities' if masks else ''}."


GIVES = {
    "detection": (
        "The model takes a list of uint8 images (C, H, W) of any size, resizes and normalises them, and returns for each one, "
        "sorted by score: boxes (N, 4) left, top, right, bottom in the image's pixels; labels (N,) from 1; scores (N,)"
    ),
    "segmentation": (
        "classes_in resizes and normalises an image as in validation and returns the class of each pixel (H, W), from 0. The model "
        "itself takes normalised images (B, C, H, W) and returns logits (B, classes, H, W)"
    ),
}


def predict_line(task: str, folder: Path) -> str:
    return f"{TASKS[task].command} predict {shlex.quote(str(folder))} photos --out predictions"


def load_lines(task: str, folder: Path, channels: int = 3) -> str:
    """Python code that loads the model of a run's folder and runs it on an image."""
    mode = "L" if channels == 1 else "RGB"
    if task == "detection":
        imports = "from torchvision.transforms.functional import pil_to_tensor\n\nfrom scalekd.transfer.exported_model import load"
        taken = [
            f'pixels = pil_to_tensor(Image.open("image.png").convert("{mode}"))',
            "with torch.no_grad():",
            "    found = model([pixels])[0]",
            'names = [card["classes"][label - 1] for label in found["labels"][found["scores"] > 0.5]]',
        ]
    else:
        imports = "\nfrom scalekd.transfer.exported_model import load\nfrom scalekd.transfer.predict import classes_in, choose_inference"
        taken = [
            'image = Image.open("image.png")',
            'classes = classes_in(model, image, card, choose_inference(model, card, None), torch.device("cpu"))',
            'upper_left = card["classes"][classes[0, 0]]',
        ]
    opened = f'model, card = load(Path({str(folder)!r}), "{task}")'
    return "\n".join(
        ["from pathlib import Path", "", "import torch", "from PIL import Image", imports, "", opened, *taken]
    )
