"""Creates timm models, loads their weights and checks that they fit."""

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

from . import added  # noqa: F401 - adds models to timm
from .embedding_head import without_head
from .licences import UNKNOWN, licence_of
from .options import Model
from .weights.folder import beside
from .weights.match import (
    State,
    adapted,
    as_prefix,
    briefly,
    classifier,
    find_prefix,
    grouped,
    load_weights,
    other_classes,
    read_weights,
    sha256_of,
    under,
    without_classifier,
)
from .weights.trained import Loaded, backbone_sha256, initial_share, noise_share


class Filled(NamedTuple):
    """Where a model's weights came from, and which tensors they did not fill."""

    source: str
    sha256: str | None  # of the file
    theirs: int | None  # classes of the source's head
    new: State  # tensors of the model that are not in the source
    prefix: str = ""  # in front of the model's tensor names in the file
    unused: Collection[str] = ()  # tensors of the file that the model does not use
    exported: bool = False  # by scalekd, according to the card next to it
    counters: Collection[str] = ()  # of batch norms, which the file does not have and the model does not need
    licence: str = UNKNOWN  # of the source


def build_plain(
    spec: Model, *, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """`build_model` for a model without `spec.head`."""
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
            f"{where}.kwargs: num_classes would replace the trained head for {filled.theirs} classes with an untrained one; "
            "remove it"
        )
    total = len(model.state_dict())
    old = f"instead of {filled.theirs}" if filled.theirs else "the file has none"
    keys = {
        "matched": model.state_dict().keys() - filled.new.keys() - set(filled.counters),
        "missing": {*filled.new, *filled.counters},
        "unexpected": filled.unused,
    }
    loaded = Loaded(
        kwargs,
        filled.source,
        filled.sha256,
        total - len(filled.new) - len(filled.counters),
        total,
        initial_share(model),
        f"new head for {kwargs['num_classes']} classes ({old})" if filled.new else None,
        filled.prefix,
        {kind: grouped(names) for kind, names in keys.items()},
        noise_share(model),
        filled.exported,
        filled.licence,
    )
    return model, loaded if filled.sha256 else replace(loaded, sha256=backbone_sha256(model, loaded))


def _keyword_arguments(spec: Model, channels: int, classes: int | None, where: str) -> dict[str, Any]:
    """Keyword arguments for `timm.create_model`. Raises `UserError` for conflicting options."""
    if spec.kwargs.get("in_chans", channels) != channels:
        raise UserError(f"{where}.kwargs: in_chans must be data.channels, which is {channels}; remove it")
    if where == "student" and spec.kwargs.get("num_classes", classes) != classes:
        needed = f"the data's {classes}" if classes else "0, because no loss uses the student's logits"
        raise UserError(f"{where}.kwargs: num_classes must be {needed}; remove it")
    if spec.prefix is not None and spec.weights in (None, "random", "pretrained"):
        raise UserError(f"{where}.prefix has no effect without a file in {where}.weights; remove it")
    if spec.weights == "pretrained" and not timm.models.is_model_pretrained(spec.model):
        tags = timm.list_pretrained(spec.model.split(".")[0] + ".*")
        raise UserError(
            f"{where}.weights: timm has no pre-trained weights for {spec.model}."
            + (nearest(spec.model, tags) if tags else " Choose another model, or a file.")
        )
    return {"in_chans": channels} | ({} if classes is None else {"num_classes": classes}) | spec.kwargs


def _filled_by_timm(model: nn.Module) -> Filled:
    cfg = getattr(model, "pretrained_cfg", {})
    theirs = cfg.get("num_classes")
    # timm does not load the head if the number of classes differs
    new = classifier(model) if getattr(model, "num_classes", theirs) != theirs else {}
    return Filled(f"pretrained ({cfg.get('tag', '')})", None, theirs, new, licence=licence_of(cfg))


