"""Building timm models, and proving that their weights were loaded."""

from __future__ import annotations

import hashlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import nn

from .config import Model
from .distiller import Statistics, default_statistics
from .errors import UserError, first_line, nearest


@dataclass(frozen=True)
class Loaded:
    """What is known of a model and its weights."""

    kwargs: dict[str, Any]  # what `timm.create_model` was given beside the name
    source: str  # "pretrained (...)", a path, or "random"
    sha256: str | None  # of the file, if one was read
    matched: int  # tensors filled from the source
    total: int  # tensors of the model
    initial: float  # share of biases and norm weights still exactly at their initial 0 or 1


def build_model(
    spec: Model, *, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """`timm.create_model` with the recipe's keyword arguments, weights checked.

    classes: the width of the head; None keeps the one that the pre-trained weights came with.
    Raises `UserError`, naming `where` (student or teacher), for unknown arguments and for weights that do not fit.
    """
    if spec.kwargs.get("in_chans", channels) != channels:
        raise UserError(f"{where}.kwargs: in_chans is data.channels, which is {channels}; leave it out")
    if where == "student" and spec.kwargs.get("num_classes", classes) != classes:
        raise UserError(f"{where}.kwargs: num_classes is that of the data, which is {classes}; leave it out")
    kwargs: dict[str, Any] = (
        {"in_chans": channels} | ({} if classes is None else {"num_classes": classes}) | spec.kwargs
    )
    pretrained = spec.weights == "pretrained"
    if pretrained and not timm.models.is_model_pretrained(spec.model):
        tags = timm.list_pretrained(spec.model.split(".")[0] + ".*")
        raise UserError(
            f"{where}.weights: timm has no pre-trained weights for {spec.model}."
            + (nearest(spec.model, tags) if tags else " Give a file, or another model.")
        )
    model, kwargs = _create(spec.model, image_size, pretrained, kwargs, where)
    total = len(model.state_dict())
    if spec.weights in (None, "random"):
        return model, Loaded(kwargs, "random", None, 0, total, initial_share(model))
    if pretrained:
        tag = getattr(model, "pretrained_cfg", {}).get("tag", "")
        return model, Loaded(kwargs, f"pretrained ({tag})", None, total, total, initial_share(model))
    path = resolve(str(spec.weights))
    matched = load_weights(model, path, where)
    return model, Loaded(kwargs, str(spec.weights), sha256_of(path), matched, total, initial_share(model))


def resolve(weights: str) -> Path:
    """A path; `package:demo/teacher.safetensors` is the file that comes with scalekd."""
    if weights.startswith("package:"):
        return Path(__file__).parent / weights.removeprefix("package:")
    return Path(weights).expanduser()


def _create(
    name: str, image_size: tuple[int, int], pretrained: bool, kwargs: dict[str, Any], where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the keyword arguments that it was made with."""

    def create(given: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(name, pretrained=pretrained, **given), given

    try:
        try:
            return create({"img_size": image_size} | kwargs)  # transformers and MLPs are built for one size
        except TypeError as error:
            if "img_size" not in str(error) or "img_size" in kwargs:
                raise
            return create(kwargs)
    except TypeError as error:
        raise UserError(f"{where}.kwargs: {name} does not take them: {error}") from None
    except Exception as error:  # whatever timm ends with, given such arguments
        if pretrained and isinstance(error, (OSError, RuntimeError)):
            raise UserError(
                f"{where}: the pre-trained weights of {name} could not be loaded: {first_line(error)}\n"
                f"Without a network, give the file: {where}.weights=/path/to/model.safetensors"
            ) from None
        raise UserError(
            f"{where}: timm cannot build {name} with {kwargs} at {image_size}: {first_line(error)}"
        ) from None


def load_weights(model: nn.Module, path: Path, where: str) -> int:
    """Fills every tensor of `model` from a .safetensors or torch file; returns how many.

    timm's own filter for the family is applied (other key names, position tables of another size).
    Nothing may be missing or left over. Runs no code from the file.
    """
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{where}.weights: no file {path}.{nearest(path.name, beside) if beside else ''}")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}.weights: {path} cannot be read as weights: {first_line(error)}") from None
    except Exception as error:  # pickle refuses what is not plain tensors with an error class of its own
        raise UserError(
            f"{where}.weights: {path} holds more than plain tensors and is not opened: {first_line(error)}"
        ) from None
    if not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise UserError(f"{where}.weights: {path} holds no named tensors")
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    wanted = model.state_dict()
    if adapt is not None and {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in wanted.items()}:
        state = adapt(dict(state), model)
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    other = [k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape]
    if missing or extra or other:
        raise UserError(
            f"{where}.weights: {path} does not fit {where}.model and its kwargs: "
            + "; ".join(
                part
                for part in (
                    f"{len(missing)} missing ({', '.join(missing[:3])})" if missing else "",
                    f"{len(extra)} left over ({', '.join(extra[:3])})" if extra else "",
                    _shape_differences(other, wanted, state),
                )
                if part
            )
            + ".\nGive the model name, kwargs and class count that the weights were made with."
        )
    model.load_state_dict(state)
    return len(wanted)


def _shape_differences(names: list[str], wanted: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> str:
    return ", ".join(
        f"{k} is {tuple(state[k].shape)} in the file, {tuple(wanted[k].shape)} in the model" for k in sorted(names)[:2]
    )


def initial_share(model: nn.Module) -> float:
    """Share of one-dimensional parameters that hold only zeros or only ones, as timm initialises biases and norms.

    Trained models have next to none; freshly built ones nearly all.
    """
    flat = [p.detach() for p in model.parameters() if p.ndim == 1 and p.numel() > 1]
    constant = sum(bool((p == 0).all() or (p == 1).all()) for p in flat)
    return constant / max(1, len(flat))


def statistics(model: nn.Module, spec: Model, channels: int, where: str) -> Statistics:
    """(mean, std) of the model's input for pixels in [0, 1], one value per channel: the recipe's, else timm's own."""
    mean, std = default_statistics(model)
    chosen = (spec.mean or mean, spec.std or std)
    for name, values in zip(("mean", "std"), chosen):
        if len(values) != channels:
            raise UserError(f"{where}.{name}: {len(values)} values for data.channels={channels}")
    return chosen


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
