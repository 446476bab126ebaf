"""Matches the tensors of a weights file to a model: finds the prefix of their names, adapts and loads them."""

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

from .file import as_text, read_file, train_arguments

State = dict[str, torch.Tensor]


def read_weights(path: Path, where: str) -> State:
    """All tensors of a .safetensors or torch file, by name. Nested dicts are flattened with dots.

    `{"teacher": {"backbone.norm.weight": ...}}` becomes `teacher.backbone.norm.weight`. Runs no code from the file.
    Raises `UserError` that begins with `where`.weights.
    """
    try:
        flat = dict(_named(read_file(path, ("pretrained", "random") if path.parent == Path() else ())))
    except UserError as error:
        raise UserError(f"{where}.weights: {error}") from None
    if not flat:
        raise UserError(f"{where}.weights: {path} contains no named tensors")
    return flat


def _named(contents: object, within: str = "", depth: int = 0) -> Iterable[tuple[str, torch.Tensor]]:
    for key, value in contents.items() if isinstance(contents, Mapping) and depth < 4 else ():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            yield within + key, value
        elif isinstance(key, str):
            yield from _named(value, f"{within}{key}.", depth + 1)


# Entries of checkpoints that keep averaged weights beside plain ones: (averaged, plain). timm: state_dict_ema; DeiT and
# torchvision: model_ema; others: ema, ema_state_dict.
AVERAGED, PLAIN = ("state_dict_ema", "model_ema", "ema", "ema_state_dict"), ("state_dict", "model")
SWAPPED = {  # entries with the plain weights beside averaged ones in `state_dict`, and a tensor or entry that shows it
    "ema_state_dict": "ema_state_dict.steps",  # mmengine's averaged model, whose values are swapped when it is saved
    "current_model_state": "averaging_state.n_averaged",  # Lightning's WeightAveraging
}


def averaged_and_plain(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The entries of a checkpoint with averaged and with plain weights; None for one that it does not have.

    names: of all its tensors, with the names of the entries that they are in: `state_dict_ema.fc.bias`.
    """
    known = set(names)
    entries = {name.partition(".")[0] for name in known if "." in name}
    for swapped, sign in SWAPPED.items():
        if swapped in entries and "state_dict" in entries and sign in known:
            return "state_dict", swapped
    averaged, plain = (next((e for e in kind if e in entries), None) for kind in (AVERAGED, PLAIN))
    return averaged, plain


def find_prefix(model: nn.Module, flat: State, path: Path, where: str) -> str:
    """The prefix in front of the model's tensor names in a file; "" if there is none, or if no prefix fits exactly.

    A prefix fits if the tensors under it are those of the model, with none missing and none left over. If averaged and
    plain weights both fit, the averaged ones are used, as in timm (`averaged_and_plain`). Raises `UserError` if several models in
    the file fit.
    """
    if _fits(model, flat):
        return ""
    wanted = model.state_dict().keys()
    counts = Counter(start for key in flat for start in _starts(key))
    large = [prefix for prefix, count in counts.items() if 2 * count >= len(wanted)]
    fitting = [prefix for prefix in large if _fits(model, under(prefix, flat))]
    averaged, plain = averaged_and_plain(flat)
    entries = [prefix.partition(".")[0] for prefix in fitting]
    if entries.count(str(averaged)) == 1 and set(entries) <= {averaged, plain}:
        return fitting[entries.index(str(averaged))]
    if len(fitting) > 1:
        raise UserError(
            f"{where}.weights: {path} contains several models that fit; choose one with "
            + " or ".join(f"{where}.prefix={shortened(prefix)}" for prefix in fitting[:5])
        )
    if fitting:
        return fitting[0]
    # none fits: return the one with the most names, so that the error shows what does not fit
    common = Counter(start for key in flat for start in ["", *_starts(key)] if key.removeprefix(start) in wanted)
    return max(common, key=lambda start: common[start], default="")


def _starts(key: str) -> list[str]:
    """Prefixes of a name, at most five: a.b.c gives [a., a.b.]."""
    return [key[: dot.end()] for dot in re.finditer(r"\.", key)][:5]


def as_prefix(given: str, flat: State) -> str:
    """The user's prefix, with a dot added if the names in the file have one there."""
    names = [key for key in flat if key.startswith(given)]
    return given + "." if given and names and all(key.startswith(given + ".") for key in names) else given


def under(prefix: str, flat: State) -> State:
    """The tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def _fits(model: nn.Module, read: State) -> bool:
    """Whether these are the model's tensors, except perhaps the classifier."""
    try:
        state = adapted(read, model)
    except Exception:  # timm's filters raise anything on other models' files
        return False
    return _shapes(model.state_dict()) == _shapes(state) or other_classes(model, state) is not None


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def grouped(keys: Iterable[str]) -> list[str]:
    """Names grouped by replacing numbers with *: blocks.0.norm1.weight etc. become `blocks.*.norm1.weight (12)`."""
    groups: dict[str, list[str]] = {}
    for key in sorted(keys):
        groups.setdefault(re.sub(r"(^|(?<=\.))\d+(?=\.)", "*", key), []).append(key)
    return [f"{group} ({len(names)})" if len(names) > 1 else names[0] for group, names in groups.items()]


def briefly(keys: Iterable[str], most: int = 5) -> str:
    """The first groups of `grouped`, and how many more there are."""
    groups = grouped(keys)
    return shortened(", ".join(groups[:most]) + f" and {len(groups) - most} more groups" * (len(groups) > most))


def adapted(state: State, model: nn.Module) -> State:
    """The tensors after timm's filter for the model family, which renames keys and resizes position tables."""
    state = state | missing_counters(state, model)
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None or _shapes(state) == _shapes(model.state_dict()):
        return state
    with warnings.catch_warnings():  # from torch, about timm's resizing of relative position tables
        for message in (".*searchsorted", ".*non-tuple sequence"):
            warnings.filterwarnings("ignore", message, UserWarning)
        state = adapt(dict(state), model)
    return state | missing_counters(state, model)


def missing_counters(state: State, model: nn.Module) -> State:
    """The model's own `num_batches_tracked` of batch norms that are in `state` without it.

    Old files do not have these counters. torch fills them in the same way when it loads such a file strictly.
    """
    counters = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[2] == "num_batches_tracked"}
    return {
        name: tensor
        for name, tensor in counters.items()
        if name not in state and name.removesuffix("num_batches_tracked") + "running_mean" in state
    }