def _filled_by_file(
    model: nn.Module,
    spec: Model,
    image_size: tuple[int, int],
    classes: int | None,
    kwargs: dict[str, Any],
    where: str,
) -> tuple[nn.Module, dict[str, Any], Filled]:
    """Loads the weights of a file. Returns the model, its keyword arguments and what was loaded.

    A teacher is created again with the number of classes of the file.
    """
    path = resolve(str(spec.weights))
    flat = without_head(read_weights(path, where))
    sha256 = sha256_of(path)
    exported = _is_exported(path, sha256, where)
    prefix = find_prefix(model, flat, path, where) if spec.prefix is None else as_prefix(spec.prefix, flat)
    read = under(prefix, flat)
    if not read:
        raise UserError(f"{where}.prefix: no tensor in {path} begins with {prefix}; it has {briefly(flat)}")
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
    counters = {key for key in state.keys() - read.keys() if key.endswith("num_batches_tracked")}
    renamed = (
        state.keys() - read.keys() - counters
    )  # by timm's filter, so the names do not show which tensors it dropped
    used = {prefix + key for key in (read if renamed else state).keys() - new.keys()}
    unused = flat.keys() - used
    described = beside(path)
    licence = described.licence if described else UNKNOWN
    return model, kwargs, Filled(str(spec.weights), sha256, theirs, new, prefix, unused, exported, counters, licence)


def _adapted(read: State, model: nn.Module, path: Path, size: tuple[int, int], where: str) -> State:
    try:
        return adapted(read, model)
    except Exception as error:  # timm's filters raise anything on files they do not know
        raise UserError(
            f"{where}.weights: {path} does not fit a {type(model).__name__} for {size[0]}x{size[1]} pixels with these "
            f"{where}.kwargs: {first_line(error)}. Check the patch size, depth and widths in kwargs, and the image size"
        ) from None


def resolve(weights: str) -> Path:
    """The path of a weights file. `package:demo/teacher.safetensors` is a file shipped with scalekd."""
    if weights.startswith("package:"):
        return Path(__file__).parents[1] / weights.removeprefix("package:")
    try:
        return Path(weights).expanduser()
    except RuntimeError:  # ~ of an unknown user
        return Path(weights)


def create(
    name: str, image_size: tuple[int, int], pretrained: bool, kwargs: dict[str, Any], where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """`timm.create_model`. Returns the model and the keyword arguments it was created with. Raises `UserError`.

    `img_size` is passed only to models that accept it.
    """

    def call(given: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(name, pretrained=pretrained, **given), given

    try:
        try:
            return call({"img_size": image_size} | kwargs)  # transformers and MLPs are built for one image size
        except TypeError as error:
            if "img_size" not in str(error) or "img_size" in kwargs:
                raise
            return call(kwargs)
    except TypeError as error:
        raise UserError(f"{where}.kwargs: {name} does not accept them: {error}") from None
    except ImportError as error:  # of transformers
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # timm raises anything on wrong arguments
        if pretrained and isinstance(error, (OSError, RuntimeError)):
            raise UserError(
                f"{where}: cannot load the pre-trained weights of {name}: {first_line(error)}\n"
                f"Without network access, set {where}.weights=/path/to/model.safetensors"
            ) from None
        shown = {key: value for key, value in kwargs.items() if key != "config"}  # that of transformers is long
        raise UserError(
            f"{where}: timm cannot create {name} with {shown} at {image_size[0]}x{image_size[1]} pixels: {first_line(error)}"
        ) from None


def _is_exported(path: Path, sha256: str, where: str) -> bool:
    """Whether the card next to the file says that scalekd exported it. Raises `UserError` if the sha256 differs."""
    card = beside(path)
    if card and card.sha256 and card.sha256 != sha256:
        raise UserError(
            f"{where}.weights: {path} does not match the sha256 in the card next to it. "
            f"Export both again (`scalekd export {in_shell(path.parent)}`), or move the file to another folder"
        )
    return card is not None and card.sha256 == sha256
