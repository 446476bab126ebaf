"""Small COCO annotations and their images, for the tests of detection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scalekd.transfer.detection.coco import Coco, open_coco

POLYGON = [[2, 2, 12, 2, 12, 10, 2, 10]]


def annotation(id: int, image: Any = 1, category: Any = 7, bbox: Any = (2, 2, 10, 8), **more: Any) -> dict[str, Any]:
    box = list(bbox) if isinstance(bbox, tuple) else bbox
    entry = {"id": id, "image_id": image, "category_id": category, "bbox": box}
    return entry | {"segmentation": POLYGON, "iscrowd": 0, "area": 80.0} | more


GOOD: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 20} for i in (1, 2, 3)],
    "categories": [{"id": 90, "name": "tie"}, {"id": 7, "name": "bag"}],  # with holes, in no order
    "annotations": [annotation(1), annotation(2, image=2, category=90)],
}


def write_images(tmp_path: Path) -> Path:
    """Three images of 40x20 pixels."""
    (tmp_path / "images").mkdir()
    for i in (1, 2, 3):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def opened(folder: Path, data: Any = GOOD, **changed: Any) -> Coco:
    """The annotations, with some of their lists replaced."""
    path = folder / "instances.json"
    path.write_text(json.dumps(data | changed if isinstance(data, dict) else data))
    return open_coco(path, folder / "images", "data.train")
