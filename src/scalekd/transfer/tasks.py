"""The facts of the two tasks that a backbone is trained on further: names, files, figures, extras. Cheap to import."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from scalekd.common.errors import UserError

TaskName = Literal["detection", "segmentation"]  # of the extras as well


class Task(NamedTuple):
    command: str
    """As it is typed."""
    trained: str
    """What a run makes; its files are called so."""
    model: str
    """The architecture, by its name in papers."""
    figures: dict[str, str]
    """What a validation finds, in %: key -> name for people. The first one chooses the best checkpoint."""
    package: str
    """That the task's extra installs."""
    missing: str
    """What is said where it is not."""

    @property
    def weights(self) -> str:
        """The file in a run's folder; its card is beside it, as .json."""
        return f"{self.trained}.safetensors"


TASKS = {
    "detection": Task(
        command="scalekd detect",
        trained="detector",
        model="Mask R-CNN",
        figures={"mask_ap": "mask AP", "box_ap": "box AP"},
        package="faster_coco_eval",
        missing="detection needs faster-coco-eval: pip install 'scalekd[detection]'",
    ),
    "segmentation": Task(
        command="scalekd segment",
        trained="segmenter",
        model="UPerNet",
        figures={"miou": "mIoU", "pixel_accuracy": "pixel accuracy"},
        package="segmentation_models_pytorch",
        missing="segmentation needs more packages: pip install 'scalekd[segmentation]'",
    ),
}


def task_of(recipe: Mapping[str, Any]) -> TaskName | None:
    """Of a run, by the sections of its recipe; None: a distillation."""
    if "backbone" not in recipe:
        return None
    return "detection" if "detector" in recipe else "segmentation"


def need_extra(task: str) -> None:
    """Raises `UserError` with the install line where the task's extra is missing; imports nothing of it."""
    if find_spec(TASKS[task].package) is None:
        raise UserError(TASKS[task].missing)
