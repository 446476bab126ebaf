"""What is known of a model's weights: where they are from, and whether anyone trained them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

from .weights import classifier


@dataclass(frozen=True)
class Loaded:
    """What is known of a model and its weights."""

    kwargs: dict[str, Any]  # what `timm.create_model` was given beside the name
    source: str  # "pretrained (...)", a path, or "random"
    sha256: str | None  # of the file; `backbone_sha256` for timm's own weights
    matched: int  # tensors filled from the source
    total: int  # tensors of the model
    initial: float  # share of biases and norm weights still exactly at their initial 0 or 1
    head: str | None = None  # what is there instead, where the source's classifier was for other classes
    prefix: str = ""  # what was taken off the names in the file
    keys: dict[str, list[str]] = field(default_factory=dict)  # `matched`, `missing`, `unexpected`, as `grouped`
    noise: float | None = None  # `noise_share`; None: not looked at, or nothing to look at
    exported: bool = False  # whether the card of a scalekd run beside the file names its sha256

    @property
    def untrained(self) -> bool:
        """Whether weights that a source gave are those of a model that nobody trained."""
        return self.source != "random" and self.initial > 0.5


NOISE, ALL_NOISE = 0.4, 0.9  # shares of weight matrices without structure; up to 17 % in trained models that were tried


class Trained(NamedTuple):
    """Whether anyone trained weights that a source gave, as far as their numbers tell."""

    status: Literal["ok", "warn", "fail"]
    figures: str
    meaning: str = ""  # with the way out

    @property
    def told(self) -> str:
        return f"{self.figures}. {self.meaning}"


def trained(loaded: Loaded) -> Trained:
    """`fail`: biases and norms at initial values, or matrices without structure that no card of a run speaks for.

    A short run of scalekd's own has such matrices too (a few dozen steps), so its export is not refused.
    """
    if loaded.untrained:
        figures = f"{loaded.initial:.0%} of the biases and norms are at their initial values"
        return Trained("fail", figures, "These weights were never trained; give others")
    figures = f"{loaded.initial:.0%} of the biases and norms at initial values"
    if loaded.noise is None:
        return Trained("ok", figures)
    figures += f", {loaded.noise:.0%} of the weight matrices without structure"
    if loaded.noise <= NOISE:
        return Trained("ok", figures)
    if loaded.noise < ALL_NOISE or loaded.exported:
        return Trained("warn", figures, "So do weights look after a few steps of training; else they were never loaded")
    return Trained(
        "fail",
        f"{figures}: their entries might as well be shuffled",
        "So do weights look that nobody trained, and trained ones after a few steps only: give others, or train these "
        "for longer",
    )


def backbone_sha256(model: nn.Module, loaded: Loaded) -> str:
    """The sha256 of the weights' file; for timm's own weights, of the parameters as loaded.

    The latter leaves out the classifier and the tables of positions, which timm resizes to the image size with
    a rounding that may differ from machine to machine.
    """
    if loaded.sha256:  # of timm's own, it is what stands below
        return loaded.sha256
    summed, head = hashlib.sha256(), classifier(model)
    for name, parameter in sorted(model.named_parameters()):
        if name not in head and not re.search("pos_embed|position|rel_pos", name):
            summed.update(f"{name} {tuple(parameter.shape)}".encode())
            summed.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return summed.hexdigest()