def classifier(model: nn.Module) -> State:
    """The tensors of the model's classifier, or of both classifiers of a distilled DeiT."""
    return {name: tensor for name, tensor in model.state_dict().items() if _of_classifier(name, model)}


def without_classifier(state: State, model: nn.Module) -> State:
    """`state` without the tensors of the classifier, even if `model` was created without one."""
    return {name: tensor for name, tensor in state.items() if not _of_classifier(name, model)}


def _of_classifier(name: str, model: nn.Module) -> bool:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return name.rpartition(".")[0] in ((names,) if isinstance(names, str) else names)


def other_classes(model: nn.Module, state: State) -> int | None:
    """The number of classes of `state`, if only its classifier does not fit `model`; 0 if it has no classifier."""
    wanted = model.state_dict()
    if wanted.keys() - state.keys() == classifier(model).keys() != set() and not state.keys() - wanted.keys():
        return 0  # a backbone without a classifier, such as DINOv2; load_weights checks the shapes
    if wanted.keys() != state.keys():
        return None
    other = {name for name in wanted if wanted[name].shape != state[name].shape}
    counts = {len(state[name]) for name in other if state[name].ndim}
    rest_fits = all(wanted[name].shape[1:] == state[name].shape[1:] for name in other)
    return counts.pop() if rest_fits and len(counts) == 1 and other == classifier(model).keys() else None


def load_weights(model: nn.Module, state: State, path: Path, where: str) -> None:
    """Loads all tensors of `model`. Raises `UserError` if any is missing, left over or of another shape."""
    if _shapes(state) != _shapes(model.state_dict()):
        raise UserError(_misfit(model, state, path, where))
    model.load_state_dict(state)


def _misfit(model: nn.Module, state: State, path: Path, where: str) -> str:
    wanted, head = model.state_dict(), classifier(model).keys()
    backbone = {name: tensor for name, tensor in wanted.items() if name not in head}
    if not head & state.keys() and _shapes(backbone) != _shapes(state):
        wanted = backbone  # a file may lack the classifier, so do not report it as missing
    common = wanted.keys() & state.keys()
    missing, extra = wanted.keys() - common, state.keys() - common
    other = [name for name in common if wanted[name].shape != state[name].shape]
    parts = (
        f"{len(common) - len(other)} of {len(wanted)} tensors matched",
        f"{len(missing)} missing ({briefly(missing)})" if missing else "",
        f"{len(extra)} left over ({briefly(extra)})" if extra else "",
        _shape_differences(other, wanted, state),
    )
    left_over = bool(extra) and not missing and not other
    arguments = train_arguments(path)
    lines = [
        f"{where}.weights: {path} does not fit {where}.model and its kwargs: {'; '.join(filter(None, parts))}.",
        f"The file says: {as_text(arguments)}." if arguments else "",
        "Set the model name, kwargs and number of classes that the weights were trained with"
        + (f", or set {where}.prefix to the prefix of the model's tensor names in the file." if not common else "."),
        "If the tensors left over are not part of the model, such as MAE's decoder, save the file without them."
        if left_over
        else "",
    ]
    return "\n".join(filter(None, lines))


def _shape_differences(names: list[str], wanted: State, state: State) -> str:
    return ", ".join(
        f"{k} is {tuple(state[k].shape)} in the file, {tuple(wanted[k].shape)} in the model" for k in sorted(names)[:2]
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. Reads it in pieces, because it may be larger than the memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
