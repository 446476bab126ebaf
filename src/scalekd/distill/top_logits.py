"""The largest logits of a teacher in half precision, with the probability of all other classes together.

For `k` of `C` classes an image takes `C / 8 + 2 * k + 8` bytes: 333 for 100 of 1,000. With `k == C` it takes
`2 * C + 8`, and nothing is lost but the rounding.

What is kept are log-probabilities at the temperature T of the loss. Rounding to half precision changes one of them by at
most 1/2048 of its value, so a probability by at most 0.05 % for each nat that it is below 1.

The other classes get equal logits, such that their probability together is the true one at temperature T. At a higher
temperature equal logits would have more probability than the true ones, at a lower one less (Jensen's inequality for a
power of the probabilities), so the losses of a teacher must have one temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.common.errors import UserError

LOWEST = torch.finfo(torch.float16).min


class TopLogits(NamedTuple):
    """The `k` largest of `C` logits for a batch of B images."""

    kept: Tensor  # (B, ceil(C / 8)) uint8: bit c % 8 of byte c // 8 says whether class c is kept; (B, 0) if all are
    values: Tensor  # (B, k) float16: log-probabilities of the kept classes, in the order of the classes
    rest: Tensor  # (B,) float32: logarithm of the sum of the other classes' probabilities; -inf if all are kept
    scale: Tensor  # (B,) float32: the log-sum-exp of logits / T, which turns log-probabilities into logits


def top_logits(logits: Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    """The `k` largest of each row of `(B, C)`, with `1 <= k <= C`. Of equal logits any may be kept."""
    logits = logits.float() / temperature
    scale = logits.logsumexp(dim=1)
    logs = logits - scale[:, None]
    if k == logits.shape[1]:
        nothing = logs.new_empty(len(logs), 0, dtype=torch.uint8)
        return TopLogits(nothing, _half(logs), torch.full_like(scale, -math.inf), scale)
    classes = logs.topk(k, dim=1).indices.sort(dim=1).values
    kept = torch.zeros_like(logs, dtype=torch.bool).scatter(1, classes, True)
    rest = logs.masked_fill(kept, -math.inf).logsumexp(dim=1)
    return TopLogits(_packed(kept), _half(logs.gather(1, classes)), rest, scale)


def rebuilt(top: TopLogits, classes: int, temperature: float = 1.0) -> Tensor:
    """Logits `(B, classes)`, float32, of which `top` was made at this temperature."""
    logs = top.values.float()
    if logs.shape[1] < classes:
        each = top.rest - math.log(classes - logs.shape[1])
        logs = each[:, None].repeat(1, classes).masked_scatter(_unpacked(top.kept, classes), logs)
    return temperature * (logs + top.scale[:, None])


@dataclass
class TopK:
    """How many of a teacher's logits its methods see.

    Args:
        where: the recipe key, for messages.
        k: the number of logits.
        classes: of the teacher.

    Raises:
        UserError: `k` is more than `classes`.
    """

    where: str
    k: int
    classes: int
    users: dict[str, float] = field(default_factory=dict)  # the temperature of each loss

    def __post_init__(self) -> None:
        if self.k > self.classes:
            raise UserError(
                f"{self.where}: {self.k} is more than the teacher's {self.classes} classes; use {self.classes} or fewer"
            )

    @property
    def temperature(self) -> float:
        """At which the probability of the other classes is kept."""
        return next(iter(self.users.values()), 1.0)

    def serve(self, loss: str, method: nn.Module) -> None:
        """Takes note of a method. Raises `UserError` if it needs more than the largest logits."""
        if not getattr(method, "needs_teacher", True):
            return
        all_classes = f"set {self.where}={self.classes}, which keeps all classes in half precision"
        if getattr(method, "needs_maps", True):
            raise UserError(f"{self.where}: losses.{loss} reads feature maps, not only logits; remove one of the two")
        if self.k == self.classes:
            return
        if not getattr(method, "takes_top_k", False):
            raise UserError(
                f"{self.where}: losses.{loss} needs the logits of all classes; {all_classes}, or use plain kd"
            )
        self.users[loss] = float(getattr(method, "temperature", 1.0))
        if self.users[loss] != self.temperature:
            listed = " and ".join(f"losses.{name} has {value:g}" for name, value in self.users.items())
            raise UserError(
                f"{self.where}: the probability of the other classes is kept at one temperature, and {listed}; give them "
                f"the same temperature, or {all_classes}"
            )

    def __call__(self, logits: Tensor) -> TopLogits:
        """The largest of `(B, classes)`."""
        return top_logits(logits, self.k, self.temperature)

    def rebuilt(self, top: Sequence[Tensor]) -> Tensor:
        """Logits `(B, classes)`, float32."""
        return rebuilt(TopLogits(*top), self.classes, self.temperature)


def _half(logs: Tensor) -> Tensor:
    return logs.clamp(min=LOWEST).half()  # -inf would make the KL divergence NaN


def _packed(bits: Tensor) -> Tensor:
    """(B, C) bool to (B, ceil(C / 8)) uint8."""
    bytes_ = F.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bytes_ << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(dim=2, dtype=torch.uint8)


def _unpacked(packed: Tensor, classes: int) -> Tensor:
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :classes].bool()
