"""The interface between the engine and a task: `Run`, which distillation, detection and segmentation implement."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from scalekd.common import parallel
from scalekd.common.errors import UserError, nearest
from scalekd.common.provenance import command_line, git_state, machine, versions
from scalekd.common.stopwatch import Stopwatch
from scalekd.common.text import counted, shortened
from scalekd.data.samplers import Key, Mix, TrainSampler
from scalekd.models.weights.trained import Loaded

# values of a validation that are kept with its figures: what these depend on, and the accuracy of nearest neighbours in a
# run whose figures are those of retrieval
KEPT = ("neighbours", "threshold", "top1", "top5", "queries", "left_out")
AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def provenance(run: Run) -> dict[str, Any]:
    """How to reproduce this run: command, versions, machine, seeds, git state, checksums of the initial weights."""
    data = run.config.data
    return {
        "command": command_line(),
        **versions(),
        "machine": machine(run.device),
        "processes": parallel.world(),
        "seeds": {"seed": run.config.seed} | ({"data.seed": data.seed} if hasattr(data, "seed") else {}),
        "git": git_state(),
        "weights": {role: vars(loaded) for role, loaded in run.loaded.items()},
    }


@dataclass(kw_only=True)
class Run(ABC):
    """A recipe, built: data, models, optimiser and schedule. A task implements the abstract methods.

    Attributes:
        config: a recipe with `name`, `seed`, `data`, `train` and `track`.
        train_images, val_images: have a length, `bad`: the `BadImages` that lists skipped images, or None, and
            `still_bad(names)`: the reasons of those of them that still cannot be read.
        model: all parameters that are trained.
        loaded: for each model, which weights were loaded.
        mix, repeats, weights: as for `TrainSampler`.
        described: the data, as `scalekd.data.description` makes it.
    """

    batch: ClassVar[Any]  # the type of a batch; made from (images, targets)
    config: Any
    device: torch.device
    classes: list[str]
    train_images: Any
    val_images: Any
    model: nn.Module
    loaded: dict[str, Loaded]
    optimizer: Optimizer
    schedule: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    steps_per_epoch: int
    mix: Mix | None = None
    repeats: int = 1
    weights: Sequence[float] | None = None
    described: Mapping[str, Any] = field(default_factory=dict)

    @property
    @abstractmethod
    def figures(self) -> dict[str, str]:
        """The validation metrics, in %, of which more is better: key -> name on the screen, the main one first."""

    @property
    def chooser(self) -> str:
        """The key of the metric that chooses the best checkpoint."""
        return self.config.train.best_by or next(iter(self.figures))

    @property
    @abstractmethod
    def student(self) -> nn.Module:
        """The part of `model` that is deployed."""

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts of `model` that a checkpoint stores, by name."""
        return {"student": self.student}

    def prepare(self) -> None:  # noqa: B027 - most tasks have nothing to do
        """What is done once, before the first step of a new run. A second call does nothing."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any, micro: int) -> dict[str, Tensor]:
        """Loss term -> scalar, including `total`, which is minimised.

        model: `self.model`, or its DDP wrapper. micro: the number of micro-batches before this one in the run.
        """

    @abstractmethod
    def train_batches(self, sampler: TrainSampler, workers: int) -> Generator[Any, None, None]:
        """The micro-batches of the sampler's keys, read by `workers` processes."""

    @abstractmethod
    def eval_batches(self, size: int, workers: int) -> Generator[Any, None, None]:
        """This process's validation images, `size` at a time."""

    @abstractmethod
    def again(self, keys: list[Key]) -> tuple[Any, list[str]]:
        """The training batch of these keys, loaded again, and the files of its images."""

    @abstractmethod
    def validate(self, batches: Iterable[Any]) -> dict[str, Any]:
        """The `figures` of the deployed student and other values to log; the same in all processes."""

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    @property
    def eval_steps(self) -> int:
        """Steps between validations."""
        return max(1, round(self.steps_per_epoch * self.config.train.eval_every))

    @property
    def validations(self) -> int:
        """How many validations the whole run has."""
        return math.ceil(self.total_steps / self.eval_steps)

    def epochs(self, step: int) -> float:
        """Epochs done after `step` steps: an int at the end of an epoch, else rounded to 0.01."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return round(step / self.steps_per_epoch, 2) if rest else whole

    @property
    def eval_batch_size(self) -> int:
        """Images per process and validation batch: as many as in a training micro-batch."""
        return self.config.train.batch_size // (self.config.train.accumulate * parallel.world())

    @property
    def deployed(self) -> nn.Module:
        """The student that is evaluated and exported: the one with averaged weights, if `train.ema` is set."""
        return self.ema.module if self.ema is not None else self.student

    def notes(self) -> dict[str, dict[str, Any]]:
        """Events to log at the end of the run: name -> values."""
        return {}

    def gradient_shares(self) -> dict[str, float]:
        """The share of each loss in the gradient at the student's backbone, as last measured; {} if it never was."""
        return {}

    @property
    def teacher_clock(self) -> Stopwatch | None:
        """The time spent in the teachers' forward passes; None without a teacher."""
        return None

    def train_sampler(self, start: int = 0, steps: int | None = None) -> TrainSampler:
        """The keys of this process's micro-batches, from step `start` to step `steps` (by default the end of the run)."""
        return TrainSampler(
            len(self.train_images),
            self.config.train.batch_size,
            self.config.seed,
            self.total_steps if steps is None else steps,
            start,
            self.config.train.accumulate,
            parallel.rank(),
            parallel.world(),
            self.repeats,
            self.mix,
            self.weights,
        )


