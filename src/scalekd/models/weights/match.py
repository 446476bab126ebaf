"""Weights in files: read, found under whatever stands before their names, and proved to be a trained model's."""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from scalekd.common.errors import UserError
from scalekd.common.text import shortened

from .file import as_text, read_file, said_in

State = dict[str, torch.Tensor]


def read_weights(path: Path, where: str) -> State:
    """All tensors of a .safetensors or torch file, by name; those in dicts within dicts by names with dots.

    `{"teacher": {"backbone.norm.weight": ...}}` gives `teacher.backbone.norm.weight`. Runs no code from the file.
    Raises `UserError`.
    """
    try:
        flat = dict(_named(read_file(path, ("pretrained", "random") if path.parent == Path() else ())))
    except UserError as error:
        raise UserError(f"{where}.weights: {error}") from None
    if not flat:
        raise UserError(f"{where}.weights: {path} holds no named tensors")
    return flat


def _named(contents: object, within: str = "", depth: int = 0) -> Iterable[tuple[str, torch.Tensor]]:
    for key, value in contents.items() if isinstance(contents, Mapping) and depth < 4 else ():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            yield within + key, value
        elif isinstance(key, str):
            yield from _named(value, f"{within}{key}.", depth + 1)


AVERAGED, PLAIN = ("state_dict_ema", "model_ema"), ("state_dict", "model")  # in timm's checkpoints


def find_prefix(model: nn.Module, flat: State, path: Path, where: str) -> str:
    """What to take off the names in a file so that they are the model's; "" if they are, or nothing helps.

    A prefix counts only if all of the model is found under it and nothing else is. Of timm's averaged and plain
    weights the averaged are taken, as timm does. Raises `UserError` where several models of the file fit.
    """
    if _fits(model, flat):
        return ""
    wanted = model.state_dict().keys()
    counts = Counter(start for key in flat for start in _starts(key))
    large = [prefix for prefix, count in counts.items() if 2 * count >= len(wanted)]
    fitting = [prefix for prefix in large if _fits(model, under(prefix, flat))]
    averaged = [prefix for prefix in fitting if prefix.split(".")[0] in AVERAGED]
    if len(averaged) == 1 and all(p in averaged or p.split(".")[0] in PLAIN for p in fitting):
        return averaged[0]
    if len(fitting) > 1:
        raise UserError(
            f"{where}.weights: {path} holds several models that fit; choose one: "
            + " or ".join(f"{where}.prefix={shortened(prefix)}" for prefix in fitting[:5])
        )
    if fitting:
        return fitting[0]
    # none fits: that with most of the names, so that the error tells what is wrong with it
    common = Counter(start for key in flat for start in ["", *_starts(key)] if key.removeprefix(start) in wanted)
    return max(common, key=lambda start: common[start], default="")


def _starts(key: str) -> list[str]:
    """a.b.c: [a., a.b.]; not more than five."""
    return [key[: dot.end()] for dot in re.finditer(r"\.", key)][:5]


def as_prefix(given: str, flat: State) -> str:
    """What a person gave as a prefix, with the dot at its end if the names in the file have it there."""
    names = [key for key in flat if key.startswith(given)]
    return given + "." if given and names and all(key.startswith(given + ".") for key in names) else given


def under(prefix: str, flat: State) -> State:
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def _fits(model: nn.Module, read: State) -> bool:
    """Whether it is the model's, but perhaps for the classifier."""
    try:
        state = adapted(read, model)
    except Exception:  # timm's filters take other models' files as they come
        return False
    return _shapes(model.state_dict()) == _shapes(state) or other_classes(model, state) is not None


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def grouped(keys: Iterable[str]) -> list[str]:
    """Names in which a number stands for all: blocks.0.norm1.weight and its like as `blocks.*.norm1.weight (12)`."""
    groups: dict[str, list[str]] = {}
    for key in sorted(keys):
        groups.setdefault(re.sub(r"(^|(?<=\.))\d+(?=\.)", "*", key), []).append(key)
    return [f"{group} ({len(names)})" if len(names) > 1 else names[0] for group, names in groups.items()]


