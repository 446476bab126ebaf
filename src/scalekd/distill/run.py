"""A built distillation run, as the training engine uses it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from torch import Tensor, nn

from scalekd.common import parallel
from scalekd.common.seeds import seed_everything
from scalekd.common.set_figures import SET_FIGURES, figures_of
from scalekd.common.stopwatch import Stopwatch
from scalekd.config.losses import reads_logits, reads_teacher
from scalekd.config.recipe import Config
from scalekd.data.batches import (
    Batch,
    Images,
    eval_batches,
    load_batch,
    train_batches,
)
from scalekd.data.samplers import Key, TrainSampler
from scalekd.data.targets import are_sets
from scalekd.data.transforms import mixed
from scalekd.heads.retrieval import RETRIEVAL_FIGURES
from scalekd.models.embeddings import is_embedding
from scalekd.models.inputs import scaled
from scalekd.models.options import Model
from scalekd.models.weights.trained import Loaded
from scalekd.train.hardware import workers_of
from scalekd.train.run import AUTOCAST, Run

from .balance import backbone_parameters
from .distiller import Distiller
from .evaluate import NEIGHBOURS, evaluate, evaluate_features, evaluate_retrieval
from .label_sets import scores_of
from .teacher import Teacher
from .teacher_outputs import TeacherOutputs


class Taught(NamedTuple):
    """A teacher of a run."""

    place: str  # its recipe key: `teacher` or `teachers.NAME`
    spec: Model
    teacher: Teacher
    loaded: Loaded

    @property
    def label(self) -> str:
        """The name on screens."""
        return self.place.removeprefix("teachers.")


@dataclass(kw_only=True)
class DistillationRun(Run):
    """A distillation, or a training without a teacher, with its data, models, optimiser and schedule."""

    batch = Batch
    config: Config
    train_images: Images
    val_images: Images
    model: Distiller
    mixup: Mixup | None
    teacher_outputs: TeacherOutputs | None = None

    @property
    def distiller(self) -> Distiller:
        return self.model

    @property
    def student(self) -> nn.Module:
        return self.model.student

    @property
    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"student": self.model.student, "methods": self.model.methods}
        if self.model.gradients is not None:
            parts["balance"] = self.model.gradients
        return parts

    @property
    def multi_label(self) -> bool:
        """Whether the target of an image is a set of classes."""
        return are_sets(self.val_images.source.targets)

    @property
    def figures(self) -> dict[str, str]:
        if self.multi_label:
            return SET_FIGURES
        if self.retrieves:
            return ({"top1": "top-1", "top5": "top-5"} if self.has_classifier else {}) | RETRIEVAL_FIGURES
        neighbours = "" if self.has_classifier else f"{min(NEIGHBOURS, len(self.val_images) - 1)}-nn "
        return {"top1": f"{neighbours}top-1", "top5": "top-5"}

    @property
    def retrieves(self) -> bool:
        """Whether validation computes the figures of retrieval by the student's embedding."""
        return not self.multi_label and retrieval_wanted(self.config)

    @property
    def eval_batch_size(self) -> int:
        return min(256, 4 * super().eval_batch_size)  # validation keeps no activations: four times as many images fit

    @property
    def teacher_clock(self) -> Stopwatch:
        return self.model.teacher_clock

    @property
    def taught_by(self) -> list[Taught]:
        """The teachers, in the recipe's order."""
        keys = {name: self.config.key_of(name) for name in self.config.all_teachers}
        return [
            Taught(keys[name], spec, self.distiller.teachers[name], self.loaded[keys[name]])
            for name, spec in self.config.all_teachers.items()
        ]

    @property
    def has_classifier(self) -> bool:
        """Whether the student has a classifier. It has none if no loss uses its logits."""
        return self.distiller.student_view.shapes.classes > 0

    @property
    def steps_to_measure(self) -> int:
        """Steps of images on which `prepare` measures the teachers; 0 if nothing is to be measured."""
        return min(self.total_steps, math.ceil(self.model.images_to_measure / self.config.train.batch_size))

    def prepare(self) -> None:
        """Measures the teachers for methods that standardise their features, on the first images of the run as it sees them."""
        if not (steps := self.steps_to_measure):
            return
        train, rank, world = self.config.train, parallel.rank(), parallel.world()

        def pixels(batches: Iterable[Batch]) -> Iterator[Tensor]:
            for micro, batch in enumerate(batches):
                step, part = divmod(micro, train.accumulate)
                seed_everything(self.config.seed, step, part * world + rank)  # Mixup draws from it
                yield self.inputs(batch)[0]

        sampler = self.train_sampler(steps=steps)
        with contextlib.closing(self.train_batches(sampler, workers_of(self.config))) as batches:
            with torch.autocast(self.device.type, AUTOCAST[train.precision], enabled=train.precision != "float32"):
                self.model.measure(pixels(batches))

    def losses(self, model: nn.Module, batch: Batch, micro: int) -> dict[str, Tensor]:
        images, targets = self.inputs(batch)
        known = self.teacher_outputs and self.teacher_outputs.features(micro, images)
        step, part = divmod(micro, self.config.train.accumulate)
        gradients = self.model.gradients
        measured = gradients is not None and gradients.due(step)
        self.model.eager = measured  # a compiled graph can be followed backwards only once
        terms = model(images, targets, known) if known else model(images, targets)
        if gradients is None:
            return terms
        minimised = gradients.scaled(terms)
        if measured:
            scale = self.scaler.scale(torch.ones((), device=self.device))
            gradients.measure(terms, backbone_parameters(self.student), scale)
            if part == self.config.train.accumulate - 1:
                gradients.update(scale)  # from the next step on: all micro-batches of a step have the same factors
        return minimised

    def gradient_shares(self) -> dict[str, float]:
        gradients = self.model.gradients
        if gradients is None or not gradients.counts.any():
            return {}
        return {name: round(share, 4) for name, share in zip(gradients.names, gradients.shares().tolist())}

    def notes(self) -> dict[str, dict[str, Any]]:
        if shared := self.teacher_outputs:
            counts = {"computed": shared.computed, "read": shared.read, "file": str(shared.path)}
            return {"teacher_outputs": counts}
        return {}

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Arguments of the distiller: images `(B, C, H, W)` in [0, 1] and targets, after Mixup and CutMix if the recipe has them."""
        with self.model.beside.work(batch.images, batch.targets):
            images = scaled(batch.images.to(self.device, non_blocking=True))
            targets = batch.targets.to(self.device, non_blocking=True)
            if self.config.train.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            made = mixed(images, targets, self.mixup) if self.mixup else (images, targets)
        self.model.beside.join(made)
        return made

    def train_batches(self, sampler: TrainSampler, workers: int) -> Generator[Batch, None, None]:
        return train_batches(self.train_images, sampler, workers, self.device.type == "cuda")

    def eval_batches(self, size: int, workers: int) -> Generator[Batch, None, None]:
        pin = self.device.type == "cuda"
        return eval_batches(self.val_images, size, workers, pin, parallel.rank(), parallel.world())

    def again(self, keys: list[Key]) -> tuple[Batch, list[str]]:
        images = self.train_images
        return load_batch(images, keys), [images.source.where(images.indices[i]) for _, i in keys]

    def validate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """The figures of the deployed student: for sets of labels `figures_of`; else `evaluate`, or `evaluate_features` if it
        has no classifier. A run that retrieves has those of `evaluate_retrieval` too."""
        inputs = self.deployed, batches, self.model.student_mean, self.model.student_std, self.device
        if self.multi_label:
            return figures_of(scores_of(*inputs))
        if self.retrieves:
            return evaluate_retrieval(*inputs, self.has_classifier)
        measure = evaluate if self.has_classifier else evaluate_features
        return measure(*inputs)


def retrieval_wanted(config: Config) -> bool:
    """Whether a recipe is about embeddings: it has an embedding head or the loss `embed`, or asks for a figure of retrieval.

    A quantised student is a classifier, whose graph gives no embedding.
    """
    wanted = config.student.embedding is not None or "embed" in config.losses
    return config.quantize is None and (wanted or config.train.best_by in RETRIEVAL_FIGURES)


def logit_losses(config: Config, teacher: str) -> list[str]:
    """The losses of a recipe that compare the logits of this teacher, given by name, with the student's."""
    return [
        loss
        for loss, options in config.losses.items()
        if reads_teacher(loss) and reads_logits(loss) and teacher in options.get("teachers", config.all_teachers)
    ]


def gives_embeddings(spec: Model, outputs: int, classes: int) -> bool:
    """Whether a teacher's outputs are an embedding and not logits.

    Weights from a file with as many outputs as the data has classes are assumed to give logits.
    """
    same = outputs == classes and spec.weights != "pretrained"
    return spec.head is None and not same and is_embedding(spec.model, outputs)