def scaler_and_average(train: Any, student: nn.Module, device: torch.device) -> dict[str, Any]:
    """The fields `scaler` and `ema` of a `Run`. train: the recipe's section.

    The decay of the average in step s, counted from zero, is min(`train.ema`, 1 - 1/s): the average is the mean of all
    weights so far until `train.ema` is reached in step 1 / (1 - `train.ema`). timm's default, 1 - s^(-2/3), would reach
    0.9999 after a million steps.
    """
    return {
        "scaler": torch.amp.GradScaler(device.type, enabled=train.precision == "fp16"),
        "ema": ModelEmaV3(student, decay=train.ema, use_warmup=True, warmup_power=1.0) if train.ema else None,
    }


def check_choice(run: Run) -> None:
    """Raises `UserError` if `train.best_by` is no metric of the run, or `train.patience` can never end it."""
    train, problems = run.config.train, []
    if train.best_by is not None and train.best_by not in run.figures:
        problems.append(
            f"train.best_by: this run does not compute `{shortened(train.best_by)}`.{nearest(train.best_by, run.figures)}"
        )
    if train.patience is not None and train.patience >= run.validations:
        problems.append(
            f"train.patience: {counted(train.patience, 'validation')} without a better one cannot occur in a run of "
            f"{counted(run.validations, 'validation')}; lower it or train.eval_every, or set train.patience=null"
        )
    if problems:
        raise UserError("\n".join(problems))


def check_batch_size(train: Any, images: int | None, processes: int | None = None) -> None:
    """Raises `UserError` if `train.batch_size` exceeds the data or does not divide among processes and accumulated steps.

    images: the number of training images; None if a batch may hold an image more than once. processes: this run's by
    default.
    """
    processes = processes or parallel.world()
    parts = train.accumulate * processes
    if images is not None and images < train.batch_size:
        raise UserError(f"train.batch_size {train.batch_size} is more than the {images} training images; lower it")
    if train.batch_size % parts:
        raise UserError(
            f"train.batch_size {train.batch_size} cannot be divided among {processes} processes x "
            f"{train.accumulate} accumulated steps; make it a multiple of {parts}"
        )


def prepared(model: nn.Module, config: Any, device: torch.device) -> nn.Module:
    """Moves `model` to `device`, in the recipe's memory format and with synchronised batch norms if it asks for them.

    Raises `UserError` for `train.sync_batchnorm` on a CPU.
    """
    if config.train.sync_batchnorm:
        if device.type == "cpu":
            raise UserError("train.sync_batchnorm needs GPUs, because PyTorch has it for CUDA only; set it to false")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    return model.to(memory_format=torch.channels_last) if config.train.channels_last else model
