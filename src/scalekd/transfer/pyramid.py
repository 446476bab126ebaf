"""Any timm backbone as four maps at the strides 4, 8, 16 and 32: what a detector or segmenter stands on.

Built on timm's `forward_intermediates`. Not on `StageView`, which cuts a plain ViT in four maps of one stride and
runs the classifier, of which nothing is wanted here; nor on timm's `features_only`, which builds the model anew
from its name, while here it comes with its weights.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from scalekd.common.errors import UserError, first_line
from scalekd.models.inputs import input_channels
from scalekd.models.stages import obstacle

STRIDES = (4, 8, 16, 32)
Size = tuple[int, int]  # height, width in pixels


@functools.cache
def any_size_kwargs(name: str) -> dict[str, Any]:
    """What `timm.create_model(name, ...)` needs so that the model takes images of any size; {} if nothing helps.

    `dynamic_img_size` resamples a table of positions to the image at hand; `strict_img_size=False` lets windows
    be laid over it. A CNN needs nothing, and for a Mixer there is nothing.
    """
    kwargs: dict[str, Any]
    for kwargs in ({"dynamic_img_size": True}, {"strict_img_size": False}):
        try:
            with torch.device("meta"):  # costs no memory, and no time for initial values
                timm.create_model(name, **kwargs)
            return kwargs
        except TypeError:
            continue
    return {}


class Pyramid(nn.Module):
    """x `(B, C, H, W)`, normalised, to four maps `(B, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))`.

    - A model that has maps of all four strides (CNN, Swin, ConvNeXt) gives its own, the last of each stride.
    - One whose stages are dilated ends at stride 8 or 16 (a CNN with `output_stride`): it gives its own as far as they
      go, and the coarser ones are the last, max pooled.
    - Any other (ViT, Mixer) gets the simple feature pyramid of ViTDet from its last map: `SimplePyramid`.

    Maps of a model without batch norm come from a residual stream that nothing has normalised; each gets a layer norm
    of its own, as in the detectors of Swin and ConvNeXt. The model's last norm and its classifier are dropped, and
    parameters that no map depends on are frozen, so that every trainable one gets a gradient (DDP waits for all).

    An image is padded with zeros, below and on the right, to the next size that the model takes; the maps are cropped.
    `canvas` is the one size of a model that takes no other, else None; `any_size_kwargs` is how a ViT or a Swin is
    built for more.

    model: a timm model; it is cut down in place, and is `.backbone` from then on.
    image_size: (height, width) in pixels that it was built for. Raises `UserError` for a model that gives no maps.
    """

    def __init__(self, model: nn.Module, image_size: Size):
        super().__init__()
        reductions = _reductions(model)
        finest = [stride for stride in STRIDES if stride in reductions]
        # its own maps, if they begin with the finest and end with its last
        own = finest == [*STRIDES[: len(finest)]] and reductions[-1:] == finest[-1:]
        wanted = finest if own else reductions[-1:]
        self.indices = [max(i for i, r in enumerate(reductions) if r == stride) for stride in wanted]
        self.unit = wanted[-1]
        self.canvas: Size | None = None
        self.backbone: Any
        self.backbone = model
        self.backbone.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

        shapes, unused = self._tried(*image_size)
        _expect_grids(model, shapes, image_size, wanted)
        try:
            self._tried(image_size[0] + self.unit, image_size[1] + 2 * self.unit)
        except UserError:
            self.canvas = image_size
        for name, parameter in model.named_parameters():
            if name in unused:
                parameter.requires_grad_(False)

        normed = any(isinstance(module, _BatchNorm) for module in model.modules())
        widths = [shape[1] for shape in shapes]
        self.norms = nn.ModuleList(nn.Identity() if normed else LayerNorm2d(width) for width in widths)
        self.simple = None if own else SimplePyramid(widths[0], self.unit)
        self.pooled = STRIDES[len(wanted) :] if own else ()
        self.channels: list[int] = (
            widths + [widths[-1]] * len(self.pooled) if self.simple is None else self.simple.channels
        )
        self.strides: list[int] = list(STRIDES)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Raises `UserError` for an image that is larger than `canvas`."""
        height, width = x.shape[-2:]
        maps = _maps(self.backbone, self.indices, self._padded(x))
        maps = [norm(m) for norm, m in zip(self.norms, maps)]
        if self.simple is not None:
            maps = self.simple(maps[0])
        maps += [F.max_pool2d(maps[-1], stride // self.unit, ceil_mode=True) for stride in self.pooled]
        return [m[..., : -(-height // s), : -(-width // s)] for m, s in zip(maps, self.strides)]

    def _padded(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.canvas is None:
            new = (-(-height // self.unit) * self.unit, -(-width // self.unit) * self.unit)
        elif height <= self.canvas[0] and width <= self.canvas[1]:
            new = self.canvas
        else:
            raise UserError(
                f"{type(self.backbone).__name__} takes images of {self.canvas[0]}x{self.canvas[1]} pixels and no "
                f"others, and got {height}x{width}: resize to fit, or use a backbone that takes any size"
            )
        return F.pad(x, (0, new[1] - width, 0, new[0] - height)) if new != (height, width) else x

    def _tried(self, height: int, width: int) -> tuple[list[torch.Size], set[str]]:
        """The shapes of the backbone's maps, and the names of its parameters on which none depends.

        On a copy on the meta device, where a pass costs nothing; on the CPU for what computes with values.
        """
        error: Exception | None = None
        for device in ("meta", "cpu"):
            tensors = itertools.chain(self.backbone.parameters(), self.backbone.buffers())
            twin = copy.deepcopy(self.backbone, {id(t): _moved(t, device) for t in tensors}).eval()
            parameters = dict(twin.named_parameters())
            like = next(iter(parameters.values()))
            images = torch.zeros(1, input_channels(twin), height, width, dtype=like.dtype, device=device)
            try:
                with torch.inference_mode(False), torch.enable_grad():  # a model may be loaded within no_grad
                    maps = _maps(twin, self.indices, images)
                    grads = torch.autograd.grad(
                        torch.stack([m.sum() for m in maps]).sum(), list(parameters.values()), allow_unused=True
                    )
                return [m.shape for m in maps], {name for name, grad in zip(parameters, grads) if grad is None}
            except Exception as problem:  # whatever it is, the message goes to the user
                error = problem
        assert error is not None
        raise UserError(
            f"{type(self.backbone).__name__} gives no maps at {height}x{width}: {first_line(error)}"
        ) from None


class SimplePyramid(nn.Module):
    """One map `(B, D, h, w)` of stride `patch` to four of the strides 4, 8, 16, 32 (ViTDet, arXiv:2203.16527).

    A transposed convolution of stride 2 doubles the grid and halves the width, with layer norm and GELU between two;
    max pooling halves the grid. A patch that is no power of two has its map resampled to the nearest one first.
    `channels`: D, halved once for each doubling.
    """

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.patch = patch
        self.stride = _nearest_power_of_two(patch)
        self.levels = nn.ModuleList(_level(width, self.stride, s) for s in STRIDES)
        self.channels = [width // max(1, self.stride // s) for s in STRIDES]

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.stride != self.patch:
            # by the exact ratio, so that places stay where they are; the edge is repeated so that none is lost
            x = F.pad(x, (0, 2, 0, 2), mode="replicate")
            ratio = self.patch / self.stride
            x = F.interpolate(x, scale_factor=ratio, mode="bilinear", recompute_scale_factor=False)
        return [level(x) for level in self.levels]


def _level(width: int, have: int, want: int) -> nn.Module:
    if have <= want:
        return nn.MaxPool2d(want // have, ceil_mode=True) if have < want else nn.Identity()
    steps: list[nn.Module] = []
    while have > want:
        steps += [LayerNorm2d(width), nn.GELU()] if steps else []
        steps.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        have, width = have // 2, width // 2
    return nn.Sequential(*steps)


def _nearest_power_of_two(patch: int) -> int:
    return min((2**k for k in range(9)), key=lambda power: (abs(power - patch), power))


def _reductions(model: nn.Module) -> list[int]:
    """The stride of each of timm's features, first to last. Raises `UserError`."""
    reason = obstacle(model)
    if reason is None and not hasattr(model, "prune_intermediate_layers"):
        reason = "this class has no prune_intermediate_layers in timm"
    if reason is not None:
        raise UserError(
            f"{type(model).__name__} cannot be a backbone: {reason}.\n"
            "Use a ResNet, EfficientNet, ConvNeXt, Swin, ViT, DeiT, BEiT, EVA, Mixer, ..."
        )
    return [info["reduction"] for info in model.feature_info]  # type: ignore[union-attr]


def _maps(model: Any, indices: Sequence[int], x: Tensor) -> list[Tensor]:
    return list(model.forward_intermediates(x, indices=list(indices), output_fmt="NCHW", intermediates_only=True))


def _expect_grids(model: nn.Module, shapes: Sequence[torch.Size], size: Size, strides: Sequence[int]) -> None:
    for shape, stride in zip(shapes, strides):
        whole = {tuple(side // stride for side in size), tuple(-(-side // stride) for side in size)}
        if len(shape) != 4 or tuple(shape[-2:]) not in whole:
            raise UserError(
                f"{type(model).__name__} gives a map {tuple(shape)} for {size[0]}x{size[1]} pixels, where stride "
                f"{stride} was expected: it cannot be a backbone"
            )


def _moved(tensor: Tensor, device: str) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved) if isinstance(tensor, nn.Parameter) and moved.is_floating_point() else moved
