"""Linear classifiers in a file of their own, as Meta publishes for DINOv2 and DINOv3, on their timm backbone.

They read the class token and the mean of the patch tokens, one after the other; timm's models pool one of the two.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.common.files import is_file

from .create import build_plain, resolve
from .options import Model
from .weights.file import read_file
from .weights.match import sha256_of
from .weights.trained import Loaded


def build_with_published_head(
    spec: Model, *, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """`build_model` with the classifier in the file `spec.head`.

    The width of its input says what it reads: D, what the backbone pools; 2 D, the class token and the mean of the patch
    tokens, both after the final norm. Raises `UserError` for another width, another number of classes, and a backbone
    without weights.
    """
    path = resolve(str(spec.head))
    if is_file(path.with_name("head.json")):
        raise UserError(f"{where}.head: {path} belongs to a fitted head; name its folder, {where}.head={path.parent}")
    weight, bias = read_linear(path, where)
    count = len(weight)
    if classes not in (None, count):
        raise UserError(f"{where}.head: {path.name} has {count} classes and the data {classes}")
    if spec.kwargs.get("num_classes", 0) not in (0, count):
        raise UserError(f"{where}.kwargs: num_classes must be {count}, as in {path.name}; remove it")
    kwargs = {key: value for key, value in spec.kwargs.items() if key != "num_classes"}
    backbone = spec.model_copy(update={"head": None, "kwargs": kwargs})
    model, loaded = build_plain(backbone, channels=channels, image_size=image_size, classes=0, where=where)
    if loaded.source == "random":
        raise UserError(
            f"{where}.head: it needs the weights of its backbone; set {where}.weights to `pretrained` or a file"
        )
    reads = _fit_pooling(model, weight.shape[1], spec.model, path, where)
    model.head = nn.Linear(weight.shape[1], count)
    model.num_classes = count  # type: ignore[assignment]
    model.head.load_state_dict({"weight": weight, "bias": bias})
    text = f"head {path.name} (sha256 {sha256_of(path)[:12]}) for {count} classes, on {reads}"
    return model, replace(loaded, head=text)


def read_linear(path: Path, where: str) -> tuple[Tensor, Tensor]:
    """The weight (C, D) and the bias (C,) of the single linear layer in a file. Raises `UserError`."""
    try:
        contents = read_file(path)
    except UserError as error:
        raise UserError(f"{where}.head: {error}") from None
    tensors = {str(name).rpartition(".")[2]: tensor for name, tensor in contents.items() if isinstance(tensor, Tensor)}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    fits = weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]
    if not fits or len(contents) != 2:
        raise UserError(
            f"{where}.head: {path} is not one linear layer: it needs a weight (C, D) and a bias (C,), and nothing else. "
            "For a classifier of your own, name the folder that `scalekd head` wrote"
        )
    assert weight is not None and bias is not None
    return weight.float(), bias.float()


def _fit_pooling(model: Any, width: int, name: str, path: Path, where: str) -> str:
    """Makes the backbone pool what a classifier of this input width reads, and says what that is. Raises `UserError`."""
    if not hasattr(model, "pool") or not isinstance(getattr(model, "fc_norm", None), nn.Identity):
        raise UserError(
            f"{where}.head: a file works with timm's ViTs that normalise their tokens before pooling, such as DINOv2 and "
            f"DINOv3, and {name} is another model; fit a classifier with `scalekd head`"
        )
    channels = model.num_features
    if width == channels:
        return "what the backbone pools"
    if width == 2 * channels and model.num_prefix_tokens:
        model.pool = MethodType(token_and_mean, model)
        return "the class token and the mean of the patch tokens"
    if width == 5 * channels:
        raise UserError(
            f"{where}.head: {path.name} reads the class tokens of the last four blocks, which is not supported; use the "
            "classifier of one layer (DINOv2: `linear_head`, not `linear4_head`)"
        )
    raise UserError(
        f"{where}.head: {path.name} reads {width} numbers; {name} has {channels} channels, and with a class token a "
        f"classifier can read {channels} or {2 * channels}. Use the file that belongs to the backbone"
    )


def token_and_mean(model: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
    """In place of timm's `pool`: tokens (B, N, D) after the final norm to the class token and the patches' mean, (B, 2 D)."""
    return torch.cat([x[:, 0], x[:, model.num_prefix_tokens :].mean(dim=1)], dim=1)
