"""Detects losses, gradients and weights that are not finite, and saves the step that made them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.sections import to_yaml

from . import checkpoint
from .resume import Progress, snapshot
from .run import Run

ADVICE = "Lower optim.lr, set train.clip_grad=1.0, or use train.precision=bf16 instead of fp16."


class NonFinite(Exception):
    """A loss or gradient of `step` (counted from 1) is not finite.

    before_update: the weights and buffers are those from before the step.
    """

    def __init__(self, step: int, terms: list[str], before_update: bool):
        self.step, self.terms, self.before_update = step, terms, before_update
        super().__init__(f"not finite in step {step}: {', '.join(terms)}")


def non_finite(values: dict[str, float]) -> list[str]:
    """The names of the values that are not finite.

    `total` and `gradient` follow from the terms, so they are named only if every term is finite.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    return [name for name in bad if name not in ("total", "gradient")] or bad


def check_step(step: int, losses: dict[str, Tensor], grad_norm: Tensor, scaled: bool) -> None:
    """Raises `NonFinite` in all processes if a value is not finite in one of them. Synchronises with the device.

    scaled: the gradients are scaled (fp16). An overflow is then normal, and the gradient scaler handles it.
    """
    names = [*losses, *(() if scaled else ("gradient",))]
    values = torch.stack([v.float() for v in (*losses.values(), grad_norm)]).tolist()
    terms = non_finite(dict(zip(names, values)))
    if parallel.highest(bool(terms))[0]:
        all_terms = sorted({term for of_process in parallel.gather(terms) for term in of_process})
        raise NonFinite(step, all_terms, before_update=True)


def expect_finite(model: nn.Module, step: int) -> None:
    """Raises `UserError` if a weight or buffer is not finite: such a model may still give finite but useless metrics."""
    values = [t for t in model.state_dict().values() if t.is_floating_point()]
    if values and not torch.stack([t.isfinite().all() for t in values]).all():
        raise UserError(
            f"the model's weights or running statistics are not finite after step {step}. "
            f"The last checkpoint was saved before that.\n{ADVICE}"
        )


def report(run: Run, progress: Progress, error: NonFinite, folder: Path) -> UserError:
    """Saves the step's batch and the run's state, one file per process, and returns the error to raise.

    `scalekd.runs.nonfinite.load_report` reads the file.
    """
    micro_batches = [run.again(keys) for keys in run.train_sampler().keys_of(error.step - 1)]
    batches = [batch for batch, _ in micro_batches]
    files = [file for _, batch_files in micro_batches for file in batch_files]
    rank = f"-rank-{parallel.rank()}" if parallel.rank() else ""
    path = folder / f"nonfinite-step-{error.step}{rank}.pt"
    content = {
        "step": error.step,
        "terms": error.terms,
        "files": files,
        "images": [batch.images for batch in batches],
        "targets": [batch.targets for batch in batches],
        "recipe": to_yaml(run.config),
        "state": snapshot(run, progress),
    }
    checkpoint.save(path, content)
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return UserError(
        f"the loss is not finite: {', '.join(error.terms)} in step {error.step}, on {', '.join(files[:2])}{more}. "
        f"The last checkpoint was saved before that; {path} holds the batch and the run's state.\n{ADVICE} "
        "To skip up to ten such steps, set train.skip_nonfinite=10."
    )
