"""A file of weights: read without running code from it, and what timm's train.py says of its model in and beside it."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.files import is_file
from scalekd.common.text import shortened
from scalekd.common.yaml_file import parse_yaml

ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")

# What a file may hold beside its tensors: module -> names. They are read as objects that do nothing.
BESIDE = {
    "mmengine.logging.history_buffer": ["HistoryBuffer"],
    "numpy": ["ndarray", "dtype"],
    "numpy.core.multiarray": ["_reconstruct", "scalar"],
    "numpy._core.multiarray": ["_reconstruct", "scalar"],
    "builtins": ["getattr"],
    "__builtin__": ["getattr"],
    "pathlib": ["PosixPath", "WindowsPath"],
    "pathlib._local": ["PosixPath", "WindowsPath"],
}


class _Ignored:
    """Stands for an object beside the tensors: takes anything, does nothing."""

    def __new__(cls, *args: Any) -> _Ignored:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_file(path: Path, others: Iterable[str] = ()) -> dict[Any, Any]:
    """What a .safetensors or torch file holds. Runs no code from it. Raises `UserError` that begins with the path.

    Objects of `BESIDE` (mmengine's log, numpy's numbers, paths) become `_Ignored`; their modules are not even imported.
    timm's arguments are read as they are, plain values. A file with any other object is refused.
    others: what may have been meant in place of a file.
    """
    if not is_file(path):
        raise UserError(_no_file(path, others))
    try:
        contents = load_file(path) if path.suffix == ".safetensors" else _loaded(path)
    except Exception as error:  # a damaged zip or pickle can raise nearly anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds {shortened(code[1])} beside its tensors and is not opened: such objects can run code.\n"
                "If you trust it, load it in a Python of its own and save its state_dict alone as .safetensors."
            ) from None
        raise UserError(f"{path} cannot be read as weights: {shortened(first_line(error))}") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__} and no named tensors")
    return contents


def _loaded(path: Path, mmap: bool = False) -> Any:
    stand_ins: list[Any] = [
        type(name, (_Ignored,), {"__module__": module}) for module, names in BESIDE.items() for name in names
    ]
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def weights_in(folder: Path) -> list[Path]:
    """The files in a folder that are called as weights are, train.py's best one first; none where it cannot be read."""
    try:
        found = [p for p in folder.iterdir() if p.name.endswith(ENDINGS) and is_file(p)]
    except OSError:
        return []
    return sorted(found, key=lambda p: (not p.name.startswith("model_best"), p.name))


def _no_file(path: Path, others: Iterable[str]) -> str:
    try:
        folder = path.is_dir()
    except (OSError, ValueError):  # no path at all: too long
        return f"no file {path}.{nearest(path.name, others)}"
    if not folder:
        return f"no file {path}.{nearest(path.name, [*(p.name for p in weights_in(path.parent)), *others])}"
    files = weights_in(path)
    told = f"; name a file in it, such as {files[0]}" if files else f", and no file in it ends in {', '.join(ENDINGS)}"
    return f"{path} is a folder, not a file of weights{told}"


# ---------------------------------------------------------------- what timm's train.py says of the model


SAID: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "num_classes": (int,),
    "in_chans": (int,),
    "img_size": (int, list, tuple),
    "input_size": (list, tuple),  # channels, height, width
    "gp": (str,),
    "model_kwargs": (dict,),
    "mean": (list, tuple),
    "std": (list, tuple),
}


def said_in(file: Path) -> dict[str, Any]:
    """Of `SAID`, train.py's arguments for the model, what its checkpoint or its args.yaml gives; {} for any other file.

    All are plain values and `model` is a name of timm's, but nobody has looked whether the rest is true or fits.
    """
    import timm

    try:
        if file.suffix == ".yaml":
            values = parse_yaml(file.read_text(), str(file))
        else:
            contents = _loaded(file, mmap=True)  # the tensors stay on the disk
            args = contents.get("args")
            own = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
            values = {"model": contents.get("arch")} | own
        found = {key: values[key] for key in SAID if values.get(key) and isinstance(values[key], SAID[key])}
        json.dumps(found)
    except Exception:  # it only helps to mend a mistake: what cannot be read says nothing
        return {}
    if not timm.is_model(found.get("model", "")):
        found.pop("model", None)
    return found


def as_text(said: Mapping[str, Any]) -> str:
    """`model vit_tiny_patch16_224, num_classes 3`."""
    return shortened(", ".join(f"{key} {value}" for key, value in said.items()))


def as_overrides(said: Mapping[str, Any], weights: Path, role: str) -> str:
    """What to set for a student's or teacher's model with these weights. The class count is the weights' own."""
    kwargs = ({"global_pool": said["gp"]} if "gp" in said else {}) | said.get("model_kwargs", {})
    size = kwargs.pop("img_size", None) or said.get("img_size") or said.get("input_size", [])[-2:]
    values = {
        "kwargs": kwargs,
        "image_size": None if role == "student" else size,  # a student's is data.image_size
        "mean": said.get("mean"),
        "std": said.get("std"),
    }
    settings = [f"{role}.model={said.get('model', 'NAME')}", f"{role}.weights={weights}"]
    settings += [f"{role}.{key}={json.dumps(value)}" for key, value in values.items() if value]
    return shortened(" ".join(map(shlex.quote, settings)), 800)
