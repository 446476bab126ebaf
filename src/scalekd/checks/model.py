"""Pre-flight checks of one model: where its weights come from, and which pixels it ignores."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from scalekd.common.text import counted
from scalekd.models.inputs import input_channels
from scalekd.models.licences import explained, is_non_commercial
from scalekd.models.options import Backbone
from scalekd.models.unseen_pixels import unseen, whole_sizes
from scalekd.models.weights.trained import Loaded, trained


class Check(NamedTuple):
    """One line of the pre-flight screen. `fix` says how to fix a warning or an error."""

    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


def from_source(role: str, key: str, loaded: Loaded, skippable: bool = True) -> Check:
    """Checks weights that came from a file or from timm.

    role: name of the model on the screen. key: recipe key of the model, such as `teacher`. skippable: whether the run
    can skip the checks, which those of detection and segmentation cannot.
    """
    text = f"{loaded.matched} of {loaded.total} tensors from {loaded.source}"
    text += f" (sha256 {loaded.sha256[:12]})" if loaded.sha256 else ""
    text += f", prefix `{loaded.prefix}`" if loaded.prefix else ""
    unused = loaded.keys["unexpected"]
    text += f"; unused tensors: {', '.join(unused[:2])}{', ...' * (len(unused) > 2)}" if unused else ""
    text += f"; {loaded.head}" if loaded.head else ""
    text += f"; licence {explained(loaded.licence)}" if loaded.licence else ""
    verdict = trained(loaded)
    status, fix = verdict.status, verdict.meaning
    if status == "fail" and role == "student" and not loaded.untrained:
        status = "warn"  # this run trains it
    elif loaded.untrained:
        fix += f", or set {key}.weights=random to start from initial values"
    elif status == "fail" and skippable:
        fix += ", or skip the checks (`preflight`)"
    return Check(f"{role} weights", status, f"{text}; {verdict.figures}", fix)


def licence_check(role: str, loaded: Loaded) -> list[Check]:
    """Warns if the weights may not be used commercially."""
    if not loaded.licence or not is_non_commercial(loaded.licence):
        return []
    return [
        Check(
            f"{role} licence",
            "warn",
            f"{loaded.licence}: these weights are for non-commercial use, which may hold for the student too",
            "Read the licence, or choose other weights, if the student is to earn money",
        )
    ]


def unseen_pixels(role: str, key: str, model: nn.Module, size: tuple[int, int]) -> list[Check]:
    """Warns if the model ignores the last rows or columns of its images.

    size: (height, width) in pixels. key: recipe section that holds this `image_size`.
    """
    ignored = unseen(model, input_channels(model), size)
    if ignored is None:
        return []
    parts = [counted(n, what) for n, what in ((ignored.rows, "row"), (ignored.columns, "column")) if n]
    text = f"the model ignores the last {' and '.join(parts)} of {size[0]}x{size[1]}: they do not fill a patch"
    below, above = (list(s) if s[0] != s[1] else s[0] for s in whole_sizes(ignored, size))
    return [Check(f"{role} pixels", "warn", text, f"Set {key}.image_size={below} or {above}")]


def shown(mean: torch.Tensor, std: torch.Tensor) -> str:
    """`mean 0.485 0.456 0.406, std 0.229 0.224 0.225`."""
    mean_text, std_text = (" ".join(f"{v:.3f}" for v in t.flatten().tolist()) for t in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def weights_check(spec: Backbone, loaded: Loaded, seed: int) -> Check:
    """Checks the weights of a detector's or segmenter's backbone."""
    if loaded.source == "random":
        return Check("backbone weights", "ok", f"initial values, from seed {seed}")
    return from_source("backbone", "backbone", loaded, skippable=False)


def untrained_teacher(name: str, key: str) -> Check:
    """The warning for a teacher whose weights the recipe asks to be random. name: of the line. key: recipe key."""
    return Check(name, "warn", f"random initial values, as {key}.weights=random asks: this teacher is untrained")
