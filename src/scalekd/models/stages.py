"""The four-stage view of any timm model: what a distillation method sees of a network.

Every timm classifier is seen as four maps, the last map after the model's final norm, and logits,
all taken in one forward pass. A hierarchical model gives its own last four stages; a plain ViT or
MLP is cut in quarters of its depth, unless `cuts` says otherwise.

Top to bottom: what a method gets (`Shapes`, `Features`), the view of a model (`StageView`), and how it
finds its four features. How a frozen teacher is run on from the middle is in `tails.py`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerNorm2d, LayerNorm2dFp32, PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from .inputs import input_channels
from .tails import TEACHER_TAILS, to_map

MapShape = tuple[int, int, int]  # channels, height, width
LARGE = 60_000_000  # parameters; from here on a model's shapes are found without computing


@dataclass(frozen=True)
class Shapes:
    """What a method knows of a model when it is built. A map is `(channels, height, width)`."""

    model: str  # the timm name, for messages
    maps: tuple[MapShape, ...]  # four, first to last stage; empty for a model seen through logits only
    final: MapShape | None  # the last map after the model's final norm; None as above
    classes: int  # 0 for a model without a head
    can_resume: bool = False  # there is a tail for it: `Features.resume` works
    pooled: int = 0  # channels of what its classifier is given; 0: no one layer gives its logits


@dataclass
class Features:
    """What a method gets of a model at each step. B images; D, H, W as in `Shapes`."""

    logits: Tensor  # (B, classes); what the pooling gives, (B, D), for a model without a head
    maps: tuple[Tensor, ...] = ()  # four of (B, D, H, W), raw stage outputs
    final: Tensor | None = None  # (B, D, H, W), the last map after the model's final norm
    prefix: tuple[Tensor | None, ...] = ()  # class / register tokens beside each map, (B, P, D) or None
    resume: Callable[[int, Tensor], Tensor] | None = None
    """Teachers only: `resume(k, map)` runs the frozen teacher on from the output of stage k (1 to 3),
    `(n*B, D_k, H_k, W_k)` with n a whole number, to its final map `(n*B, D, H, W)`. The gradient flows
    to `map`. The teacher's own prefix tokens of that stage are used, repeated n times."""
    pooled: Tensor | None = None  # (B, P), what the classifier was given; teachers of methods that need it only
    classify: Callable[[Tensor], Tensor] | None = None
    """With `pooled`: the frozen classifier, `(n, P)` to logits `(n, classes)`. The gradient flows to its input."""

    def first(self, count: int) -> Features:
        """Those of the first `count` images, without `resume`."""
        return Features(
            logits=self.logits[:count],
            maps=tuple(m[:count] for m in self.maps),
            final=None if self.final is None else self.final[:count],
            prefix=tuple(None if p is None else p[:count] for p in self.prefix),
            pooled=None if self.pooled is None else self.pooled[:count],
            classify=self.classify,
        )


