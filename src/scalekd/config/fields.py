"""All fields of a distillation recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
)

from scalekd.common.sections import Seed
from scalekd.data.options import Augment, Data
from scalekd.models.options import Model
from scalekd.train.options import BaseOptim, Schedule, Train

from .any_recipe import AnyRecipe
from .losses import method_problems, typed_options, written_out


class DistillationTrain(Train):
    compile: bool = False
    """The teacher's pass, the student and the methods through torch.compile. The first step takes a minute or more for
    it, at every start; losses and gradients are the same but for rounding (docs/explanation/performance.md)."""


class Optim(BaseOptim):
    decay_norm_and_bias: bool = False
    """Apply weight decay to biases and normalisation layers too."""
    projector_lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the method's own parameters, as a multiple of `lr`."""


class Recipe(AnyRecipe):
    """Fields of a distillation recipe, each valid by itself."""

    name: Annotated[str, Field(pattern=r"^\w[\w .+-]*$")]
    """The run's; its folder is runs/NAME unless --out says otherwise."""
    seed: Seed = 0
    data: Data
    augment: Augment = Augment()
    student: Model
    teacher: Model | None = None
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], Model] = Field(default={})
    """Several, by name, in place of `teacher`: the mean of their logits, and every other method once for each."""
    assistant: dict[str, Any] | None = None
    """A student to train first, which is then the teacher: what its recipe has different from this one, such as
    {student: {model: resnet50}}. It may have an assistant itself."""
    losses: dict[str, dict[str, Any]]
    """Method name -> its options, `weight` (1 unless given), and `teachers`, the names of those that it reads (all)."""
    train: DistillationTrain
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Where scalars go beside the run's log.jsonl (docs/how-to/trackers.md); [] for nowhere."""

    @field_validator("losses", mode="before")
    @classmethod
    def _complete_losses(cls, losses: Any) -> Any:
        if not isinstance(losses, dict):
            raise ValueError("losses: a mapping of method names to options, such as {ce: {}, kd: {temperature: 1.0}}")
        kept = {name: {} if options is None else options for name, options in losses.items() if options is not False}
        problems = [line for name, options in kept.items() for line in method_problems(name, options)]
        if not kept:
            problems.append("losses: none at all; name at least one, such as ce")
        if problems:
            raise ValueError("\n".join(problems))
        return {name: typed_options(name, options) for name, options in kept.items()}

    @property
    def all_teachers(self) -> dict[str, Model]:
        """By name; a single one's is `teacher`."""
        return self.teachers if self.teacher is None else {"teacher": self.teacher}

    def key_of(self, teacher: str) -> str:
        """Where the recipe describes a teacher, by its name in `all_teachers`."""
        return f"teachers.{teacher}" if teacher in self.teachers else "teacher"

    def complete(self) -> dict[str, Any]:
        """Plain values with nothing left to defaults, the methods' included."""
        return super().complete() | {"losses": written_out(self.losses)}
