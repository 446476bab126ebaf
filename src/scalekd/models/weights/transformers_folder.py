"""Folders in the format of Hugging Face transformers: config.json with a `model_type`, and the image processor's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError, first_line
from scalekd.common.text import printable, shortened

from ..transformers_families import FAMILIES, NAME, without_code

WEIGHTS = "model.safetensors"
BICUBIC = 3  # of PIL


def is_transformers(config: object) -> bool:
    """Whether this is the content of a config.json of transformers, and not of timm."""
    return isinstance(config, dict) and "model_type" in config and "architecture" not in config


def read_transformers(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Described` of a folder whose config.json has this content. Raises `UserError`."""
    try:
        vision = dict(config)
        if config["model_type"] == "siglip":  # images and texts
            vision = {"model_type": "siglip_vision_model"} | config["vision_config"]
        if vision["model_type"] not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UserError(
                f"{folder}: transformers models of type {printable(str(vision['model_type']))} are not supported. Supported: "
                f"siglip, {known}. Many others are in timm: `scalekd teachers NAME`"
            )
        family, processor = FAMILIES[vision["model_type"]], _processor(folder)
        normalised = processor.get("do_normalize", True)
        size, crop = _sizes(processor)
        labels = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
        classified = any(name.endswith("ForImageClassification") for name in config.get("architectures") or ())
        return {
            "model": NAME,
            "kwargs": {"config": without_code(vision)} | ({"pool": family.classified} if classified else {}),
            "weights": folder / WEIGHTS,
            "channels": len(processor["image_mean"]),
            "image_size": crop,
            "mean": [float(v) if normalised else 0.0 for v in processor["image_mean"]],
            "std": [float(v) if normalised else 1.0 for v in processor["image_std"]],
            "interpolation": "bicubic" if processor.get("resample", BICUBIC) == BICUBIC else "bilinear",
            "crop_pct": min(1.0, crop[0] / size),
            "classes": [labels[i] for i in sorted(labels)] if classified and labels else None,
        }
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} is not a valid folder of transformers: {shortened(first_line(error))}") from None


def _processor(folder: Path) -> dict[str, Any]:
    """The image processor's values, from its own file or from that of a processor of images and texts."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text())
            values = values if key is None else values.get(key)
            if isinstance(values, dict) and "image_mean" in values:
                return values
    raise UserError(
        f"{folder} has no preprocessor_config.json with image_mean, image_std and size, so the model's input is not known. Add "
        "it from the model's page"
    )


def _sizes(processor: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
    """The length to which the shorter side of an image is resized, and (height, width) of the crop, in pixels."""
    size, crop = processor.get("size"), processor.get("crop_size")
    sides = _sides(size)
    if crop and processor.get("do_center_crop", True):
        return min(sides), _sides(crop)
    return min(sides), sides


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])
