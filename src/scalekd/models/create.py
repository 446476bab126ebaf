"""Creates timm models and checks that their weights were loaded."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import nn

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.text import in_shell

from . import mixer  # noqa: F401 - adds a name to timm's
from .options import Model
from .weights.folder import beside
from .weights.match import (
    State,
    adapted,
    as_prefix,
    classifier,
    find_prefix,
    grouped,
    load_weights,
    other_classes,
    read_weights,
    sha256_of,
    told_briefly,
    under,
    without_classifier,
)
from .weights.trained import Loaded, backbone_sha256, initial_share, noise_share


class Filled(NamedTuple):
    """Where a model's weights came from, and what they did not fill."""

    source: str
    sha256: str | None  # of the file
    theirs: int | None  # classes of the source's head
    new: State  # tensors of the model that the source has no values for
    prefix: str = ""  # before the model's names in the file
    unused: Collection[str] = ()  # tensors of the file that the model has no use for
    exported: bool = False  # by scalekd, with its card beside it


def build_plain(
    spec: Model, *, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """`build_model` for a model without a head that `scalekd head` fitted."""
    kwargs = _keyword_arguments(spec, channels, classes, where)
    pretrained = spec.weights == "pretrained"
    model, kwargs = create(spec.model, image_size, pretrained, kwargs, where)
    if spec.weights in (None, "random"):
        return model, Loaded(kwargs, "random", None, 0, len(model.state_dict()), initial_share(model))
    if pretrained:
        filled = _filled_by_timm(model)
    else:
        model, kwargs, filled = _filled_by_file(model, spec, image_size, classes, kwargs, where)
    if filled.new and where != "student":
        raise UserError(
            f"teacher.kwargs: num_classes would give a head that was never trained in place of that for {filled.theirs} "
            "classes; leave it out"
        )
    total = len(model.state_dict())
    old = f"the old one was for {filled.theirs}" if filled.theirs else "they came without one"
    keys = {
        "matched": model.state_dict().keys() - filled.new.keys(),
        "missing": filled.new.keys(),
        "unexpected": filled.unused,
    }
    loaded = Loaded(
        kwargs,
        filled.source,
        filled.sha256,
        total - len(filled.new),
        total,
        initial_share(model),
        f"new head for {kwargs['num_classes']} classes, {old}" if filled.new else None,
        filled.prefix,
        {kind: grouped(names) for kind, names in keys.items()},
        noise_share(model),
        filled.exported,
    )
    return model, loaded if filled.sha256 else replace(loaded, sha256=backbone_sha256(model, loaded))


def _keyword_arguments(spec: Model, channels: int, classes: int | None, where: str) -> dict[str, Any]:
    """Those of `timm.create_model`. Raises `UserError` for options that cannot be right."""
    if spec.kwargs.get("in_chans", channels) != channels:
        raise UserError(f"{where}.kwargs: in_chans is data.channels, which is {channels}; leave it out")
    if where == "student" and spec.kwargs.get("num_classes", classes) != classes:
        needed = f"that of the data, which is {classes}" if classes else "0, as no loss reads the student's logits"
        raise UserError(f"{where}.kwargs: num_classes is {needed}; leave it out")
    if spec.prefix is not None and spec.weights in (None, "random", "pretrained"):
        raise UserError(f"{where}.prefix: has no effect here; it goes with {where}.weights in a file")
    if spec.weights == "pretrained" and not timm.models.is_model_pretrained(spec.model):
        tags = timm.list_pretrained(spec.model.split(".")[0] + ".*")
        raise UserError(
            f"{where}.weights: timm has no pre-trained weights for {spec.model}."
            + (nearest(spec.model, tags) if tags else " Give a file, or another model.")
        )
    return {"in_chans": channels} | ({} if classes is None else {"num_classes": classes}) | spec.kwargs


def _filled_by_timm(model: nn.Module) -> Filled:
    cfg = getattr(model, "pretrained_cfg", {})
    theirs = cfg.get("num_classes")
    # timm leaves the head out where the class count differs
    new = classifier(model) if getattr(model, "num_classes", theirs) != theirs else {}
    return Filled(f"pretrained ({cfg.get('tag', '')})", None, theirs, new)


def _filled_by_file(
    model: nn.Module,
    spec: Model,
    image_size: tuple[int, int],
    classes: int | None,
    kwargs: dict[str, Any],
    where: str,
) -> tuple[nn.Module, dict[str, Any], Filled]:
    """The model with the file's weights, and its keyword arguments: a teacher gets the file's number of classes."""
    path = resolve(str(spec.weights))
    flat = read_weights(path, where)
    sha256 = sha256_of(path)
    exported = _of_a_run(path, sha256, where)
    prefix = find_prefix(model, flat, path, where) if spec.prefix is None else as_prefix(spec.prefix, flat)
    read = under(prefix, flat)
    if not read:
        raise UserError(f"{where}.prefix: no tensor in {path} begins with {prefix}; they are {told_briefly(flat)}")
    state = _adapted(read, model, path, image_size, where)
    if classes == 0:
        state = without_classifier(state, model)
    theirs = other_classes(model, state)
    new: State = {}
    if theirs is not None and where == "student":
        new = classifier(model)
    elif theirs is not None and "num_classes" not in spec.kwargs:
        model, kwargs = create(spec.model, image_size, False, kwargs | {"num_classes": theirs}, where)
        state = _adapted(read, model, path, image_size, where)
    load_weights(model, state | new, path, where)
    renamed = state.keys() - read.keys()  # by timm's filter; then its names do not tell what it left out
    used = {prefix + key for key in (read if renamed else state).keys() - new.keys()}
    return model, kwargs, Filled(str(spec.weights), sha256, theirs, new, prefix, flat.keys() - used, exported)


def _adapted(read: State, model: nn.Module, path: Path, size: tuple[int, int], where: str) -> State:
    try:
        return adapted(read, model)
    except Exception as error:  # timm's filters end with whatever they meet
        raise UserError(
            f"{where}.weights: {path} does not go into a {type(model).__name__} for {size[0]}x{size[1]} pixels as "
            f"{where}.kwargs make it: {first_line(error)}. Its tokens, positions or widths are others, or that size is too small"
        ) from None


def resolve(weights: str) -> Path:
    """A path; `package:demo/teacher.safetensors` is the file that comes with scalekd."""
    if weights.startswith("package:"):
        return Path(__file__).parents[1] / weights.removeprefix("package:")
    try:
        return Path(weights).expanduser()
    except RuntimeError:  # ~ of nobody
        return Path(weights)


def create(
    name: str, image_size: tuple[int, int], pretrained: bool, kwargs: dict[str, Any], where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the keyword arguments that it was made with."""

    def made(given: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(name, pretrained=pretrained, **given), given

    try:
        try:
            return made({"img_size": image_size} | kwargs)  # transformers and MLPs are built for one size
        except TypeError as error:
            if "img_size" not in str(error) or "img_size" in kwargs:
                raise
            return made(kwargs)
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


def _of_a_run(path: Path, sha256: str, where: str) -> bool:
    """Whether a card of scalekd's is beside it, of this file. Raises `UserError` if the card is of another one."""
    card = beside(path)
    if card and card.sha256 and card.sha256 != sha256:
        raise UserError(
            f"{where}.weights: {path} is not the file that the card beside it tells of: it has another sha256. "
            f"Make both anew (`scalekd export {in_shell(path.parent)}`), or take the file away from the card"
        )
    return card is not None and card.sha256 == sha256
