"""Builds a segmentation run from a recipe: data, model, optimiser, losses, validation and card."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.sections import height_and_width
from scalekd.common.seeds import seed_everything
from scalekd.common.stopwatch import Stopwatch
from scalekd.common.text import counted
from scalekd.data.batches import Batch, bad_images
from scalekd.data.description import FIRST, part
from scalekd.data.samplers import Key, TrainSampler
from scalekd.train.hardware import for_device
from scalekd.train.optim import make_iteration_schedule
from scalekd.train.run import Run, prepared, scaler_and_average
from scalekd.transfer.backbone import build_backbone
from scalekd.transfer.build import input_statistics, make_optimizer, projector_of, steps_per_epoch
from scalekd.transfer.config import Segmentation
from scalekd.transfer.overlap import refuse_shared
from scalekd.transfer.pyramid import Size
from scalekd.transfer.tasks import TASKS
from scalekd.transfer.teacher import build_teacher

from .data import Crops, SegmentationImages, batches_of, collate, eval_batches
from .model import Segmenter
from .pairs import Pairs, open_segments
from .scores import evaluate, make_inference


@dataclass(kw_only=True)
class SegmentationRun(Run):
    task = TASKS["segmentation"]
    figures = task.figures
    batch = Batch
    config: Segmentation
    train_images: SegmentationImages
    val_images: SegmentationImages
    model: Segmenter
    image_size: Size  # (height, width) that the backbone was built for

    @property
    def student(self) -> nn.Module:
        return self.model.student

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"student": self.model.student, "auxiliary": self.model.auxiliary} | projector_of(self.model.teacher)

    @property
    def teacher_clock(self) -> Stopwatch | None:
        return self.model.teacher.clock if self.model.teacher else None

    @property
    def total_steps(self) -> int:
        return self.config.train.iterations

    @property
    def eval_steps(self) -> int:
        return self.config.train.eval_every

    def losses(self, model: nn.Module, batch: Batch, micro: int) -> dict[str, Tensor]:
        images = batch.images.to(self.device, non_blocking=True)
        if self.config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return model(images, batch.targets.to(self.device, non_blocking=True))

    def train_batches(self, sampler: TrainSampler, workers: int) -> Generator[Batch, None, None]:
        return batches_of(self.train_images, sampler, workers, self.device.type == "cuda")

    def eval_batches(self, size: int, workers: int) -> Generator[Batch, None, None]:
        pin = self.device.type == "cuda"
        return eval_batches(self.val_images, size, workers, pin, parallel.rank(), parallel.world())

    def again(self, keys: list[Key]) -> tuple[Batch, list[str]]:
        images = self.train_images
        batches = collate([images[key] for key in keys])
        if isinstance(batches, UserError):
            raise batches
        return batches[0], [images.pairs.where(i) for _, i in keys]

    def validate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """The result of `scores.scores` for the deployed model."""
        mean, std = self.model.student_mean, self.model.student_std
        inference = make_inference(self.config.segmenter.inference, height_and_width(self.config.data.crop))
        return evaluate(self.deployed, batches, mean, std, self.device, self.classes, inference)

    def card(self) -> dict[str, Any]:
        """The keys of `SegmenterCard`, without sha256."""
        data = self.config.data
        crop = height_and_width(data.crop)
        return {
            "task": "segmentation",
            "backbone": self.config.backbone.model,
            "kwargs": self.loaded["backbone"].kwargs,
            "image_size": list(self.image_size),
            "classes": self.classes,
            **input_statistics(self.model.student_mean, self.model.student_std),
            "short": min(crop),
            "long": 4 * min(crop),
            "width": self.config.segmenter.width,
            "crop": list(crop),
            "inference": self.config.segmenter.inference,
            "reduce_zero_label": data.reduce_zero_label,
        }

    def data_summary(self) -> list[str]:
        """A line on the data."""
        counts = f"{counted(len(self.train_images), 'training image')}, {len(self.val_images)} for validation"
        return [f"{self.config.data.root}: {counts}, {len(self.classes)} classes"]


def build(config: Segmentation, device: torch.device) -> SegmentationRun:
    """Opens the data and builds model, optimiser and schedule. Raises `UserError`."""
    config = for_device(config, device)
    seed_everything(config.seed, "models")
    data, crop = config.data, height_and_width(config.data.crop)
    train_pairs, val_pairs = open_segments(
        Path(data.root),
        classes=Path(data.classes) if data.classes else None,
        reduce_zero_label=data.reduce_zero_label,
        val_fraction=data.val_fraction,
        seed=data.seed,
    )
    fix = "move them to one part"
    notes = refuse_shared(list(map(str, train_pairs.images)), list(map(str, val_pairs.images)), fix)
    backbone, loaded, size, stats = build_backbone(config.backbone, data.channels)
    model = Segmenter(backbone, size, len(train_pairs.classes), config.segmenter.width, stats)
    _expect_fit(model.student.pyramid.canvas, crop, config)
    # last, so that the other initial weights are those of a run without a teacher
    model.teacher, teacher = build_teacher(config.teacher, data.channels, model.student.pyramid)
    prepared(model, config, device)
    crops = Crops(crop, data.scale, flip=data.flip, photometric=data.photometric, channels=data.channels, fill=stats[0])
    train_images = SegmentationImages(train_pairs, crops, config.seed, bad_images("train", data, len(train_pairs)))
    val_images = SegmentationImages(val_pairs, crops, None, bad_images("val", data, len(val_pairs)))
    train_images.skippable = val_images.skippable = True
    optimizer = make_optimizer(model, model.student.pyramid.backbone, model.teacher, config)
    return SegmentationRun(
        config=config,
        device=device,
        classes=list(train_pairs.classes),
        train_images=train_images,
        val_images=val_images,
        model=model,
        image_size=size,
        loaded={"backbone": loaded} | teacher,
        optimizer=optimizer,
        schedule=make_iteration_schedule(config.schedule, config.train.iterations, optimizer),
        steps_per_epoch=steps_per_epoch(len(train_images), config),
        described=_described(config, train_pairs, val_pairs, notes),
        **scaler_and_average(config.train, model.student, device),
    )


def _described(config: Segmentation, train: Pairs, val: Pairs, notes: list[str]) -> dict[str, Any]:
    """As `scalekd.data.description` makes it; classes have no sizes, because that needs all masks."""
    parts = {
        name: part(len(pairs), _common_folder(pairs), pairs.chosen, pairs.left_out)
        for name, pairs in (("training", train), ("validation", val))
    }
    return {**parts, "classes": {"count": len(train.classes), "first": list(train.classes[:FIRST])}, "notes": notes}


def _common_folder(pairs: Pairs) -> str:
    return os.path.commonpath([os.path.dirname(image) for image in pairs.images])


def _expect_fit(canvas: Size | None, crop: Size, config: Segmentation) -> None:
    """Raises `UserError` if a fixed-size backbone would get more pixels than it accepts."""
    if canvas is None:
        return
    fits = crop[0] <= canvas[0] and crop[1] <= canvas[1]
    if not fits or config.segmenter.inference == "whole":
        side = f"{canvas[0]}" if canvas[0] == canvas[1] else str(list(canvas))
        raise UserError(
            f"backbone.model: {config.backbone.model} only accepts {canvas[0]}x{canvas[1]} pixels; set "
            f"data.crop={side if not fits else config.data.crop} segmenter.inference=sliding"
        )
