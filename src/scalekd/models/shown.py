"""A model together with its input preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .inputs import resized
from .stages import Features, StageView


@dataclass
class Shown:
    """A model and how it sees pixels."""

    view: StageView
    size: tuple[int, int]
    mean: Tensor  # (1, C, 1, 1), as std
    std: Tensor

    def features(self, pixels: Tensor, maps: bool = True) -> Features:
        """pixels (B, C, H, W) in [0, 1]. A model that can be run on from a stage gives `resume` with its maps."""
        seen = resized(pixels, self.size, self.view.model)
        return self.view((seen - self.mean) / self.std, maps=maps, resumable=maps and self.view.shapes.can_resume)
