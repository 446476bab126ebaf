"""A model that resizes and normalises its images itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .inputs import resized
from .stages import Features, StageView


@dataclass
class Normalised:
    """A model with the size, mean and std of its input."""

    view: StageView
    size: tuple[int, int]
    mean: Tensor  # (1, C, 1, 1), as std
    std: Tensor

    def features(self, pixels: Tensor, maps: bool = True) -> Features:
        """Features of pixels (B, C, H, W) in [0, 1], with `Features.resume` if the model has a tail and `maps` is set."""
        images = resized(pixels, self.size, self.view.model)
        return self.view((images - self.mean) / self.std, maps=maps, resumable=maps and self.view.shapes.can_resume)
