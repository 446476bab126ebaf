"""A small untrained detector and segmenter with their cards, to export, load, evaluate and predict with."""

from __future__ import annotations

from typing import Any

import timm
import torch

from scalekd.transfer.detection.model import FINEST, Detector
from scalekd.transfer.pyramid import Pyramid
from scalekd.transfer.segmentation.model import UPerNet

INPUT = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.25, 0.25], "figures": {}, "provenance": {"seed": 0}}
DETECTOR = INPUT | {
    "task": "detection",
    "backbone": "test_resnet",
    "kwargs": {},
    "image_size": [64, 64],
    "classes": ["bag", "tie"],
    "category_ids": [3, 7],
    "short": 64,
    "long": 96,
    "anchors": [16, 32, 64, 128, 256],
    "proposals": 12,  # instead of 1000, to save time
}
RETINANET = DETECTOR | {"kind": "retinanet", "width": 16, "anchors": [8, 16, 32, 64, 128]}
SEGMENTER = INPUT | {
    "task": "segmentation",
    "backbone": "test_resnet",
    "kwargs": {},
    "image_size": [64, 64],
    "classes": ["sky", "sea", "sand"],
    "short": 64,
    "long": 256,
    "width": 16,
    "crop": [64, 64],
    "inference": "whole",
    "reduce_zero_label": True,
}


def new_detector(card: dict[str, Any] = DETECTOR) -> Detector:
    """A detector that finds a few large objects with high and low scores."""
    torch.manual_seed(0)
    backbone, kind = timm.create_model(card["backbone"], **card["kwargs"]), card.get("kind", "mask-rcnn")
    pyramid = Pyramid(backbone, tuple(card["image_size"]), FINEST[kind])
    options = {key: card[key] for key in ("short", "long", "anchors")} | {"proposals": (24, card["proposals"])}
    options |= {"kind": kind, "width": card.get("width", 256)}
    detector = Detector(pyramid, len(card["classes"]), card["mean"], card["std"], **options)
    if kind == "retinanet":
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            detector.student.head.classification_head.cls_logits.bias.fill_(-3)
            detector.student.head.regression_head.bbox_reg.weight *= 0.1  # boxes near their anchors, with some area
        return detector
    heads = detector.student.roi_heads
    with torch.no_grad():
        torch.nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.3)
        heads.box_predictor.cls_score.bias[0] -= 3  # of the background
        heads.mask_predictor.mask_fcn_logits.bias.fill_(5)  # avoids empty masks
    return detector


def new_segmenter(card: dict[str, Any] = SEGMENTER) -> UPerNet:
    torch.manual_seed(0)
    pyramid = Pyramid(timm.create_model(card["backbone"], **card["kwargs"]), tuple(card["image_size"]))
    segmenter = UPerNet(pyramid, len(card["classes"]), card["width"]).eval()
    size = card["image_size"]
    noise = torch.randn(1, len(card["mean"]), *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        segmenter.classifier[1].bias -= segmenter(noise).mean((0, 2, 3))  # so that no class is everywhere
    return segmenter
