"""Recipe sections `train`, `optim` and `schedule`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
)

from scalekd.common.errors import nearest
from scalekd.common.sections import Beta, Positive, Precision, Section, Share, Switch
from scalekd.common.text import printable


class Steps(Section):
    batch_size: Annotated[int, Field(gt=0, le=2**20)]
    """Images per optimiser step, over all processes and micro-batches."""
    accumulate: Positive = 1
    """Micro-batches per optimiser step."""
    precision: Precision = "float32"
    """float32, or autocast to bf16 or fp16; fp32, bfloat16 and float16 are understood too. The weights stay in float32.
    auto: bf16 if the device has instructions for it, else fp16 on a GPU with tensor cores, else float32."""
    channels_last: Switch = False
    """Use the channels-last memory format for models and images. auto: on CPUs and CUDA GPUs. A run's recipe.yaml holds
    what `auto` chose, and a resumed run keeps it."""
    best_by: str | None = None
    """The validation metric that chooses best.pt, by its key in log.jsonl: top1, top5, map, f1_macro, f1_micro, and of
    retrieval recall_at_1, recall_at_5, recall_at_10, map_at_r and knn (docs/how-to/retrieval.md). By default the first that
    the run computes: top1; map with sets of labels; of a detector or segmenter its main one."""
    patience: Positive | None = None
    """End the run after this many validations in a row without a better `best_by`. The learning rates are those of the
    whole run: a run that ends early has not reached the end of its schedule. null: train to the end."""
    export: Literal["last", "best"] = "last"
    """Which weights the run exports at its end: the last ones, or the best ones by `best_by`."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Maximum norm of the gradient. By default it is not clipped."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the student's weights, which is then evaluated and exported. The average
    is the plain mean of all steps up to step 1 / (1 - `ema`); the decay is constant from there on."""
    sync_batchnorm: bool = False
    """Compute the statistics of batch norms over all processes. CUDA only."""
    save_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between checkpoints; 0 for one after every step. Every validation also writes one."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Maximum number of steps to skip because the loss or the gradient is not finite. Above 0, every step waits for the
    GPU."""
    resume_anyway: tuple[Literal["data", "teacher", "versions"], ...] = ()
    """Resume although the images, a teacher's weights or the libraries' versions are not those of before. The run is then
    not the one that would have run without the stop (docs/how-to/resume-and-scale.md)."""
    log_every: Positive = 50
    """Steps between log lines. Losses are copied from the device only then."""


class Train(Steps):
    epochs: Positive
    """Length of the training."""
    eval_every: Annotated[float, Field(gt=0)] = 1
    """Epochs between validations; 0.25 for four per epoch."""


class BaseOptim(Section):
    name: str = "adamw"
    """Name of a timm optimiser."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from timm.optim import list_optimizers

        if name not in list_optimizers():
            raise ValueError(f"timm has no optimiser `{printable(name)}`.{nearest(name, list_optimizers())}")
        return name

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate, before the schedule changes it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay, as the optimiser defines it."""
    momentum: Share = 0.9
    """Momentum, for optimisers that have it."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the moving averages of Adam and related optimisers."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Term added to the denominator by Adam and related optimisers."""


class Schedule(Section):
    name: Literal["cosine", "multistep"] = "cosine"
    """How the learning rate decreases: along a cosine, or in steps."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    """Epochs at the start in which the learning rate rises linearly from `warmup_lr`. They are part of `train.epochs`."""
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the first step of the warm-up."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of `cosine`."""
    milestones: tuple[Positive, ...] = (30, 60, 90)
    """Epochs at which `multistep` multiplies the learning rate by `decay_rate`."""
    decay_rate: Share = 0.1
    """Factor of the learning rate at each of `milestones`."""
