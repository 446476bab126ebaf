"""Feature pyramid of any timm backbone: four maps at the strides 4, 8, 16 and 32 for a detector or segmenter.

It uses timm's `forward_intermediates`. `StageView` does not fit: it gives four maps of one stride for a plain ViT, and
runs the classifier. timm's `features_only` does not fit either: it builds a new model from a name, and here the model
has its weights already.
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
from scalekd.models.unfilled import unfilled

STRIDES = (4, 8, 16, 32)
Size = tuple[int, int]  # height, width in pixels


@functools.cache
def any_size_kwargs(name: str) -> dict[str, Any]:
    """Arguments of `timm.create_model(name, ...)` that make the model accept images of any size; {} if there are none.

    `dynamic_img_size` resamples the position embedding to the image; `strict_img_size=False` lets windows cover any
    grid. A CNN needs no argument; a Mixer has none.
    """
    kwargs: dict[str, Any]
    for kwargs in ({"dynamic_img_size": True}, {"strict_img_size": False}):
        try:
            with unfilled():  # no memory and no initialisation
                timm.create_model(name, **kwargs)
            return kwargs
        except TypeError:
            continue
    return {}


class Pyramid(nn.Module):
    """x `(B, C, H, W)`, normalised, to four maps `(B, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))`, or to
    three of them from stride 8 on.

    - A model with maps of all four strides (CNN, Swin, ConvNeXt) uses its own, the last of each stride.
    - A model with dilated stages ends at stride 8 or 16 (a CNN with `output_stride`). It uses its own maps as far as
      they go; the coarser ones are max pooled from the last.
    - Any other model (ViT, Mixer) gets the simple feature pyramid of ViTDet on its last map: `SimplePyramid`.

    Without batch norm, maps come from a residual stream that is not normalised, so each gets a new layer norm, as in
    the detectors of Swin and ConvNeXt. The model's last norm and its classifier are dropped. Parameters that no map
    depends on are frozen, so every trainable parameter gets a gradient, which DDP requires.

    An image is padded with zeros at the bottom and on the right to the next size that the model accepts, and the maps
    are cropped. `canvas` is the input size of a fixed-size model, else None. `any_size_kwargs` gives the arguments
    that make a ViT or Swin accept any size.

    Args:
        model: a timm model; it is pruned in place and becomes `.backbone`.
        image_size: (height, width) in pixels that it was built for.
        finest: the stride of the first map, 4 or 8. What only a finer map would need is not built.

    Raises:
        UserError: if the model gives no maps.
    """

    def __init__(self, model: nn.Module, image_size: Size, finest: int = STRIDES[0]):
        super().__init__()
        reductions = _reductions(model)
        found = [stride for stride in STRIDES if stride in reductions]
        # the model's own maps are used if they start at stride 4 and end with its last map
        own = found == [*STRIDES[: len(found)]] and reductions[-1:] == found[-1:]
        wanted = found if own else reductions[-1:]
        self.indices = [max(i for i, r in enumerate(reductions) if r == stride) for stride in wanted]
        self.unit = wanted[-1]
        self.canvas: Size | None = None
        self.backbone: Any
        self.backbone = model
        self.backbone.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

        shapes, unused = self._try_size(*image_size)
        _expect_grids(model, shapes, image_size, wanted)
        try:
            self._try_size(image_size[0] + self.unit, image_size[1] + 2 * self.unit)
        except UserError:
            self.canvas = image_size
        for name, parameter in model.named_parameters():
            if name in unused:
                parameter.requires_grad_(False)

        normed = any(isinstance(module, _BatchNorm) for module in model.modules())
        widths = [shape[1] for shape in shapes]
        self.strides: list[int] = [stride for stride in STRIDES if stride >= finest]
        needed = [not own or stride >= finest or stride == self.unit for stride in wanted]  # the last map is pooled
        self.norms = nn.ModuleList(
            LayerNorm2d(width) if need and not normed else nn.Identity() for width, need in zip(widths, needed)
        )
        self.simple = None if own else SimplePyramid(widths[0], self.unit, self.strides)
        self.pooled = STRIDES[len(wanted) :] if own else ()
        self.channels: list[int] = (
            [*widths, *[widths[-1]] * len(self.pooled)][-len(self.strides) :]
            if self.simple is None
            else self.simple.channels
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Raises `UserError` for an image that is larger than `canvas`."""
        height, width = x.shape[-2:]
        maps = _maps(self.backbone, self.indices, self._padded(x))
        maps = [norm(m) for norm, m in zip(self.norms, maps)]
        if self.simple is not None:
            maps = self.simple(maps[0])
        maps += [F.max_pool2d(maps[-1], stride // self.unit, ceil_mode=True) for stride in self.pooled]
        maps = maps[-len(self.strides) :]
        return [m[..., : -(-height // s), : -(-width // s)] for m, s in zip(maps, self.strides)]

    def _padded(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.canvas is None:
            new = (-(-height // self.unit) * self.unit, -(-width // self.unit) * self.unit)
        elif height <= self.canvas[0] and width <= self.canvas[1]:
            new = self.canvas
        else:
            raise UserError(
                f"{type(self.backbone).__name__} only accepts {self.canvas[0]}x{self.canvas[1]} pixels, not "
                f"{height}x{width}; resize the images, or use a backbone that accepts any size"
            )
        return F.pad(x, (0, new[1] - width, 0, new[0] - height)) if new != (height, width) else x

    def _try_size(self, height: int, width: int) -> tuple[list[torch.Size], set[str]]:
        """The shapes of the backbone's maps, and the names of its parameters that no map depends on.

        Runs a copy on the meta device, which is nearly free, or on the CPU if the model needs values. Raises
        `UserError` if both fail.
        """
        error: Exception | None = None
        for device in ("meta", "cpu"):
            tensors = itertools.chain(self.backbone.parameters(), self.backbone.buffers())
            twin = copy.deepcopy(self.backbone, {id(t): _moved(t, device) for t in tensors}).eval()
            parameters = dict(twin.named_parameters())
            like = next(iter(parameters.values()))
            images = torch.zeros(1, input_channels(twin), height, width, dtype=like.dtype, device=device)
            try:
                with torch.inference_mode(False), torch.enable_grad():  # the caller may be in no_grad
                    maps = _maps(twin, self.indices, images)
                    grads = torch.autograd.grad(
                        torch.stack([m.sum() for m in maps]).sum(), list(parameters.values()), allow_unused=True
                    )
                return [m.shape for m in maps], {name for name, grad in zip(parameters, grads) if grad is None}
            except Exception as problem:  # models raise any type; the message goes to the user
                error = problem
        assert error is not None
        raise UserError(
            f"{type(self.backbone).__name__} gives no maps at {height}x{width}: {first_line(error)}"
        ) from None


class SimplePyramid(nn.Module):
    """One map `(B, D, h, w)` of stride `patch` to maps of `strides`, of 4, 8, 16, 32 (ViTDet, arXiv:2203.16527).

    Transposed convolutions of stride 2 double the grid and halve the width, with layer norm and GELU between them;
    max pooling halves the grid. If `patch` is not a power of two, the map is first resampled to the nearest one.
    `channels`: D, halved once for each doubling of the grid.
    """

    def __init__(self, width: int, patch: int, strides: Sequence[int] = STRIDES):
        super().__init__()
        self.patch = patch
        self.stride = _nearest_power_of_two(patch)
        self.levels = nn.ModuleList(_level(width, self.stride, s) for s in strides)
        self.channels = [width // max(1, self.stride // s) for s in strides]

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.stride != self.patch:
            # the exact ratio preserves positions; the repeated edge keeps the last rows and columns
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
    """The stride of each of timm's features, first to last. Raises `UserError` if the model cannot be a backbone."""
    reason = obstacle(model)
    if reason is None and not hasattr(model, "prune_intermediate_layers"):
        reason = "its class has no prune_intermediate_layers in timm"
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
                f"{type(model).__name__} cannot be a backbone: it gives a map {tuple(shape)} for {size[0]}x{size[1]} "
                f"pixels, which is not stride {stride}"
            )


def _moved(tensor: Tensor, device: str) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved) if isinstance(tensor, nn.Parameter) and moved.is_floating_point() else moved