class StageView:
    """Calls a timm model and gives its `Features`. Holds the model, changes nothing in it.

    `view(images)` is the model's own forward pass, in whatever mode the model is in: drop path, dropout
    and batch norm act, and gradients flow, as in `model(images)`.

    Which outputs are the four maps, by timm's own numbering of its features:

    - the features differ in stride (ResNet, Swin, ...): the last four. A fifth, the stem's, is left out.
      GhostNet is the exception among those whose features end a stage: timm taps it after the first block of
      each stride, so its maps 1 to 4 leave out what follows at that stride (`final` has all of it).
    - all have one stride (ViT, Mixer, ...): stage i of four ends with block `floor(i * depth / 4)`,
      counted from one. Depth 12 is cut after the blocks 2, 5, 8, 11, counted from zero as `cuts` are;
      depth 24 after 5, 11, 17, 23; depth 6 after 0, 2, 3, 5. `cuts` names four blocks of your own.

    `final` is the last map after the model's final norm, wherever the family keeps it: `norm` acts on the
    map; `fc_norm` (a ViT that pools) and `head.norm` (ConvNeXt) act after pooling and are applied here at
    every position. A model with a last convolution after its stages (EfficientNet) has widened it.

    A model that cannot be seen so has `refusal`, a message of two lines, and empty `shapes.maps`; its
    logits still work, with `maps=False`.
    """

    def __init__(self, model: nn.Module, *, name: str, image_size: tuple[int, int], cuts: Sequence[int] | None = None):
        self.model = model
        self.name = name
        self.refusal: str | None = None
        self.indices: tuple[int, ...] = ()  # the four features taken, in timm's numbering
        self._gives_prefix = _gives_prefix(model)
        reason = obstacle(model)
        if reason is None:
            self.indices, reason = _choose(model, name, cuts)
        elif cuts is not None:
            raise ValueError(f"cuts={list(cuts)}: {name} cannot be cut: {reason}.")

        size = (1, input_channels(model), *image_size)
        logits = _try_on_copy(model, size, lambda twin, images: _one_logit_tensor(twin(images)))
        if isinstance(logits, Exception):
            message = f"{name} cannot be used at {image_size[0]}x{image_size[1]}: {_one_line(logits)}."
            # what torch says when a convolution or pooling has nothing left
            small = re.search("kernel size|too small", message, re.IGNORECASE)
            raise ValueError(message + (" Use a larger data.image_size." if small else ""))

        features = None
        if reason is None:
            features = _try_on_copy(model, size, lambda twin, images: self._tap(twin, images, classifier=True))
            if isinstance(features, Exception):
                reason, features = f"its forward_intermediates does not fit: {_one_line(features)}", None
        if reason is not None:
            self.refusal = _refuse(name, model, reason)

        classes = getattr(model, "num_classes", None)
        self.shapes = Shapes(
            model=name,
            maps=tuple(tuple(m.shape[1:]) for m in features.maps) if features else (),
            final=tuple(features.final.shape[1:]) if features else None,
            classes=logits.shape[-1] if classes is None or classes > 0 else 0,
            can_resume=features is not None and type(model) in TEACHER_TAILS,
            pooled=features.pooled.shape[1] if features and features.pooled is not None else 0,
        )

    def __call__(
        self, images: Tensor, maps: bool = True, resumable: bool = False, classifier: bool = False
    ) -> Features:
        """Images `(B, C, H, W)` to `Features`. `maps=False`: the logits alone, from `model(images)`.

        `resumable=True`, for a frozen teacher in eval mode, adds `Features.resume`; `classifier=True`, with maps,
        `pooled` and `classify`, of a model that has them (`Shapes.pooled`).
        """
        if resumable and not self.shapes.can_resume:
            known = ", ".join(sorted(c.__name__ for c in TEACHER_TAILS))
            raise ValueError(
                f"{self.name} cannot be run on from a stage: {type(self.model).__name__} has no tail.\n"
                f"Methods that need one (tpp) work with: {known}."
            )
        if not maps and not resumable:
            return Features(logits=_one_logit_tensor(self.model(images)))
        if self.refusal:
            raise ValueError(self.refusal)
        features = self._tap(self.model, images, classifier)
        return self.resumable(features) if resumable else features

    def resumable(self, features: Features) -> Features:
        """`features` of this model, now with `resume`. Raises ValueError in train mode."""
        if self.model.training:
            raise ValueError(f"{self.name} is to be run on from a stage and is in train mode: call .eval().")
        features.resume = self._resume_from(features.prefix)
        return features

    def _tap(self, model: Any, images: Tensor, classifier: bool = False) -> Features:
        options = {"return_prefix_tokens": True} if self._gives_prefix else {}
        x, outputs = model.forward_intermediates(
            images, indices=list(self.indices), norm=False, output_fmt="NCHW", **options
        )
        maps, prefix = zip(*outputs) if self._gives_prefix else (outputs, [None] * len(outputs))
        _expect(len(maps) == 4 and all(m.ndim == 4 for m in maps), "it did not give four maps")
        head = _head(model, x) if classifier else (_one_logit_tensor(model.forward_head(x)), None, None)
        return Features(
            logits=head[0],
            maps=tuple(maps),
            final=_normed(model, _final_map(model, x, grid=maps[-1].shape[-2:])),
            prefix=tuple(prefix),
            pooled=head[1],
            classify=head[2],
        )

    def _resume_from(self, prefix: tuple[Tensor | None, ...]) -> Callable[[int, Tensor], Tensor]:
        tail = TEACHER_TAILS[type(self.model)]

        def resume(k: int, x: Tensor) -> Tensor:
            tokens = prefix[k - 1]
            if tokens is not None:
                tokens = tokens.detach().repeat(x.shape[0] // tokens.shape[0], 1, 1)  # view by view
            return _normed(self.model, tail(self.model, self.indices[k - 1], x, tokens))

        return resume


# Choosing the features


def obstacle(model: Any) -> str | None:
    """Why the model cannot give maps at all, or None."""
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "forward_head"):
        return "this class has no forward_intermediates in timm"
    if len(getattr(model, "feature_info", ())) == 0:
        return "this class has no feature_info in timm"
    for module in model.modules():
        if isinstance(module, (PatchDropout, PatchDropoutWithIndices)) and module.prob > 0:
            return "it drops patches in training (patch_drop_rate), so its tokens form no map"
    return None


def _gives_prefix(model: Any) -> bool:
    """Whether timm can give the class and register tokens beside each map."""
    call = getattr(model, "forward_intermediates", _gives_prefix)
    wanted = "return_prefix_tokens" in inspect.signature(call).parameters
    return wanted and getattr(model, "num_prefix_tokens", 0) > 0  # some fail when asked for none


