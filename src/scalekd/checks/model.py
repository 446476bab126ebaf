"""Checks of one model: where its weights come from, and what it sees of the images."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from scalekd.common.text import counted
from scalekd.models.inputs import (
    input_channels,
)
from scalekd.models.options import Backbone
from scalekd.models.unseen_pixels import unseen, whole_sizes
from scalekd.models.weights.trained import Loaded, trained


class Check(NamedTuple):
    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


def from_source(role: str, place: str, loaded: Loaded) -> Check:
    """role: what the screen calls the model. place: where the recipe describes it."""
    told = f"{loaded.matched} of {loaded.total} tensors from {loaded.source}"
    told += f" (sha256 {loaded.sha256[:12]})" if loaded.sha256 else ""
    told += f", under `{loaded.prefix}`" if loaded.prefix else ""
    unused = loaded.keys["unexpected"]
    told += f"; not used of it: {', '.join(unused[:2])}{', ...' * (len(unused) > 2)}" if unused else ""
    told += f"; {loaded.head}" if loaded.head else ""
    found = trained(loaded)
    status, fix = found.status, found.meaning
    if status == "fail" and role == "student" and not loaded.untrained:
        status = "warn"  # it is trained now
    elif loaded.untrained:
        fix += f", or {place}.weights=random if you mean it"
    elif status == "fail" and place != "backbone":  # only `scalekd train` has that option
        fix += "; or start with --no-preflight"
    return Check(f"{role} weights", status, f"{told}; {found.figures}", fix)


def unseen_pixels(role: str, place: str, model: nn.Module, size: tuple[int, int]) -> list[Check]:
    """Told where the model has no use for the last rows and columns of its images. place: of the size in the recipe."""
    left_out = unseen(model, input_channels(model), size)
    if left_out is None:
        return []
    parts = [counted(n, what) for n, what in ((left_out.rows, "row"), (left_out.columns, "column")) if n]
    told = f"the last {' and '.join(parts)} of {size[0]}x{size[1]} have no effect on it: they fill no patch"
    below, above = (list(s) if s[0] != s[1] else s[0] for s in whole_sizes(left_out, size))
    return [Check(f"{role} pixels", "warn", told, f"Set {place}.image_size={below} or {above}")]


def shown(mean: torch.Tensor, std: torch.Tensor) -> str:
    mean_text, std_text = (" ".join(f"{v:.3f}" for v in t.flatten().tolist()) for t in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def weights_check(spec: Backbone, loaded: Loaded, seed: int) -> Check:
    if loaded.source == "random":
        return Check("backbone weights", "ok", f"initial values, from seed {seed}")
    return from_source("backbone", "backbone", loaded)
