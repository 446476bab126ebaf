"""A trained detector or segmenter on a folder of images: pictures to look at, and files to go on with."""

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

from .deploy import load
from .detection.pictures import picture
from .detection.scores import Found, found
from .predict_files import Images, save_png, write_index
from .segmentation.data import evaluated_at, resized
from .segmentation.overlay import overlay
from .segmentation.scores import Inference, classes_of, inference
from .tasks import need_extra

NOT_COLOURED = ("background",)  # class names


def predict_objects(
    run: Path, source: Path, out: Path, device: torch.device, console: Console, threshold: float = 0.5
) -> None:
    """Writes into the new folder `out` a picture of each image with what was found in it, `predictions.json` and
    `index.html`; docs/how-to/transfer.md has the forms. What scores below `threshold` is in neither.

    run: a run's folder or a detector.safetensors. source: a folder of images, or one image. An image that cannot be
    used is told, and listed in bad-images.txt. Raises `UserError`, for a source without a usable image too.
    """
    need_extra("detection")
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: a share from 0 to 1")
    images = Images(source, out, console)
    detector, card = load(run, "detection")
    detector.to(device)
    heads = detector.student.roi_heads
    # before the masks are drawn in full size: an uncertain one costs as much memory as a certain one
    heads.score_thresh = max(heads.score_thresh, threshold)
    results: list[dict[str, Any]] = []
    rows = []
    for number, place in enumerate(_progress(images, console), 1):
        image = images.read(place)
        if image is None:
            continue
        prediction = objects_in(detector, image, len(card["mean"]))
        if prediction is None:
            images.leave_out(place, f"it is too narrow, {image.width}x{image.height} pixels")
            continue
        objects = coco_results(found(prediction, number), images.names[place], card)
        results += objects
        save_png(picture(image, prediction, card["classes"], threshold), out / "pictures" / images.outputs[place])
        rows.append((place, _told([entry["category"] for entry in objects])))
    images.close()
    write_text(out / "predictions.json", json.dumps(results) + "\n")
    write_index(out, images, rows, f"What {run} found", {})
    every = _told([entry["category"] for entry in results])
    console.print(f"{counted(len(rows), 'image')}: {every}", markup=False, highlight=False, soft_wrap=True)


@torch.inference_mode()
def objects_in(detector: Any, image: Image.Image, channels: int) -> dict[str, Tensor] | None:
    """`Detector.forward`'s prediction for one image, on the CPU; None if nothing is left of its short side."""
    transform = detector.student.transform
    short, long = min(image.size), max(image.size)
    if int(short * min(min(transform.min_size) / short, transform.max_size / long)) < 1:
        return None
    prediction = detector([_pixels(image, channels)])[0]
    return {name: value.cpu() for name, value in prediction.items()}


def coco_results(result: Found, name: str, card: dict[str, Any]) -> list[dict[str, Any]]:
    """In COCO's results format, with the names of file and class beside the numbers."""
    ids = card.get("category_ids") or range(1, len(card["classes"]) + 1)
    return [
        {
            "image_id": result.picture,
            "file_name": name,
            "category_id": ids[label - 1],
            "category": card["classes"][label - 1],
            "bbox": [round(value, 2) for value in box.tolist()],
            "score": round(float(score), 5),
            "segmentation": {"size": [int(side) for side in runs["size"]], "counts": _text(runs["counts"])},
        }
        for label, box, score, runs in zip(result.labels, result.boxes, result.scores, result.masks)
    ]


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def _told(names: Sequence[str]) -> str:
    if not names:
        return "nothing found"
    return ", ".join(f"{number} {printable(name)}" for name, number in Counter(names).most_common())


# ---------------------------------------------------------------- segmentation


def predict_classes(
    run: Path, source: Path, out: Path, device: torch.device, console: Console, mode: str | None = None
) -> None:
    """Writes into the new folder `out` an overlay and a mask of each image, `classes.txt` and `index.html` with a
    legend; docs/how-to/transfer.md has the forms.

    run: a run's folder or a segmenter.safetensors. source: a folder of images, or one image. mode: whole or sliding,
    else as the run was validated. Bad images and errors: as for `predict_objects`.
    """
    need_extra("segmentation")
    images = Images(source, out, console)
    model, card = load(run, "segmentation")
    model.to(device)
    how = how_of(model, card, mode)
    shares = np.zeros(len(card["classes"]))
    rows = []
    for place in _progress(images, console):
        image = images.read(place)
        if image is None:
            continue
        predicted = classes_in(model, image, card, how, device)
        masks = (predicted + card["reduce_zero_label"]).astype(np.uint8)  # classes count from 1 there
        save_png(Image.fromarray(masks), out / "masks" / images.outputs[place])
        drawn = overlay(image, predicted, card["classes"], without=NOT_COLOURED)
        save_png(drawn, out / "pictures" / images.outputs[place])
        shares += np.bincount(predicted.ravel(), minlength=len(shares)) / predicted.size
        rows.append((place, ""))
    images.close()
    write_text(out / "classes.txt", "".join(f"{printable(name)}\n" for name in card["classes"]))
    values = {name: c + card["reduce_zero_label"] for c, name in enumerate(card["classes"])}
    write_index(out, images, rows, f"What {run} saw", values)
    best = [int(c) for c in np.argsort(-shares, kind="stable")[:5] if shares[c]]
    most = ", ".join(f"{printable(card['classes'][c])} {100 * shares[c] / len(rows):.1f} %" for c in best)
    told = f"{counted(len(rows), 'image')}; of their pixels: {most}{', ...' if shares.astype(bool).sum() > 5 else ''}"
    console.print(told, markup=False, highlight=False, soft_wrap=True)


def how_of(model: Any, card: dict[str, Any], mode: str | None) -> Inference:
    """The inference that was asked for, else the card's; windows have the size of training crops. Raises `UserError`
    for whole images, when one comes that the backbone cannot take."""
    mode = mode or card["inference"]
    if mode == "sliding" or model.pyramid.canvas is None:
        return inference(mode, tuple(card["crop"]))
    canvas = model.pyramid.canvas

    def whole(model: nn.Module, x: Tensor) -> Tensor:
        if x.shape[-2] > canvas[0] or x.shape[-1] > canvas[1]:
            raise UserError(
                f"{card['backbone']} takes {canvas[0]}x{canvas[1]} pixels and no others, and an image has "
                f"{x.shape[-2]}x{x.shape[-1]} once resized: add --inference sliding"
            )
        return model(x)

    return whole


@torch.inference_mode()
def classes_in(model: nn.Module, image: Image.Image, card: dict[str, Any], how: Inference, device: torch.device) -> Any:
    """(H, W) int64: the likeliest class of each pixel of the image, from 0."""
    size = evaluated_at(image.height, image.width, (card["short"], card["short"]))
    pixels = resized(_pixels(image, len(card["mean"])), size)
    mean, std = (torch.tensor(card[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))
    logits = how(model, (pixels[None].to(device).float() / 255 - mean) / std)
    return classes_of(logits.float(), (image.height, image.width))[0].cpu().numpy()


def _pixels(image: Image.Image, channels: int) -> Tensor:
    return TF.pil_to_tensor(of_channels(channels, image))


def _progress(images: Images, console: Console) -> Any:
    return track(range(len(images.names)), "images", console=console, transient=True, disable=not console.is_terminal)