def _choose(model: Any, name: str, cuts: Sequence[int] | None) -> tuple[tuple[int, ...], str | None]:
    """Four of timm's features, and why there are not four, if so."""
    depth = len(model.feature_info)
    plain = len({f["reduction"] for f in model.feature_info}) == 1
    if cuts is not None:
        if not plain:
            raise ValueError(f"cuts={list(cuts)}: {name} has stages of its own, only a plain model is cut.")
        rising = list(cuts) == sorted(set(cuts))
        if len(cuts) != 4 or not rising or cuts[0] < 0 or cuts[-1] != depth - 1:
            raise ValueError(
                f"cuts={list(cuts)}: give four block indices from 0, increasing, the last {depth - 1}, "
                f"the last of {name}'s {depth} blocks. Quarters are {list(_quarters(depth))}."
            )
        return tuple(cuts), None
    if depth < 4:
        return (), f"it has {depth} {'blocks' if plain else 'stages'}, four are needed"
    return (_quarters(depth) if plain else tuple(range(depth - 4, depth))), None


def _quarters(depth: int) -> tuple[int, ...]:
    return tuple(i * depth // 4 - 1 for i in (1, 2, 3, 4))


def _refuse(name: str, model: nn.Module, reason: str) -> str:
    return (
        f"{name} ({type(model).__name__}) gives no stage maps: {reason}.\n"
        "Logit methods (ce, kd) work with it; feature methods need a model with four stages or blocks and "
        "timm's forward_intermediates: ResNet, EfficientNet, ConvNeXt, Swin, ViT, DeiT, BEiT, EVA, Mixer, ..."
    )


# Calling the model


def _one_logit_tensor(logits: Any) -> Tensor:
    """A distilled DeiT in training gives two predictions; their mean is what it gives in evaluation."""
    if isinstance(logits, tuple) and len(logits) == 2 and logits[0].shape == logits[1].shape:
        logits = (logits[0] + logits[1]) / 2
    _expect(isinstance(logits, Tensor), f"it returns a {type(logits).__name__}, not logits")
    return logits


def _final_map(model: Any, x: Tensor, grid: Sequence[int]) -> Tensor:
    """What the head is given, as `(B, D, H, W)`. timm has it as NCHW, as NHWC or as tokens."""
    _expect(isinstance(x, Tensor), "its features are not one tensor")
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else x
    elif hasattr(model, "reroll"):  # Hiera keeps its tokens by window, not by row
        x = model.reroll(x, len(model.blocks) - 1).permute(0, 3, 1, 2)
    else:
        extra = x.shape[1] - grid[0] * grid[1]
        _expect(x.ndim == 3 and extra in (getattr(model, "num_prefix_tokens", 0), 1), "its tokens fit no grid")
        x = to_map(x, extra, grid)  # 1: VOLO adds a class token at the end and does not say so
    _expect(x.shape[-2:] == grid, "its features have another grid than its last stage")
    return x


def _head(model: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor] | None]:
    """The logits, what the classifier was given for them, and the classifier. The latter two are None for a model
    whose logits are not, as they stand, what one module gave: one with two heads, or with a head on every token."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(classifier, nn.Module):
        return _one_logit_tensor(model.forward_head(x)), None, None
    calls: list[tuple[Any, Any]] = []
    hook = classifier.register_forward_hook(lambda _, given, result: calls.append((given[0], result)))
    try:
        logits = _one_logit_tensor(model.forward_head(x))
    finally:
        hook.remove()
    if len(calls) != 1 or calls[0][1] is not logits or calls[0][0].ndim != 2:
        return logits, None, None
    return logits, calls[0][0], classifier


def _normed(model: Any, x: Tensor) -> Tensor:
    """`(B, D, H, W)` through the layer norm that the model applies after pooling, if it has one there."""
    norm = getattr(model, "fc_norm", None) or getattr(getattr(model, "head", None), "norm", None)
    if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (x.shape[1],):
        return x  # none, or one over something else than the channels of a position
    if isinstance(norm, (LayerNorm2d, LayerNorm2dFp32)):
        return norm(x)
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _try_on_copy(model: nn.Module, size: tuple[int, ...], call: Callable) -> Any:
    """`call(copy of the model, zeros)` in eval mode, or the exception it ends with.

    The copy has modules of its own and shares the tensors, so neither training flags nor what some models
    cache in eval mode reach the model. A large model is copied to the meta device, where a forward pass
    costs nothing; if it computes with values, which meta tensors lack, it is run after all.
    """
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
    large = sum(t.numel() for t in tensors) > LARGE
    error: Exception | None = None
    for device in ("meta", like.device) if large else (like.device,):
        memo = {id(t): _move(t, device) for t in tensors}
        try:
            twin = copy.deepcopy(model, memo).eval()
            with torch.no_grad():
                return call(twin, torch.zeros(size, dtype=like.dtype, device=device))
        except Exception as problem:  # whatever it is, the message goes to the user
            error = problem
    return error


def _move(tensor: Tensor, device: torch.device | str) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")
