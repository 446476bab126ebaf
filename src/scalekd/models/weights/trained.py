"""Where a model's weights came from, and whether they look trained."""

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
    """Where a model's weights came from, and how many of its tensors they filled."""

    kwargs: dict[str, Any]  # keyword arguments of `timm.create_model`
    source: str  # "pretrained (...)", a path, or "random"
    sha256: str | None  # of the file; `backbone_sha256` for timm's own weights
    matched: int  # tensors filled from the source
    total: int  # tensors of the model
    initial: float  # share of biases and norm weights that are exactly 0 or 1, their initial values
    head: str | None = None  # the new classifier, if that of the source was not used
    prefix: str = ""  # prefix of the tensor names in the file
    keys: dict[str, list[str]] = field(default_factory=dict)  # `matched`, `missing`, `unexpected`, as `grouped`
    noise: float | None = None  # `noise_share`; None if unknown
    exported: bool = False  # whether the card of a scalekd run next to the file has its sha256
    licence: str | None = None  # of the weights, as timm names it, or `unknown`; None for random values

    @property
    def untrained(self) -> bool:
        """Whether weights from a file or from timm are initial values."""
        return self.source != "random" and self.initial > 0.5


NOISE, ALL_NOISE = 0.4, 0.9  # thresholds for `noise_share`; trained models had up to 17 %


class Verdict(NamedTuple):
    """Whether weights look trained. `meaning` says what the figures mean and how to fix it."""

    status: Literal["ok", "warn", "fail"]
    figures: str
    meaning: str = ""

    @property
    def text(self) -> str:
        return f"{self.figures}. {self.meaning}"


def trained(loaded: Loaded) -> Verdict:
    """Whether the weights look trained, from the shares of initial values and of matrices without structure.

    `fail` if most biases and norms are at initial values, or nearly all matrices have no structure. The latter is only a
    warning for an exported student, because a run of a few dozen steps gives such matrices too.
    """
    if loaded.untrained:
        figures = f"{loaded.initial:.0%} of the biases and norms are at their initial values"
        return Verdict("fail", figures, "These weights were never trained; use others")
    figures = f"{loaded.initial:.0%} of the biases and norms at initial values"
    if loaded.noise is None:
        return Verdict("ok", figures)
    figures += f", {loaded.noise:.0%} of the weight matrices without structure"
    if loaded.noise <= NOISE:
        return Verdict("ok", figures)
    if loaded.noise < ALL_NOISE or loaded.exported:
        return Verdict(
            "warn", figures, "This is normal after a few steps of training; otherwise the weights were not loaded"
        )
    return Verdict(
        "fail",
        f"{figures}: shuffling their entries changes nothing",
        "These weights are untrained, or trained for only a few steps; use others, or train these for longer",
    )


def backbone_sha256(model: nn.Module, loaded: Loaded) -> str:
    """The sha256 of the weights file; for timm's own weights, of the loaded parameters.

    The latter excludes the classifier and the position tables, which timm resizes to the image size with rounding that
    may differ between machines.
    """
    if loaded.sha256:  # of the file, or computed before
        return loaded.sha256
    summed, head = hashlib.sha256(), classifier(model)
    for name, parameter in sorted(model.named_parameters()):
        if name not in head and not re.search("pos_embed|position|rel_pos", name):
            summed.update(f"{name} {tuple(parameter.shape)}".encode())
            summed.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return summed.hexdigest()


# ---------------------------------------------------------------- signs of training


def initial_share(model: nn.Module) -> float:
    """Share of one-dimensional parameters that are all zeros or all ones, as timm initialises biases and norms.

    Near 0 in trained models, near 1 in new ones.
    """
    vectors = [p.detach() for p in model.parameters() if p.ndim == 1 and p.numel() > 1]
    constant = sum(bool((p == 0).all() or (p == 1).all()) for p in vectors)
    return constant / max(1, len(vectors))


def noise_share(model: nn.Module) -> float | None:
    """Share of weight matrices without structure, whose entries could be shuffled without a difference.

    Initial values are independent draws, and a few training steps hardly change that. Training correlates rows and
    columns and makes some singular values larger than chance does. So the norm of W W^T (the root of the sum of the
    fourth powers of the singular values) is compared with that of W with its entries shuffled; W counts as noise up to a
    ratio of 1.05. For independent entries of any distribution both norms have the same distribution; the ratio was below
    1.03 for matrices of 32 x 32 and more in 16 model families.

    Uses at most 24 matrices, evenly spaced, and 512 rows and columns of each. None for a model without matrices of
    32 x 32 or more.
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
