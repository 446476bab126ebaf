"""A loss or gradient that is not finite: which term, which step, which files, and a file that does it again."""

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

ADVICE = "Lower optim.lr, set train.clip_grad=1.0, or use train.precision=bf16 in place of fp16."


class NonFinite(Exception):
    """Found in `step`, counted from 1. `before_update`: the run stands where the step began."""

    def __init__(self, step: int, terms: list[str], before_update: bool):
        self.step, self.terms, self.before_update = step, terms, before_update
        super().__init__(f"not finite in step {step}: {', '.join(terms)}")


def non_finite(values: dict[str, float]) -> list[str]:
    """The names of the values that are not finite; the sum of terms and the gradient only if no term is."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    return [name for name in bad if name not in ("total", "gradient")] or bad


def check_step(step: int, losses: dict[str, Tensor], grad_norm: Tensor, scaled: bool) -> None:
    """Raises `NonFinite` on all processes if one of them has it. Waits for the device.

    scaled: the gradient is fp16's, whose overflows the gradient scaler takes care of.
    """
    names = [*losses, *(() if scaled else ("gradient",))]
    values = torch.stack([v.float() for v in (*losses.values(), grad_norm)]).tolist()
    terms = non_finite(dict(zip(names, values)))
    if parallel.highest(bool(terms))[0]:
        found = sorted({t for of_one in parallel.gather(terms) for t in of_one})
        raise NonFinite(step, found, before_update=True)


def expect_finite(model: nn.Module, step: int) -> None:
    """Raises `UserError` for weights or statistics that are not: such a model may still give figures, of nothing."""
    values = [t for t in model.state_dict().values() if t.is_floating_point()]
    if values and not torch.stack([t.isfinite().all() for t in values]).all():
        raise UserError(
            f"the model that would be deployed has weights or statistics that are not finite after step {step}. The last "
            f"checkpoint is from before.\n{ADVICE}"
        )


def report(run: Run, at: Progress, found: NonFinite, folder: Path) -> UserError:
    """Saves the step, one file per process, for `load_report`; returns the error to raise."""
    micro = [run.again(keys) for keys in run.train_sampler().keys_of(found.step - 1)]
    batches, files = [batch for batch, _ in micro], [file for _, of_one in micro for file in of_one]
    rank = f"-rank-{parallel.rank()}" if parallel.rank() else ""
    path = folder / f"nonfinite-step-{found.step}{rank}.pt"
    content = {
        "step": found.step,
        "terms": found.terms,
        "files": files,
        "images": [b.images for b in batches],
        "targets": [b.targets for b in batches],
        "recipe": to_yaml(run.config),
        "state": snapshot(run, at),
    }
    checkpoint.save(path, content)
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return UserError(
        f"the loss is not finite: {', '.join(found.terms)} in step {found.step}, on {', '.join(files[:2])}{more}. "
        f"The last checkpoint is from before; {path} holds the step.\n{ADVICE} "
        "train.skip_nonfinite=10 would leave out up to ten such steps."
    )
