"""Names, files, metrics and extras of the two tasks, detection and segmentation. Fast to import."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from scalekd.common.errors import UserError

TaskName = Literal["detection", "segmentation"]  # also the names of the extras
DetectorKind = Literal["mask-rcnn", "retinanet"]
DETECTORS: dict[str, str] = {"mask-rcnn": "Mask R-CNN", "retinanet": "RetinaNet"}  # their names in papers


class Task(NamedTuple):
    command: str
    """The command as typed."""
    trained: str
    """What a run produces; also the name of its files."""
    figures: dict[str, str]
    """Metrics of a validation, in %: key -> readable name. The first one chooses the best checkpoint. A detector without
    masks has no mask AP."""
    package: str
    """A package that the task's extra installs."""
    missing: str
    """The error if the package is missing."""

    @property
    def weights(self) -> str:
        """The weights file in a run's folder; its card has the same name with .json."""
        return f"{self.trained}.safetensors"


TASKS = {
    "detection": Task(
        command="scalekd detect",
        trained="detector",
        figures={"mask_ap": "mask AP", "box_ap": "box AP"},
        package="faster_coco_eval",
        missing="detection needs faster-coco-eval: pip install 'scalekd[detection]'",
    ),
    "segmentation": Task(
        command="scalekd segment",
        trained="segmenter",
        figures={"miou": "mIoU", "pixel_accuracy": "pixel accuracy"},
        package="segmentation_models_pytorch",
        missing="segmentation needs more packages: pip install 'scalekd[segmentation]'",
    ),
}


def task_of(recipe: Mapping[str, Any]) -> TaskName | None:
    """The task of a recipe, recognised by its sections; None for a distillation."""
    if "backbone" not in recipe:
        return None
    return "detection" if "detector" in recipe else "segmentation"


def architecture(recipe: Mapping[str, Any]) -> str:
    """The model of a recipe for detection or segmentation, as named in papers."""
    if task_of(recipe) == "segmentation":
        return "UPerNet"
    detector = recipe.get("detector")
    kind = detector.get("kind") if isinstance(detector, dict) else None
    return DETECTORS.get(str(kind), DETECTORS["mask-rcnn"])  # recipes of older versions do not say it


def need_extra(task: str) -> None:
    """Raises `UserError` with the install command if the task's extra is missing. Imports nothing of the extra."""
    if find_spec(TASKS[task].package) is None:
        raise UserError(TASKS[task].missing)
