"""The protocol by which any `nn.Module` is a teacher of a `Distiller`, if it has not the interface of timm's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from .stages import Features


@runtime_checkable
class OwnStages(Protocol):
    """A module that gives its features itself.

    Besides `stage_features` it may have

        def resume_stage(self, k: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor

    for methods that run the teacher from one of its stages (`tpp`, `scalekd`). It runs the frozen module from the output of
    stage k, from 1 to 3, `x` `(n*B, D_k, H_k, W_k)`, to the final map, or without `end` to the output of stage 4. `prefix`
    are the class and register tokens of that stage for these images, `(n*B, P, D_k)`, or None. Gradients must flow to `x`, and
    from the module's own map it must compute the same as `stage_features`.

    Example:
        >>> class Mine(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.parts = torch.nn.ModuleList(torch.nn.Conv2d(c, 8, 2, stride=2) for c in (3, 8, 8, 8))
        ...
        ...     def stage_features(self, images):
        ...         maps = []
        ...         for part in self.parts:
        ...             maps.append(images := part(images))
        ...         return Features(logits=images.new_empty(len(images), 0), maps=tuple(maps), final=images)
        >>> view = StageView(Mine(), name="mine", image_size=(32, 32))
        >>> view.shapes.maps
        ((8, 16, 16), (8, 8, 8), (8, 4, 4), (8, 2, 2))
    """

    def stage_features(self, images: Tensor) -> Features:
        """The features of normalised images `(B, C, H, W)`.

        Required: `maps`, the raw outputs of four stages, and `final`, the last map after the final norm, of the same grid.
        `logits` are `(B, 0)` for a model without a classifier. Optional: `prefix`, the class and register tokens of each
        map; `pooled`, the class token or what the model pools, and with logits also `classify`, the classifier that computes
        them from it.
        """
        ...


def checked(features: Features) -> Features:
    """The features that a module gave itself. Raises ValueError if they do not follow the protocol."""
    maps, final, logits, pooled = features.maps, features.final, features.logits, features.pooled
    if len(maps) != 4 or any(m.ndim != 4 for m in maps):
        raise ValueError(f"its stage_features gives {len(maps)} maps; give four of shape (B, D, H, W)")
    if final is None or final.ndim != 4 or final.shape[2:] != maps[3].shape[2:]:
        raise ValueError("its stage_features gives no `final` of the grid of the last map")
    if logits.ndim != 2:
        raise ValueError("its stage_features gives logits that are not (B, classes); without a classifier give (B, 0)")
    if len(features.prefix) not in (0, 4):
        raise ValueError(
            f"its stage_features gives tokens of {len(features.prefix)} maps; give those of all four, or none"
        )
    if pooled is not None and (pooled.ndim != 2 or (logits.shape[1] > 0 and features.classify is None)):
        raise ValueError("its stage_features gives `pooled`, which must be (B, P), and with logits needs `classify`")
    return features
