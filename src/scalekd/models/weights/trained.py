"""What is known of a model's weights: where they are from, and whether anyone trained them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .match import classifier


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


class Verdict(NamedTuple):
    """Whether anyone trained weights that a source gave, as far as their numbers tell."""

    status: Literal["ok", "warn", "fail"]
    figures: str
    meaning: str = ""  # with the way out

    @property
    def text(self) -> str:
        return f"{self.figures}. {self.meaning}"


def trained(loaded: Loaded) -> Verdict:
    """`fail`: biases and norms at initial values, or matrices without structure that no card of a run speaks for.

    A short run of scalekd's own has such matrices too (a few dozen steps), so its export is not refused.
    """
    if loaded.untrained:
        figures = f"{loaded.initial:.0%} of the biases and norms are at their initial values"
        return Verdict("fail", figures, "These weights were never trained; give others")
    figures = f"{loaded.initial:.0%} of the biases and norms at initial values"
    if loaded.noise is None:
        return Verdict("ok", figures)
    figures += f", {loaded.noise:.0%} of the weight matrices without structure"
    if loaded.noise <= NOISE:
        return Verdict("ok", figures)
    if loaded.noise < ALL_NOISE or loaded.exported:
        return Verdict("warn", figures, "So do weights look after a few steps of training; else they were never loaded")
    return Verdict(
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


# ---------------------------------------------------------------- whether anyone trained them


def initial_share(model: nn.Module) -> float:
    """Share of one-dimensional parameters that hold only zeros or only ones, as timm initialises biases and norms.

    Verdict models have next to none; freshly built ones nearly all.
    """
    flat = [p.detach() for p in model.parameters() if p.ndim == 1 and p.numel() > 1]
    constant = sum(bool((p == 0).all() or (p == 1).all()) for p in flat)
    return constant / max(1, len(flat))


def noise_share(model: nn.Module) -> float | None:
    """Share of weight matrices without structure: their entries might as well be in any other order.

    That is so at initial values, which are drawn one by one, and after too few steps to matter; training gives rows
    and columns that go together, and with them singular values larger than chance gives. Looked at is the norm of
    W W^T, the root of the sum of the fourth powers of the singular values, against that of W with its entries shuffled:
    W counts as noise up to 1.05 times that. The two are equal in distribution for independent entries whatever their
    distribution; for matrices of 32 x 32 and more the ratio then was below 1.03 in 16 families.
    At most 24 matrices, evenly spaced, and 512 rows and columns of each. None for a model without such matrices.
    """
    parameters = [p.detach() for p in model.parameters() if p.ndim > 1]
    matrices = [m for p in parameters if min((m := p.flatten(1)).shape) >= 32]
    count = min(24, len(matrices))
    if not count:
        return None
    generator = torch.Generator().manual_seed(0)
    some = [matrices[i * len(matrices) // count] for i in range(count)]
    return sum(_ratio_to_shuffled(m, generator) <= 1.05 for m in some) / len(some)


def _ratio_to_shuffled(matrix: torch.Tensor, generator: torch.Generator) -> float:
    rows, columns = (torch.randperm(n, generator=generator)[:512] for n in matrix.shape)
    part = matrix.cpu().float()[rows][:, columns]
    shuffled = part.flatten()[torch.randperm(part.numel(), generator=generator)].view(part.shape)
    ours, chance = (torch.linalg.norm(m @ m.T if len(m) < len(m.T) else m.T @ m).item() for m in (part, shuffled))
    return ours / chance if chance else 1.0