def told_briefly(keys: Iterable[str], most: int = 5) -> str:
    groups = grouped(keys)
    return shortened(", ".join(groups[:most]) + f" and {len(groups) - most} kinds more" * (len(groups) > most))


def adapted(state: State, model: nn.Module) -> State:
    """Through timm's own filter for the family: other key names, position tables of another size."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None or _shapes(state) == _shapes(model.state_dict()):
        return state
    with warnings.catch_warnings():  # torch's, on how timm resizes tables of relative positions
        for told in (".*searchsorted", ".*non-tuple sequence"):
            warnings.filterwarnings("ignore", told, UserWarning)
        return adapt(dict(state), model)


def classifier(model: nn.Module) -> State:
    """The tensors of the model's classifier (or classifiers: a distilled DeiT has two)."""
    return {name: tensor for name, tensor in model.state_dict().items() if _of_classifier(name, model)}


def without_classifier(state: State, model: nn.Module) -> State:
    """`state` less the tensors of such a model's classifier, whether this one has it or not."""
    return {name: tensor for name, tensor in state.items() if not _of_classifier(name, model)}


def _of_classifier(name: str, model: nn.Module) -> bool:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return name.rpartition(".")[0] in ((names,) if isinstance(names, str) else names)


def other_classes(model: nn.Module, state: State) -> int | None:
    """The class count of `state`, if all fits `model` but a classifier for another number of classes; 0: it has none."""
    wanted = model.state_dict()
    if wanted.keys() - state.keys() == classifier(model).keys() != set() and not state.keys() - wanted.keys():
        return 0  # a backbone's file, such as DINOv2's; shapes are looked at when it is loaded
    if wanted.keys() != state.keys():
        return None
    other = {name for name in wanted if wanted[name].shape != state[name].shape}
    counts = {len(state[name]) for name in other if state[name].ndim}
    apart = all(wanted[name].shape[1:] == state[name].shape[1:] for name in other)
    return counts.pop() if apart and len(counts) == 1 and other == classifier(model).keys() else None


def load_weights(model: nn.Module, state: State, path: Path, where: str) -> None:
    """Fills every tensor of `model`; nothing may be missing or left over. Raises `UserError`."""
    if _shapes(state) != _shapes(model.state_dict()):
        raise UserError(_misfit(model, state, path, where))
    model.load_state_dict(state)


def _misfit(model: nn.Module, state: State, path: Path, where: str) -> str:
    wanted, head = model.state_dict(), classifier(model).keys()
    backbone = {name: tensor for name, tensor in wanted.items() if name not in head}
    if not head & state.keys() and _shapes(backbone) != _shapes(state):
        wanted = backbone  # a file without a classifier would do: that is not what is wrong with it
    common = wanted.keys() & state.keys()
    missing, extra = wanted.keys() - common, state.keys() - common
    other = [name for name in common if wanted[name].shape != state[name].shape]
    parts = (
        f"{len(common) - len(other)} of {len(wanted)} tensors matched",
        f"{len(missing)} missing ({told_briefly(missing)})" if missing else "",
        f"{len(extra)} left over ({told_briefly(extra)})" if extra else "",
        _shape_differences(other, wanted, state),
    )
    left_over = bool(extra) and not missing and not other
    said = said_in(path)
    lines = [
        f"{where}.weights: {path} does not fit {where}.model and its kwargs: {'; '.join(filter(None, parts))}.",
        f"Of its model the file says: {as_text(said)}." if said else "",
        "Give the model name, kwargs and class count that the weights were made with"
        + (f", or {where}.prefix, what stands before the model's names in the file." if not common else "."),
        "If what is left over is no part of the model, as MAE's decoder, save the others alone." if left_over else "",
    ]
    return "\n".join(filter(None, lines))


def _shape_differences(names: list[str], wanted: State, state: State) -> str:
    return ", ".join(
        f"{k} is {tuple(state[k].shape)} in the file, {tuple(wanted[k].shape)} in the model" for k in sorted(names)[:2]
    )


def sha256_of(path: Path) -> str:
    """Reads the file in pieces, because it may be larger than the memory."""
    summed = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            summed.update(piece)
    return summed.hexdigest()
