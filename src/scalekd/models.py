"""Building timm models, and proving that their weights were loaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from . import mixer  # noqa: F401 - adds a name to timm's
from .config import Model
from .distiller import Statistics, default_statistics
from .errors import UserError, first_line, nearest
from .head_card import read_head
from .loaded import Loaded, backbone_sha256
from .model_folders import beside
from .weights import (
    State,
    adapted,
    as_prefix,
    classifier,
    find_prefix,
    grouped,
    initial_share,
    load_weights,
    noise_share,
    other_classes,
    read_weights,
    sha256_of,
    told_briefly,
    under,
    without_classifier,
)


def build_model(
    spec: Model, *, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """`timm.create_model` with the recipe's keyword arguments, weights checked.

    classes: the width of the head; None keeps the one that the pre-trained weights came with. Weights of another
    class count: a student gets a new head, which `Loaded.head` says; a teacher keeps the head of its file, or is
    without one as the file is. `spec.head`: the classifier that `scalekd head` fitted.
    Raises `UserError`, naming `where` (student or teacher), for unknown arguments and for weights that do not fit.
    """
    if spec.head is not None:
        return _with_head(spec, channels, image_size, classes, where)
    if spec.kwargs.get("in_chans", channels) != channels:
        raise UserError(f"{where}.kwargs: in_chans is data.channels, which is {channels}; leave it out")
    if where == "student" and spec.kwargs.get("num_classes", classes) != classes:
        needed = f"that of the data, which is {classes}" if classes else "0, as no loss reads the student's logits"
        raise UserError(f"{where}.kwargs: num_classes is {needed}; leave it out")
    kwargs: dict[str, Any] = (
        {"in_chans": channels} | ({} if classes is None else {"num_classes": classes}) | spec.kwargs
    )
    pretrained = spec.weights == "pretrained"
    if spec.prefix is not None and spec.weights in (None, "random", "pretrained"):
        raise UserError(f"{where}.prefix: has no effect here; it goes with {where}.weights in a file")
    if pretrained and not timm.models.is_model_pretrained(spec.model):
        tags = timm.list_pretrained(spec.model.split(".")[0] + ".*")
        raise UserError(
            f"{where}.weights: timm has no pre-trained weights for {spec.model}."
            + (nearest(spec.model, tags) if tags else " Give a file, or another model.")
        )
    model, kwargs = create(spec.model, image_size, pretrained, kwargs, where)
    if spec.weights in (None, "random"):
        return model, Loaded(kwargs, "random", None, 0, len(model.state_dict()), initial_share(model))
    new: State = {}  # what the source has not filled
    prefix, unused = "", set[str]()  # what stood before the names; tensors of the file that the model has no use for
    exported = False
    if pretrained:
        cfg = getattr(model, "pretrained_cfg", {})
        source, sha256, theirs = f"pretrained ({cfg.get('tag', '')})", None, cfg.get("num_classes")
        if getattr(model, "num_classes", theirs) != theirs:  # timm has left the head out
            new = classifier(model)
    else:
        path = resolve(str(spec.weights))
        flat = read_weights(path, where)
        source, sha256 = str(spec.weights), sha256_of(path)
        exported = _of_a_run(path, sha256, where)
        prefix = find_prefix(model, flat, path, where) if spec.prefix is None else as_prefix(spec.prefix, flat)
        read = under(prefix, flat)
        if not read:
            raise UserError(f"{where}.prefix: no tensor in {path} begins with {prefix}; they are {told_briefly(flat)}")
        state = _adapted(read, model, path, image_size, where)
        if classes == 0:
            state = without_classifier(state, model)
        theirs = other_classes(model, state)
        if theirs is not None and where == "student":
            new = classifier(model)
        elif theirs is not None and "num_classes" not in spec.kwargs:
            model, kwargs = create(spec.model, image_size, False, kwargs | {"num_classes": theirs}, where)
            state = _adapted(read, model, path, image_size, where)
        load_weights(model, state | new, path, where)
        renamed = state.keys() - read.keys()  # by timm's filter; then its names do not tell what it left out
        used = {prefix + key for key in (read if renamed else state).keys() - new.keys()}
        unused = flat.keys() - used
    if new and where != "student":
        raise UserError(
            f"teacher.kwargs: num_classes would give a head that was never trained in place of that for {theirs} "
            "classes; leave it out"
        )
    total = len(model.state_dict())
    old = f"the old one was for {theirs}" if theirs else "they came without one"
    head = f"new head for {kwargs['num_classes']} classes, {old}" if new else None
    keys = {"matched": model.state_dict().keys() - new.keys(), "missing": new.keys(), "unexpected": unused}
    loaded = Loaded(
        kwargs,
        source,
        sha256,
        total - len(new),
        total,
        initial_share(model),
        head,
        prefix,
        {kind: grouped(names) for kind, names in keys.items()},
        noise_share(model),
        exported,
    )
    return model, loaded if sha256 else replace(loaded, sha256=backbone_sha256(model, loaded))


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
        return Path(__file__).parent / weights.removeprefix("package:")
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


def usual_size(name: str) -> tuple[int, int]:
    """(height, width) in pixels that timm names for a model; 224 where it names none."""
    cfg = timm.get_pretrained_cfg(name)
    return tuple(cfg.input_size[-2:]) if cfg else (224, 224)


def _of_a_run(path: Path, sha256: str, where: str) -> bool:
    """Whether a card of scalekd's is beside it, of this file. Raises `UserError` if the card is of another one."""
    card = beside(path)
    if card and card.sha256 and card.sha256 != sha256:
        raise UserError(
            f"{where}.weights: {path} is not the file that the card beside it tells of: it has another sha256. "
            f"Make both anew (`scalekd export {path.parent}`), or take the file away from the card"
        )
    return card is not None and card.sha256 == sha256


