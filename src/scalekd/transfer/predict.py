"""Runs a trained detector or segmenter on a folder of images, and writes pictures, masks and JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from scalekd.common.errors import UserError
from scalekd.common.files import write_text
from scalekd.common.text import counted, printable
from scalekd.data.images import of_channels
from scalekd.models.inputs import card_statistics, scaled

from .detection.pictures import picture
from .detection.scores import Detections, detections
from .exported_model import load
from .predict_files import SourceImages, save_png, write_index
from .segmentation.data import evaluation_size, resized
from .segmentation.overlay import overlay
from .segmentation.scores import Inference, classes_of, make_inference
from .tasks import need_extra

NOT_COLOURED = ("background",)  # names of classes that overlays do not colour


def predict_objects(
    run: Path, source: Path, out: Path, device: torch.device, console: Console, threshold: float = 0.5
) -> None:
    """Writes a picture of each image with its detections, `predictions.json` and `index.html` into the new folder
    `out`; docs/how-to/transfer.md describes them. Objects that score below `threshold` are left out of all.

    run: a run's folder or a detector.safetensors. source: a folder of images, or one image. Images that cannot be used
    are skipped, printed and listed in bad-images.txt. Raises `UserError`, also if no image can be used.
    """
    need_extra("detection")
    if not 0 <= threshold <= 1:
        raise UserError(f"`threshold` must be from 0 to 1, not {threshold:g}")
    images = SourceImages(source, out, console)
    detector, card = load(run, "detection")
    detector.to(device)
    detector.leave_out_below(threshold)
    results: list[dict[str, Any]] = []
    rows = []
    for i in _progress(images, console):
        image = images.read(i)
        if image is None:
            continue
        prediction = objects_in(detector, image, len(card["mean"]))
        if prediction is None:
            images.skip(i, f"too narrow, {image.width}x{image.height} pixels")
            continue
        objects = coco_results(detections(prediction, i + 1), images.names[i], card)
        results += objects
        save_png(picture(image, prediction, card["classes"], threshold), out / "pictures" / images.outputs[i])
        rows.append((i, _counts([entry["category"] for entry in objects])))
    images.close()
    write_text(out / "predictions.json", json.dumps(results) + "\n")
    write_index(out, images, rows, f"Objects found by {run}", {})
    total = _counts([entry["category"] for entry in results])
    console.print(f"{counted(len(rows), 'image')}: {total}", markup=False, highlight=False, soft_wrap=True)


@torch.inference_mode()
def objects_in(detector: Any, image: Image.Image, channels: int) -> dict[str, Tensor] | None:
    """The prediction of `Detector.forward` for one image, on the CPU; None if resizing would leave no short side."""
    transform = detector.student.transform
    short, long = min(image.size), max(image.size)
    if int(short * min(min(transform.min_size) / short, transform.max_size / long)) < 1:
        return None
    prediction = detector([_pixels(image, channels)])[0]
    return {name: value.cpu() for name, value in prediction.items()}


def coco_results(result: Detections, name: str, card: dict[str, Any]) -> list[dict[str, Any]]:
    """Detections in COCO's results format, with the names of file and class added."""
    ids = card.get("category_ids") or range(1, len(card["classes"]) + 1)
    masks = [
        {"segmentation": {"size": [int(side) for side in runs["size"]], "counts": _text(runs["counts"])}}
        for runs in result.masks or []
    ] or [{} for _ in result.labels]
    return [
        {
            "image_id": result.picture,
            "file_name": name,
            "category_id": ids[label - 1],
            "category": card["classes"][label - 1],
            "bbox": [round(value, 2) for value in box.tolist()],
            "score": round(float(score), 5),
        }
        | mask
        for label, box, score, mask in zip(result.labels, result.boxes, result.scores, masks)
    ]


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def _counts(names: Sequence[str]) -> str:
    """How many objects of each class, the most frequent first."""
    if not names:
        return "no objects"
    return ", ".join(f"{number} {printable(name)}" for name, number in Counter(names).most_common())


