"""Reads weights files without running code from them, and what timm's train.py wrote about their model."""

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

# Objects that a file may contain besides tensors: module -> names. They are read as objects without behaviour.
IGNORED = {
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
    """Replaces an object of `IGNORED`: accepts any arguments and state, does nothing."""

    def __new__(cls, *args: Any) -> _Ignored:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_file(path: Path, others: Iterable[str] = ()) -> dict[Any, Any]:
    """The contents of a .safetensors or torch file. Runs no code from it. Raises `UserError` that begins with the path.

    Objects of `IGNORED` (mmengine's log, numpy's numbers, paths) become `_Ignored`, without importing their modules.
    timm's arguments are read as plain values. A file with any other object is an error.
    others: values other than a file that the user may have meant.
    """
    if not is_file(path):
        raise UserError(_no_file(path, others))
    try:
        contents = load_file(path) if path.suffix == ".safetensors" else _loaded(path)
    except Exception as error:  # a damaged zip or pickle can raise anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} contains {shortened(code[1])} besides tensors and is not opened: such objects can run code.\n"
                "If you trust the file, load it in a separate Python process and save only its state_dict as .safetensors."
            ) from None
        raise UserError(f"{path} cannot be read as weights: {shortened(first_line(error))}") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} contains no named tensors, but an object of type {type(contents).__name__}")
    return contents


def _loaded(path: Path, mmap: bool = False) -> Any:
    stand_ins: list[Any] = [
        type(name, (_Ignored,), {"__module__": module}) for module, names in IGNORED.items() for name in names
    ]
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def weights_in(folder: Path) -> list[Path]:
    """The files in a folder with the name of a weights file, train.py's best first; [] if it cannot be read."""
    try:
        files = [p for p in folder.iterdir() if p.name.endswith(ENDINGS) and is_file(p)]
    except OSError:
        return []
    return sorted(files, key=lambda p: (not p.name.startswith("model_best"), p.name))


def _no_file(path: Path, others: Iterable[str]) -> str:
    try:
        folder = path.is_dir()
    except (OSError, ValueError):  # not a path, such as one that is too long
        return f"no file {path}.{nearest(path.name, others)}"
    if not folder:
        return f"no file {path}.{nearest(path.name, [*(p.name for p in weights_in(path.parent)), *others])}"
    files = weights_in(path)
    hint = f"; use a file in it, such as {files[0]}" if files else f", and no file in it ends in {', '.join(ENDINGS)}"
    return f"{path} is a folder, not a weights file{hint}"


# ---------------------------------------------------------------- what timm's train.py wrote about the model


ARGUMENTS: dict[str, tuple[type, ...]] = {
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


def train_arguments(file: Path) -> dict[str, Any]:
    """train.py's `ARGUMENTS` for the model, from its checkpoint or args.yaml; {} for any other file.

    All are plain values and `model` is a timm name, but they may not fit the weights.
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
        given = {key: values[key] for key in ARGUMENTS if values.get(key) and isinstance(values[key], ARGUMENTS[key])}
        json.dumps(given)
    except Exception:  # only used in error messages: ignore what cannot be read
        return {}
    if not timm.is_model(given.get("model", "")):
        given.pop("model", None)
    return given


def as_text(arguments: Mapping[str, Any]) -> str:
    """`model vit_tiny_patch16_224, num_classes 3`."""
    return shortened(", ".join(f"{key} {value}" for key, value in arguments.items()))


def as_overrides(arguments: Mapping[str, Any], weights: Path, role: str) -> str:
    """Overrides for a student or teacher with these weights. The number of classes is that of the weights."""
    kwargs = ({"global_pool": arguments["gp"]} if "gp" in arguments else {}) | arguments.get("model_kwargs", {})
    size = kwargs.pop("img_size", None) or arguments.get("img_size") or arguments.get("input_size", [])[-2:]
    values = {
        "kwargs": kwargs,
        "image_size": None if role == "student" else size,  # a student's is data.image_size
        "mean": arguments.get("mean"),
        "std": arguments.get("std"),
    }
    settings = [f"{role}.model={arguments.get('model', 'NAME')}", f"{role}.weights={weights}"]
    settings += [f"{role}.{key}={json.dumps(value)}" for key, value in values.items() if value]
    return shortened(" ".join(map(shlex.quote, settings)), 800)
