"""All fields of a distillation recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
)

from scalekd.common.sections import Positive, Section, Seed, Share
from scalekd.data.calibration import FEWEST_IMAGES
from scalekd.data.options import Augment, Data
from scalekd.models.options import Model
from scalekd.train.options import BaseOptim, Schedule, Train

from .base_recipe import AnyRecipe
from .losses import method_problems, typed_options, written_out


class DistillationTrain(Train):
    compile: bool = False
    """Compile the teacher, the student and the methods with torch.compile. The first step after each start takes a minute
    or more longer. Losses and gradients are the same up to rounding (docs/explanation/performance-tables.md)."""
    cuda_graphs: bool = False
    """With `compile`: record the kernels of a step as CUDA graphs, which start with one call of the host. For small
    models and batches, whose kernels are short. CUDA only, without `accumulate`; not with `streams`."""
    streams: bool = False
    """Copy the images, and run the teachers, on a CUDA stream beside the student's. Same values; takes more memory. On
    a CPU it changes nothing."""
    tf32: bool = False
    """Compute products of float32 matrices in TF32, as PyTorch does for convolutions anyway: 10 bits of mantissa instead
    of 23, losses included. With `precision: float32`, on GPUs from NVIDIA's Ampere on (A100, A10, RTX 30)."""
    grad_checkpointing: bool = False
    """Save only the input of each of the student's blocks, and compute the block again in the backward pass. Less memory,
    a longer step, same values. Projectors have an option of that name of their own."""


class Balance(Section):
    every: Positive = 50
    """Steps between measurements of the gradients. Each one costs a backward pass of the student for every loss."""
    momentum: Share = 0.9
    """Momentum of the running means of the gradients' norms."""
    adjust: bool = True
    """False only measures and logs the shares of the losses in the gradient, and leaves the weights as they are."""


class Quantize(Section):
    run: str
    """Folder of the run whose finished student this one quantises. The parameters of the losses, such as projectors,
    come from its last.pt."""
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    """How onnxruntime's quantiser finds the first ranges of the activations."""
    images: Annotated[int, Field(ge=FEWEST_IMAGES)] = 256
    """Training images that it looks at."""


class Optim(BaseOptim):
    decay_norm_and_bias: bool = False
    """Also apply weight decay to biases and normalisation layers."""
    projector_lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the parameters of the methods, such as projectors, as a multiple of `lr`."""


class Recipe(AnyRecipe):
    """Fields of a distillation recipe. Each is validated here; `Config` adds the checks across fields."""

    name: Annotated[str, Field(pattern=r"^\w[\w .+-]*$")]
    """Name of the run. Its folder is runs/NAME by default."""
    seed: Seed = 0
    """Seed of initial weights, order of the images, augmentation and dropout."""
    data: Data
    """Images and classes."""
    augment: Augment = Augment()
    """Augmentation of training images, and preprocessing of validation images."""
    student: Model
    """The model to train."""
    teacher: Model | None = None
    """The frozen model that the student learns from; not needed by `ce` and `bce`."""
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], Model] = Field(default={})
    """Several teachers by name, instead of `teacher`. Methods on logits use the mean of the teachers' logits; other
    methods are built once for each teacher (docs/how-to/several-teachers.md)."""
    assistant: dict[str, Any] | None = None
    """A student to train first, which is then the teacher. Contains the values in which its recipe differs from this
    one, such as {student: {model: resnet50}}. It may have an assistant of its own."""
    losses: dict[str, dict[str, Any]]
    """Methods by name, each with its options. Every method also has `weight` (default 1), a factor of its loss, and, with
    several teachers, `teachers`, the names of those it uses (default all)."""
    balance: Balance | None = None
    """Weight the losses on feature maps by their gradients: `weight` of such a loss is then the norm of its gradient at the
    student's backbone, relative to that of the other losses together (docs/how-to/balance.md). {} switches it on."""
    quantize: Quantize | None = None
    """Train the student with the weights and activations of its int8 file. `scalekd quantize` writes such a recipe
    (docs/how-to/quantize.md)."""
    train: DistillationTrain
    """Length of the training, batch size, precision and checkpoints."""
    optim: Optim = Optim()
    """Optimiser."""
    schedule: Schedule = Schedule()
    """Learning rate over the epochs."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Trackers that get the scalars in addition to log.jsonl (docs/how-to/trackers.md); [] for none."""

    @field_validator("losses", mode="before")
    @classmethod
    def _complete_losses(cls, losses: Any) -> Any:
        if not isinstance(losses, dict):
            raise ValueError("losses: must map method names to options, such as {ce: {}, kd: {temperature: 1.0}}")
        kept = {name: {} if options is None else options for name, options in losses.items() if options is not False}
        problems = [line for name, options in kept.items() for line in method_problems(name, options)]
        if not kept:
            problems.append("losses: empty; name at least one, such as ce")
        if problems:
            raise ValueError("\n".join(problems))
        return {name: typed_options(name, options) for name, options in kept.items()}

    @property
    def all_teachers(self) -> dict[str, Model]:
        """The teachers by name. A single one is named `teacher`."""
        return self.teachers if self.teacher is None else {"teacher": self.teacher}

    def key_of(self, teacher: str) -> str:
        """The recipe key of a teacher, `teacher` or `teachers.NAME`, by its name in `all_teachers`."""
        return f"teachers.{teacher}" if teacher in self.teachers else "teacher"

    def complete(self) -> dict[str, Any]:
        """Plain values with all defaults filled in, including those of the methods."""
        return super().complete() | {"losses": written_out(self.losses)}