def _with_head(
    spec: Model, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """`build_model` for a backbone with a head that was fitted for it; refuses any other backbone or input."""
    folder = resolve(str(spec.head))
    card, tensors = read_head(folder, f"{where}.head")
    count = len(card.classes)

    def refuse_unless(same: bool, what: str, theirs: object, ours: object, way_out: str) -> None:
        if not same:
            raise UserError(f"{where}.head: {spec.head} was fitted for {what} {theirs}, here it is {ours}.\n{way_out}")

    again = "Or fit another: scalekd head"
    same = card.model.split(".")[0] == spec.model.split(".")[0]  # the checksum tells tags apart
    refuse_unless(same, "the backbone", card.model, spec.model, f"Set {where}.model={card.model}. {again}")
    ours = {k: v for k, v in spec.kwargs.items() if k != "num_classes" or v not in (0, count)}
    refuse_unless(card.kwargs == ours, "kwargs", card.kwargs, ours, f"Give {where}.kwargs the same. {again}")
    refuse_unless(classes in (None, count), "classes in number", count, classes, "Fit one for the classes of the data")
    refuse_unless(card.channels == channels, "data.channels", card.channels, channels, again)
    size = list(card.image_size)
    refuse_unless(
        size == list(image_size), "images of", size, list(image_size), f"Set {where}.image_size={size}. {again}"
    )

    backbone, loaded = build_model(
        spec.model_copy(update={"head": None, "kwargs": ours}),
        channels=channels,
        image_size=image_size,
        classes=None,
        where=where,
    )
    if loaded.source == "random":
        raise UserError(f"{where}.head: its backbone's weights are not named; set {where}.weights={card.weights}")
    checksum = backbone_sha256(backbone, loaded)
    refuse_unless(
        card.sha256 == checksum,
        "weights of sha256",
        f"{card.sha256[:12]} ({card.weights})",
        f"{checksum[:12]} ({loaded.source})",
        f"Give {where}.weights the same file. {again}",
    )
    same = card.prefix in (None, loaded.prefix)
    refuse_unless(same, "weights under", f"`{card.prefix}`", f"`{loaded.prefix}`", f"Set {where}.prefix. {again}")
    mean, std = (list(values) for values in statistics(backbone, spec, channels, where))
    refuse_unless([card.mean, card.std] == [mean, std], "mean and std", [card.mean, card.std], [mean, std], again)
    model, kwargs = put_head(backbone, loaded, tensors, spec.model, image_size, where)
    total = len(model.state_dict())
    told = f"head {spec.head} (sha256 {card.head_sha256[:12]}) for {count} classes, fitted on {card.labels} labels"
    matched = total - len(classifier(model))
    return model, replace(loaded, kwargs=kwargs, matched=matched, total=total, head=told)


def put_head(
    backbone: nn.Module,
    loaded: Loaded,
    tensors: State,
    name: str,
    image_size: tuple[int, int],
    where: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """A new model with the backbone's weights and this classifier, and its keyword arguments. Raises `UserError`.

    Both classifiers of a distilled DeiT get the same tensors: it gives the mean of their logits, and its pooled
    features are the mean of the two tokens.
    """
    model, kwargs = create(name, image_size, False, loaded.kwargs | {"num_classes": len(tensors["bias"])}, where)
    state = backbone.state_dict()
    head = classifier(model)
    for key, place in head.items():
        tensor = tensors[key.rpartition(".")[2]] if key.endswith(("weight", "bias")) else place
        if tensor.numel() != place.numel():
            raise UserError(f"{where}: the classifier of {name} takes {tuple(place.shape)}, not {tuple(tensor.shape)}")
        state[key] = tensor.reshape(place.shape)  # a 1x1 convolution holds the same numbers
    if not head:
        raise UserError(f"{where}: timm does not say which layer of {name} is its classifier; fine-tune it instead")
    load_weights(model, state, Path("head.safetensors"), where)
    return model, kwargs


def statistics(model: nn.Module, spec: Model, channels: int, where: str) -> Statistics:
    """(mean, std) of the model's input for pixels in [0, 1], one value per channel: the recipe's, else timm's own."""
    mean, std = default_statistics(model)
    chosen = (spec.mean or mean, spec.std or std)
    for name, values in zip(("mean", "std"), chosen):
        if len(values) != channels:
            raise UserError(f"{where}.{name}: {len(values)} values for data.channels={channels}")
    return chosen


def input_doubt(mean: Sequence[float], std: Sequence[float]) -> str:
    """What is wrong with statistics that cannot be of pixels in [0, 1]; empty if nothing is."""
    wrong = max(*mean, *std) > 2
    return "They are for pixels in [0, 1]; divide those for pixels up to 255 by 255" if wrong else ""
