"""Measures where the time of `scalekd detect evaluate` goes, on 5,000 annotations of COCO's size.

    python benchmarks/ap_cost.py --out docs/results/ap-cost.json

Uses 700 images of 640x480 with random polygons and as many detections as COCO counts (100 per image: the objects and
noise). Reading annotations, encoding masks and computing box and mask AP are measured on all of them. The model, a Mask
R-CNN on a ResNet-50 with random weights, is timed on a few images at 800x1333; the result is scaled to all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from scalekd.common.provenance import machine, versions
from scalekd.transfer.detection.coco import open_coco
from scalekd.transfer.detection.masks import mask_of
from scalekd.transfer.detection.model import Detector
from scalekd.transfer.detection.scores import average_precision, detections
from scalekd.transfer.pyramid import Pyramid

IMAGES, ANNOTATIONS, HEIGHT, WIDTH, CLASSES, DETECTIONS = 700, 5000, 480, 640, 80, 100


def polygon(random: np.random.Generator) -> tuple[list[float], list[float]]:
    """A random shape with 24 corners inside the image, and its box."""
    size = random.uniform(15, 200, 2)
    x, y = random.uniform(0, (WIDTH, HEIGHT) - size)
    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    radius = random.uniform(0.7, 1.0, 24) / 2
    xs, ys = x + size[0] * (0.5 + radius * np.cos(angles)), y + size[1] * (0.5 + radius * np.sin(angles))
    box = [xs.min(), ys.min(), xs.max() - xs.min(), ys.max() - ys.min()]
    return np.stack([xs, ys], 1).round(2).ravel().tolist(), [round(float(v), 2) for v in box]


def made(folder: Path, random: np.random.Generator) -> Path:
    blank = Image.new("RGB", (WIDTH, HEIGHT))
    images, annotations = [], []
    for i in range(IMAGES):
        blank.save(folder / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH})
    for k in range(ANNOTATIONS):
        shape, box = polygon(random)
        area = {"area": box[2] * box[3], "bbox": box, "segmentation": [shape], "iscrowd": 0}
        annotations.append(
            {"id": k + 1, "image_id": k % IMAGES, "category_id": int(random.integers(CLASSES)) + 1} | area
        )
    categories = [{"id": c + 1, "name": f"class {c}"} for c in range(CLASSES)]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def main(out: Path | None, timed: int) -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        file = made(Path(scratch), random)
        began = time.process_time()
        coco = open_coco(file, Path(scratch), "annotations")
        seconds["reading annotations"] = time.process_time() - began
    noise = torch.stack([torch.from_numpy(mask_of([polygon(random)[0]], HEIGHT, WIDTH)) for _ in range(DETECTIONS)])
    results, encoding = [], 0.0
    for place, picture in enumerate(coco.pictures):
        true = [torch.from_numpy(mask_of(x.mask, HEIGHT, WIDTH)) for x in picture.instances]
        masks = torch.cat([torch.stack(true), noise[len(true) :]]).float()[:, None]
        labels = [x.label for x in picture.instances] + random.integers(1, CLASSES + 1, DETECTIONS - len(true)).tolist()
        prediction = {
            "boxes": masks_to_boxes(masks[:, 0]),
            "labels": torch.tensor(labels),
            "scores": torch.rand(DETECTIONS),
            "masks": masks,
        }
        began = time.process_time()
        results.append(detections(prediction, place))
        encoding += time.process_time() - began
    seconds["encoding masks"] = encoding
    began = time.process_time()
    scores = average_precision(coco, results)
    seconds["AP of boxes and masks"] = time.process_time() - began
    detector = Detector(Pyramid(timm.create_model("resnet50"), (224, 224)), CLASSES, (0.5,) * 3, (0.25,) * 3).eval()
    each = []
    with torch.inference_mode():
        for _ in range(timed + 1):
            image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
            began = time.process_time()
            last = detector([image])[0]
            each.append(time.process_time() - began)
    model = statistics.median(each[1:]) * IMAGES
    bookkeeping = sum(seconds.values())
    result = {
        "command": "python benchmarks/ap_cost.py --out docs/results/ap-cost.json",
        "machine": machine(torch.device("cpu")),
        **versions(),
        "images": IMAGES,
        "annotations": ANNOTATIONS,
        "detections": IMAGES * DETECTIONS,
        "bookkeeping, CPU seconds": {name: round(value, 2) for name, value in seconds.items()},
        "model, CPU seconds an image": [round(s, 2) for s in each[1:]],
        "model, detections in the last image": len(last["scores"]),
        "model, CPU seconds for all images": round(model),
        "share of the model": round(model / (model + bookkeeping), 4),
        "box AP": scores["box"]["ap"],
    }
    print(json.dumps(result, indent=2))
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--timed", type=int, default=3, metavar="N", help="images that the model is timed on (default: 3)"
    )
    args = parser.parse_args()
    main(args.out, args.timed)
