"""What the engine needs of a run, whatever its task: distillation (`build.Run`), detection, segmentation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.provenance import command_line, git_state, machine, versions
from scalekd.common.stopwatch import Stopwatch
from scalekd.data.samplers import Key, Mix, TrainSampler
from scalekd.models.weights.trained import Loaded

AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def provenance(run: Run) -> dict[str, Any]:
    """What made this run: versions, command, machine, weights by checksum, git state."""
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
    """Everything that a recipe names, built. The fields are every task's, the methods are its own.

    config: a recipe with `name`, `seed`, `data`, `train` and `track`. model: all that is trained.
    train_images, val_images: with a length and `bad`, the `BadImages` that notes what is left out, or None.
    loaded: where the weights of each model are from. mix, repeats: of `TrainSampler`.
    """

    batch: ClassVar[Any]  # of images and targets, as the batches that it trains on are
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

    @property
    @abstractmethod
    def figures(self) -> dict[str, str]:
        """What a validation finds, in %: key -> name for people. The first one chooses the best checkpoint."""

    @property
    @abstractmethod
    def student(self) -> nn.Module:
        """The part of `model` that is deployed."""

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What a checkpoint holds of `model`, by name."""
        return {"student": self.student}

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any, micro: int) -> dict[str, Tensor]:
        """Term -> scalar, with `total`. model: `self.model`, or its DDP wrapper. micro: how many micro-batches came before."""

    @abstractmethod
    def train_batches(self, sampler: TrainSampler, workers: int) -> Generator[Any, None, None]:
        """The micro-batches whose keys the sampler gives."""

    @abstractmethod
    def eval_batches(self, size: int, workers: int) -> Generator[Any, None, None]:
        """This process's validation images, `size` at a time."""

    @abstractmethod
    def again(self, keys: list[Key]) -> tuple[Any, list[str]]:
        """A training batch once more, and where its images are from."""

    @abstractmethod
    def validate(self, batches: Iterable[Any]) -> dict[str, Any]:
        """`figures` of the deployed student, and what else is to be logged; the same in all processes."""

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    @property
    def eval_steps(self) -> int:
        """Steps between validations."""
        return max(1, round(self.steps_per_epoch * self.config.train.eval_every))

    def epochs(self, step: int) -> float:
        """How often the images were gone through after a step; a whole number where it is one."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return round(step / self.steps_per_epoch, 2) if rest else whole

    @property
    def eval_batch_size(self) -> int:
        """Images that a process validates at a time: as many as it trains on."""
        return self.config.train.batch_size // (self.config.train.accumulate * parallel.world())

    @property
    def deployed(self) -> nn.Module:
        """The student that is evaluated and exported: the averaged one where there is one."""
        return self.ema.module if self.ema is not None else self.student

    def notes(self) -> dict[str, dict[str, Any]]:
        """Events for the end of the log."""
        return {}

    @property
    def teacher_clock(self) -> Stopwatch | None:
        """Of the teachers' forward passes, where there are any."""
        return None

    def train_sampler(self, start: int = 0, steps: int | None = None) -> TrainSampler:
        """This process's micro-batches from step `start` to the run's end, or to step `steps`."""
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
        )


def scaler_and_average(train: Any, student: nn.Module, device: torch.device) -> dict[str, Any]:
    """The fields `scaler` and `ema` of a `Run`, by a recipe's `train`."""
    return {
        "scaler": torch.amp.GradScaler(device.type, enabled=train.precision == "fp16"),
        "ema": ModelEmaV3(student, decay=train.ema, use_warmup=True) if train.ema else None,
    }


def expect_batches(train: Any, images: int | None, processes: int | None = None) -> None:
    """Raises `UserError` for a batch that is larger than the data, or does not divide. images: None, if they repeat."""
    processes = processes or parallel.world()
    parts = train.accumulate * processes
    if images is not None and images < train.batch_size:
        raise UserError(f"train.batch_size {train.batch_size} is more than the {images} training images; lower it")
    if train.batch_size % parts:
        raise UserError(
            f"train.batch_size {train.batch_size} does not divide among {processes} processes x "
            f"{train.accumulate} accumulated steps; make it a multiple of {parts}"
        )


def prepared(model: nn.Module, config: Any, device: torch.device) -> nn.Module:
    """On the device, in the recipe's memory format and with its batch norms. Raises `UserError`."""
    if config.train.sync_batchnorm:
        if device.type == "cpu":
            raise UserError("train.sync_batchnorm needs GPUs; torch has it for CUDA only")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    return model.to(memory_format=torch.channels_last) if config.train.channels_last else model
