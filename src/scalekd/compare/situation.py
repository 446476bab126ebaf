"""What a person has to distil with: images, labels, student, teacher and steps, as far as gains depend on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from scalekd.common.errors import UserError
from scalekd.config.recipe import Config
from scalekd.data.split import Split
from scalekd.distill.build import steps_of_an_epoch, untrained
from scalekd.models.options import Model
from scalekd.models.unfilled import unfilled

SCRATCH, PRETRAINED = "from scratch", "pre-trained"
OWN, FITTED, FEATURES = "own classes", "fitted classifier", "features only"


@dataclass(frozen=True)
class Situation:
    kind: str
    """Of the student: CNN, Mixer or ViT."""
    start: str
    """Of the student: SCRATCH or PRETRAINED."""
    teacher: str
    """Where the teacher's logits for the data's classes are from: OWN, FITTED, or FEATURES for none."""
    labels: int
    """Labelled training images."""
    unlabelled: int
    """Training images without labels."""
    classes: int
    steps: int
    several: bool = False
    """Whether the images have sets of labels."""

    @property
    def labels_per_class(self) -> float:
        return self.labels / self.classes


def situation(config: Config, split: Split) -> Situation:
    """The situation of a run on its data. Builds its student without weights. Raises `UserError`."""
    images = len(split.train_indices)
    steps, _ = steps_of_an_epoch(config, images, split.labelled)
    if not steps:
        raise UserError(f"{images} training images are less than a batch of {config.train.batch_size}; add images")
    with unfilled():
        student = untrained(config, max(len(split.classes), 2), {"ce": {}}, teacher=False).student
    return Situation(
        kind=kind_of(student),
        start=SCRATCH if config.student.weights in (None, "random") else PRETRAINED,
        teacher=_teacher(config, split),
        labels=split.labelled,
        unlabelled=images - split.labelled,
        classes=len(split.classes),
        steps=steps * config.train.epochs,
        several=split.multi_label,
    )


def kind_of(model: nn.Module) -> str:
    """CNN, ViT (also with a hierarchy, as Swin), or Mixer for any other model that cuts its input into patches."""
    names = [type(module).__name__ for module in model.modules()]
    if not any("PatchEmbed" in name for name in names):
        return "CNN"
    return "ViT" if any("Attention" in name for name in names) else "Mixer"


def _teacher(config: Config, split: Split) -> str:
    if not split.labelled or not config.all_teachers:
        return FEATURES
    specs = config.all_teachers.values()
    if split.multi_label and not any(spec.head or _has_classes(spec, split.classes) for spec in specs):
        return FEATURES  # own-labels needs no classifier of its teacher
    if all(spec.head is None or _has_classes(spec, split.classes) for spec in specs):
        return OWN
    return FITTED


def _has_classes(spec: Model, classes: list[str]) -> bool:
    """Whether a teacher is a run's student that was trained on these classes."""
    if spec.weights is None:
        return False
    try:
        card = json.loads((Path(spec.weights).parent / "student.json").read_text())
        return bool(card["classes"] == classes)
    except (OSError, ValueError, KeyError, TypeError):
        return False