# ---------------------------------------------------------------- segmentation


def predict_classes(
    run: Path, source: Path, out: Path, device: torch.device, console: Console, mode: str | None = None
) -> None:
    """Writes an overlay and a mask of each image, `classes.txt` and `index.html` with a legend into the new folder
    `out`; docs/how-to/transfer.md describes them.

    run: a run's folder or a segmenter.safetensors. source: a folder of images, or one image. mode: `whole` or
    `sliding`; default: as in the run's validation. Bad images and errors: as for `predict_objects`.
    """
    need_extra("segmentation")
    images = SourceImages(source, out, console)
    model, card = load(run, "segmentation")
    model.to(device)
    inference = choose_inference(model, card, mode)
    shares = np.zeros(len(card["classes"]))
    rows = []
    for i in _progress(images, console):
        image = images.read(i)
        if image is None:
            continue
        predicted = classes_in(model, image, card, inference, device)
        masks = (predicted + card["reduce_zero_label"]).astype(np.uint8)  # with it, mask values start at 1
        save_png(Image.fromarray(masks), out / "masks" / images.outputs[i])
        drawn = overlay(image, predicted, card["classes"], without=NOT_COLOURED)
        save_png(drawn, out / "pictures" / images.outputs[i])
        shares += np.bincount(predicted.ravel(), minlength=len(shares)) / predicted.size
        rows.append((i, ""))
    images.close()
    write_text(out / "classes.txt", "".join(f"{printable(name)}\n" for name in card["classes"]))
    values = {name: c + card["reduce_zero_label"] for c, name in enumerate(card["classes"])}
    write_index(out, images, rows, f"Classes predicted by {run}", values)
    largest = [int(c) for c in np.argsort(-shares, kind="stable")[:5] if shares[c]]
    listed = ", ".join(f"{printable(card['classes'][c])} {100 * shares[c] / len(rows):.1f} %" for c in largest)
    more = ", ..." if shares.astype(bool).sum() > 5 else ""
    console.print(
        f"{counted(len(rows), 'image')}; share of pixels: {listed}{more}", markup=False, highlight=False, soft_wrap=True
    )


def choose_inference(model: Any, card: dict[str, Any], mode: str | None) -> Inference:
    """The inference for `mode`, by default that of the card. Sliding windows have the size of training crops.

    Whole-image inference raises `UserError` for an image that is larger than a fixed-size backbone accepts.
    """
    mode = mode or card["inference"]
    if mode == "sliding" or model.pyramid.canvas is None:
        return make_inference(mode, tuple(card["crop"]))
    canvas = model.pyramid.canvas

    def whole(model: nn.Module, x: Tensor) -> Tensor:
        if x.shape[-2] > canvas[0] or x.shape[-1] > canvas[1]:
            raise UserError(
                f"{card['backbone']} only accepts {canvas[0]}x{canvas[1]} pixels, and an image has "
                f"{x.shape[-2]}x{x.shape[-1]} after resizing; set `inference` to sliding"
            )
        return model(x)

    return whole


@torch.inference_mode()
def classes_in(
    model: nn.Module, image: Image.Image, card: dict[str, Any], inference: Inference, device: torch.device
) -> Any:
    """(H, W) int64: the most likely class of each pixel of the image, from 0."""
    size = evaluation_size(image.height, image.width, (card["short"], card["short"]))
    pixels = resized(_pixels(image, len(card["mean"])), size)
    mean, std = card_statistics(card, device)
    logits = inference(model, (scaled(pixels[None].to(device)) - mean) / std)
    return classes_of(logits.float(), (image.height, image.width))[0].cpu().numpy()


def _pixels(image: Image.Image, channels: int) -> Tensor:
    return TF.pil_to_tensor(of_channels(channels, image))


def _progress(images: SourceImages, console: Console) -> Any:
    return track(range(len(images.names)), "images", console=console, transient=True, disable=not console.is_terminal)
