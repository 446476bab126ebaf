"""The recipe sections `train`, `optim` and `schedule`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from scalekd.common.errors import nearest
from scalekd.common.sections import Beta, Positive, Section, Share
from scalekd.common.text import printable


class Steps(Section):
    batch_size: Annotated[int, Field(gt=0, le=2**20)]
    """The global batch size: over all processes and accumulated micro-batches."""
    accumulate: Positive = 1
    """Micro-batches per optimiser step."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    channels_last: bool = False
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the exponential moving average of the student's weights, which is then evaluated and exported."""
    sync_batchnorm: bool = False
    save_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between checkpoints; every validation writes one too. 0: after every step."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """How many steps of a run may be skipped because the loss or the gradient is not finite. Above 0, every step
    waits for the GPU."""
    log_every: Positive = 50
    """Steps between log lines. Losses are read from the device only then."""


class Train(Steps):
    epochs: Positive
    eval_every: Annotated[float, Field(gt=0)] = 1
    """Epochs between validations; 0.25 means four per epoch."""


class BaseOptim(Section):
    name: str = "adamw"
    """A timm optimiser name."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from timm.optim import list_optimizers

        if name not in list_optimizers():
            raise ValueError(f"timm has no optimiser `{printable(name)}`.{nearest(name, list_optimizers())}")
        return name

    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    momentum: Share = 0.9
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8


class Schedule(Section):
    name: Literal["cosine", "multistep"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-6
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    milestones: tuple[Positive, ...] = (30, 60, 90)
    """Epochs at which `multistep` multiplies the learning rate by `decay_rate`."""
    decay_rate: Share = 0.1
