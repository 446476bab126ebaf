"""`Teacher`: a frozen model with its input, from pixels to the features that methods need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scalekd.models.inputs import resized
from scalekd.models.stages import Features, StageView

from .top_logits import TopK


@dataclass
class Teacher:
    """A frozen model with its input size and normalisation.

    Not an `nn.Module`, so that its parameters are not among the distiller's.
    """

    view: StageView
    size: tuple[int, int]  # (height, width) in pixels
    mean: Tensor  # (1, C, 1, 1) for pixels in [0, 1]
    std: Tensor  # (1, C, 1, 1) for pixels in [0, 1]
    needs_maps: bool = False
    needs_pooled: bool = False
    needs_classifier: bool = False
    top_k: TopK | None = None  # the methods see the largest logits only

    def __call__(self, pixels: Tensor, see: Callable[[Tensor], Features] | None = None) -> Features:
        """The features that the methods need, for pixels `(B, C, H, W)` in [0, 1] of any size.

        see: a compiled version of `self.see`.
        """
        features = (see or self.see)(resized(pixels, self.size, self.view.model))
        if self.top_k is not None:
            features.top = self.top_k(features.logits)
            features.logits = self.top_k.rebuilt(features.top)
        return self.view.resumable(features) if self.needs_maps and self.view.shapes.can_resume else features

    def stay_in_eval(self) -> None:
        """Puts the model back into eval mode if the caller's loop put it, or a part of it, into train mode.

        `module.train()` of a module that also holds the teacher does so, for example. In train mode batch norms would
        use and change their statistics, and drop path would act.
        """
        if any(module.training for module in self.view.model.modules()):
            self.view.model.eval()

    def see(self, pixels: Tensor) -> Features:
        """The features, without `resume`, for pixels `(B, C, H, W)` in [0, 1] of the teacher's input size."""
        classifier = self.needs_classifier or self.needs_pooled
        return self.view((pixels - self.mean) / self.std, maps=self.needs_maps, classifier=classifier)
