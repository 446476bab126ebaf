"""A recipe of `scalekd detect`, built for the engine: its data, its model, its losses and figures."""

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
from scalekd.data.batches import bad_images
from scalekd.data.samplers import Key, TrainSampler
from scalekd.train.optim import make_schedule
from scalekd.train.run import Run, prepared, scaler_and_average
from scalekd.transfer.backbone import build_backbone
from scalekd.transfer.build import input_of, optimizer_of, steps_per_epoch
from scalekd.transfer.config import Detection
from scalekd.transfer.pyramid import Pyramid, Size
from scalekd.transfer.tasks import TASKS

from .coco import Coco, open_coco
from .data import DetectionBatch, DetectionImages, Scales, collate, detection_batches, eval_batches
from .model import Detector
from .scores import average_precision, found, merged, percent


@dataclass(kw_only=True)
class DetectionRun(Run):
    task = TASKS["detection"]
    batch = DetectionBatch
    config: Detection
    train_images: DetectionImages
    val_images: DetectionImages
    model: Detector
    image_size: Size  # that the backbone was built for

    @property
    def figures(self) -> dict[str, str]:
        return self.task.figures

    @property
    def student(self) -> nn.Module:
        return self.model.student

    @property
    def eval_batch_size(self) -> int:
        return 1  # images that go together are padded to the largest, and what is found would depend on the others

    def losses(self, model: nn.Module, batch: DetectionBatch, micro: int) -> dict[str, Tensor]:
        return model(batch.images, batch.targets)

    def train_batches(self, sampler: TrainSampler, workers: int) -> Generator[DetectionBatch, None, None]:
        return detection_batches(self.train_images, sampler, workers, self.device.type == "cuda")

    def eval_batches(self, size: int, workers: int) -> Generator[DetectionBatch, None, None]:
        pin = self.device.type == "cuda"
        return eval_batches(self.val_images, size, workers, pin, parallel.rank(), parallel.world())

    def again(self, keys: list[Key]) -> tuple[DetectionBatch, list[str]]:
        images = self.train_images
        batch = collate([images[key] for key in keys])
        if isinstance(batch, UserError):
            raise batch
        return batch, [images.coco.pictures[images.places[i]].path for _, i in keys]

    @torch.inference_mode()
    def validate(self, batches: Iterable[DetectionBatch]) -> dict[str, Any]:
        """Box and mask AP in %: `box_ap`, `box_ap50`, ..., `mask_ap`, ... and `classes`, the mask AP of each."""
        detector = self.deployed.eval()
        results = []
        for batch in batches:
            pixels = [image.to(self.device).float() / 255 for image in batch.images]
            results += [found(p, int(t["picture"])) for p, t in zip(detector(pixels), batch.targets)]
        self.model.train()
        every = merged(results)
        if not every:
            raise UserError("none of the validation images can be read; mend them, or name other annotations")
        scores = average_precision(self.val_images.coco, every)
        told = {
            f"{kind}_{key}": percent(share)
            for kind, of_kind in scores.items()
            for key, share in of_kind.items()
            if key != "classes"
        }
        classes = {name: percent(share) for name, share in scores["mask"]["classes"].items()}
        return told | {"images": len(every), "classes": classes}

    def card(self) -> dict[str, Any]:
        data, coco = self.config.data, self.train_images.coco
        limit = self.model.limit
        return {
            "task": "detection",
            "backbone": self.config.backbone.model,
            "kwargs": self.loaded["backbone"].kwargs,
            "image_size": list(self.image_size),
            "classes": coco.classes,
            "category_ids": coco.category_ids,
            **input_of(self.model.student.transform.image_mean, self.model.student.transform.image_std),
            "short": limit or data.short,
            "long": limit or data.long,
            "anchors": list(self.config.detector.anchors),
            "width": self.config.detector.width,
            "proposals": self.config.detector.proposals[1],
        }

    def told(self) -> list[str]:
        """What there is of data, and what is wrong with it."""
        parts = {"training": self.train_images, "validation": self.val_images}
        lines = [f"{part}: {line}" for part, images in parts.items() for line in images.coco.told()]
        if self.model.limit:
            lines.append(
                f"{self.config.backbone.model} takes one size: no side of an image gets over {self.model.limit}"
            )
        return lines


def build(config: Detection, device: torch.device) -> DetectionRun:
    """Opens the data and builds model, optimiser and schedule. Raises `UserError`."""
    seed_everything(config.seed, "models")
    data = config.data
    coco = open_coco(Path(data.annotations), Path(data.images), "data.annotations")
    val = open_coco(Path(data.val_annotations), Path(data.val_images), "data.val_annotations", coco.classes)
    _refuse_seen(coco, val)
    backbone, loaded, size, (mean, std) = build_backbone(config.backbone, data.channels)
    model = Detector(
        Pyramid(backbone, size),
        len(coco.classes),
        mean,
        std,
        short=data.short,
        long=data.long,
        **config.detector.model_dump(),
    )
    prepared(model, config, device)
    scales = Scales(data.scales, data.long, data.flip, data.channels).limited(model.limit)
    count = len(coco.with_objects())
    train_images = DetectionImages(coco, scales, config.seed, bad_images("train", data, count))
    val_images = DetectionImages(val, scales, None, bad_images("val", data, len(val.pictures)))
    steps = steps_per_epoch(len(train_images), config)
    optimizer = optimizer_of(model, model.backbone, config)
    return DetectionRun(
        config=config,
        device=device,
        classes=coco.classes,
        train_images=train_images,
        val_images=val_images,
        model=model,
        image_size=size,
        loaded={"backbone": loaded},
        optimizer=optimizer,
        schedule=make_schedule(config, optimizer, steps),
        steps_per_epoch=steps,
        **scaler_and_average(config.train, model.student, device),
    )


def _refuse_seen(coco: Coco, val: Coco) -> None:
    """Validation images must not be trained on."""
    held = {str(Path(picture.path).resolve()) for picture in val.pictures}
    seen = [coco.pictures[i].path for i in coco.with_objects() if str(Path(coco.pictures[i].path).resolve()) in held]
    if seen:
        raise UserError(
            f"{len(seen)} of the validation images are training images too, such as {seen[0]}; "
            "name other annotations as data.val_annotations"
        )
