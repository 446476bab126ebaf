"""Builds a detection run from a recipe: data, model, optimiser, losses, validation and card."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.common.stopwatch import Stopwatch
from scalekd.data.batches import bad_images
from scalekd.data.description import classes_of, part
from scalekd.data.samplers import Key, TrainSampler
from scalekd.models.inputs import scaled
from scalekd.train.hardware import for_device
from scalekd.train.optim import make_schedule
from scalekd.train.run import Run, prepared, scaler_and_average
from scalekd.transfer.backbone import build_backbone
from scalekd.transfer.build import input_statistics, make_optimizer, projector_of, steps_per_epoch
from scalekd.transfer.config import Detection
from scalekd.transfer.overlap import refuse_shared
from scalekd.transfer.pyramid import Pyramid, Size
from scalekd.transfer.tasks import TASKS
from scalekd.transfer.teacher import build_teacher

from .coco import Coco, open_coco
from .data import DetectionBatch, DetectionImages, Scales, batches_of, collate, eval_batches
from .model import FINEST, Detector
from .scores import average_precision, detections, merged, percent


@dataclass(kw_only=True)
class DetectionRun(Run):
    task = TASKS["detection"]
    batch = DetectionBatch
    config: Detection
    train_images: DetectionImages
    val_images: DetectionImages
    model: Detector
    image_size: Size  # (height, width) that the backbone was built for

    @property
    def figures(self) -> dict[str, str]:
        return {key: name for key, name in self.task.figures.items() if self.model.has_masks or key != "mask_ap"}

    @property
    def student(self) -> nn.Module:
        return self.model.student

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"student": self.model.student} | projector_of(self.model.teacher)

    @property
    def teacher_clock(self) -> Stopwatch | None:
        return self.model.teacher.clock if self.model.teacher else None

    @property
    def eval_batch_size(self) -> int:
        return 1  # a batch is padded to its largest image, so detections would depend on the other images

    def losses(self, model: nn.Module, batch: DetectionBatch, micro: int) -> dict[str, Tensor]:
        return model(batch.images, batch.targets)

    def train_batches(self, sampler: TrainSampler, workers: int) -> Generator[DetectionBatch, None, None]:
        return batches_of(self.train_images, sampler, workers, self.device.type == "cuda")

    def eval_batches(self, size: int, workers: int) -> Generator[DetectionBatch, None, None]:
        pin = self.device.type == "cuda"
        return eval_batches(self.val_images, size, workers, pin, parallel.rank(), parallel.world())

    def again(self, keys: list[Key]) -> tuple[DetectionBatch, list[str]]:
        images = self.train_images
        batch = collate([images[key] for key in keys])
        if isinstance(batch, UserError):
            raise batch
        return batch, [images.coco.pictures[images.indices[i]].path for _, i in keys]

    @torch.inference_mode()
    def validate(self, batches: Iterable[DetectionBatch]) -> dict[str, Any]:
        """AP in % (`box_ap`, `box_ap50`, ..., and `mask_ap`, ... of a Mask R-CNN), `images`, and `classes` with the mask AP
        of each class, or its box AP without masks."""
        detector = self.deployed.eval()
        results = []
        for batch in batches:
            pixels = [scaled(image.to(self.device)) for image in batch.images]
            results += [detections(p, int(t["picture"])) for p, t in zip(detector(pixels), batch.targets)]
        self.model.train()
        results = merged(results)
        if not results:
            raise UserError("no validation image can be read; repair them, or set data.val_annotations to others")
        scores = average_precision(self.val_images.coco, results)
        figures = {
            f"{kind}_{key}": percent(share)
            for kind, shares in scores.items()
            for key, share in shares.items()
            if key != "classes"
        }
        by_class = scores["mask" if self.model.has_masks else "box"]["classes"]
        classes = {name: percent(share) for name, share in by_class.items()}
        return figures | {"images": len(results), "classes": classes}

    def card(self) -> dict[str, Any]:
        """The keys of `DetectorCard`, without sha256."""
        data, coco = self.config.data, self.train_images.coco
        limit = self.model.limit
        return {
            "task": "detection",
            "kind": self.config.detector.kind,
            "backbone": self.config.backbone.model,
            "kwargs": self.loaded["backbone"].kwargs,
            "image_size": list(self.image_size),
            "classes": coco.classes,
            "category_ids": coco.category_ids,
            **input_statistics(self.model.student.transform.image_mean, self.model.student.transform.image_std),
            "short": limit or data.short,
            "long": limit or data.long,
            "anchors": list(self.config.detector.anchors),
            "width": self.config.detector.width,
            "proposals": self.config.detector.proposals[1],
        }

    def data_summary(self) -> list[str]:
        """Lines on the data and the problems in it."""
        parts = {"training": self.train_images, "validation": self.val_images}
        lines = [f"{part}: {line}" for part, images in parts.items() for line in images.coco.summary()]
        if self.model.limit:
            lines.append(
                f"{self.config.backbone.model} has a fixed input size: images are resized to at most "
                f"{self.model.limit} pixels"
            )
        return lines


def build(config: Detection, device: torch.device) -> DetectionRun:
    """Opens the data and builds model, optimiser and schedule. Raises `UserError`."""
    config = for_device(config, device)
    seed_everything(config.seed, "models")
    data = config.data
    kind, masks = config.detector.kind, config.detector.kind == "mask-rcnn"
    coco = open_coco(Path(data.annotations), Path(data.images), "data.annotations", masks=masks)
    val = open_coco(Path(data.val_annotations), Path(data.val_images), "data.val_annotations", coco.classes, masks)
    notes = _expect_disjoint(coco, val)
    backbone, loaded, size, (mean, std) = build_backbone(config.backbone, data.channels)
    model = Detector(
        Pyramid(backbone, size, FINEST[kind]),
        len(coco.classes),
        mean,
        std,
        short=data.short,
        long=data.long,
        **config.detector.model_dump(),
    )
    # last, so that the other initial weights are those of a run without a teacher
    model.teacher, teacher = build_teacher(config.teacher, data.channels, model.student.backbone.pyramid)
    prepared(model, config, device)
    scales = Scales(data.scales, data.long, data.flip, data.channels).limited(model.limit)
    count = len(coco.with_objects())
    train_images = DetectionImages(coco, scales, config.seed, bad_images("train", data, count), masks)
    val_images = DetectionImages(val, scales, None, bad_images("val", data, len(val.pictures)))
    train_images.skippable = val_images.skippable = True
    steps = steps_per_epoch(len(train_images), config)
    optimizer = make_optimizer(model, model.backbone, model.teacher, config)
    return DetectionRun(
        config=config,
        device=device,
        classes=coco.classes,
        train_images=train_images,
        val_images=val_images,
        model=model,
        image_size=size,
        loaded={"backbone": loaded} | teacher,
        optimizer=optimizer,
        schedule=make_schedule(config, optimizer, steps),
        steps_per_epoch=steps,
        described=_described(config, coco, val, notes),
        **scaler_and_average(config.train, model.student, device),
    )


def _expect_disjoint(coco: Coco, val: Coco) -> list[str]:
    """Notes on validation images that are copies of training images. Raises `UserError` if there are too many."""
    train = [coco.pictures[i].path for i in coco.with_objects()]
    fix = "set data.val_annotations to others"
    return refuse_shared(train, [picture.path for picture in val.pictures], fix)


def _described(config: Detection, coco: Coco, val: Coco, notes: list[str]) -> dict[str, Any]:
    """As `scalekd.data.description` makes it; the size of a class is its number of objects."""
    data = config.data
    parts = {}
    for name, part_of, source in (("training", coco, data.annotations), ("validation", val, data.val_annotations)):
        left = {kind: {"count": len(at), "example": at[0]} for kind, at in part_of.problems.items()}
        parts[name] = part(len(part_of.pictures), source, "", left)
    labels = [x.label - 1 for picture in coco.pictures for x in picture.instances if not x.crowd]
    return {**parts, "classes": classes_of(coco.classes, labels, "objects"), "notes": notes}
