"""A folder in place of a model's name: a scalekd run's, or one in timm's format for Hugging Face.

`with_folders` writes out what the folder says when a recipe is read, so the recipe of a run needs the folder's
weights file and nothing else of it. docs/how-to/any-teacher.md tells what wins where recipe and folder differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.files import is_file, reject_links
from scalekd.common.text import in_shell, printable, shortened

from .file import ENDINGS, as_overrides, as_text, said_in, weights_in

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in timm's order
OF_THE_RUN = ("img_size", "num_classes", "in_chans")  # keyword arguments that the data, or the file, decide


class Described(NamedTuple):
    """What stands beside a weights file."""

    model: str
    kwargs: dict[str, Any]  # of `timm.create_model`, less OF_THE_RUN
    weights: Path
    channels: int
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    classes: list[str] | None  # names in the order of the classifier's rows, if they are told
    sha256: str | None = None  # of `weights`, if it is told


def with_folders(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values in which every `model` that is a folder is written out. Raises `UserError`."""
    data = values.get("data")
    channels = data.get("channels", 3) if isinstance(data, dict) else 3
    found = {role: values[role] for role in ("student", "teacher", "backbone") if isinstance(values.get(role), dict)}
    whole = values | {role: written_out(section, role, channels) for role, section in found.items()}
    if isinstance(several := values.get("teachers"), dict):
        whole["teachers"] = {
            name: written_out(section, f"teachers.{name}", channels) if isinstance(section, dict) else section
            for name, section in several.items()
        }
    return whole


def written_out(section: dict[str, Any], role: str, channels: Any) -> dict[str, Any]:
    """The values of a recipe's `student`, `teacher` or `backbone`; the folder of `model` becomes name, arguments, weights, input.

    Its mean, std and, for a teacher, image size are taken where the section says nothing; so are its weights, for
    `pretrained` too. `weights: random` stays. Raises `UserError` for other weights or arguments than the folder's.
    """
    folder = _place(section.get("model"))
    if folder is None:
        return section
    if is_file(folder):
        raise UserError(f"{role}.model: {_what_it_is(folder, role)}")
    told = read_folder(folder, role)
    if channels != told.channels:
        raise UserError(
            f"{role}.model: {folder} takes images of {told.channels} channel{'s' * (told.channels > 1)}, "
            f"data.channels is {shortened(str(channels))}; set data.channels={told.channels}, or name another model"
        )
    weights = section.get("weights")
    if weights not in (None, "pretrained", "random") and not _same(weights, told.weights):
        raise UserError(
            f"{role}.weights: {shortened(str(weights))}, but {role}.model is {folder}, which has its own. Leave weights "
            f"out, or set {role}.model={told.model}"
        )
    own: dict[str, Any] = {"image_size": list(told.image_size)} if role != "student" else {}
    own |= {"mean": told.mean, "std": told.std}
    return (
        section
        | {"model": told.model, "weights": "random" if weights == "random" else str(told.weights)}
        | {"kwargs": _arguments(section.get("kwargs") or {}, told, folder, role)}
        | {key: value for key, value in own.items() if section.get(key) is None}
    )


def _place(name: Any) -> Path | None:
    """The folder or file that `model` names. One that is called as a model of timm's is named with a path: ./resnet50"""
    import timm

    if not isinstance(name, str) or not name or timm.is_model(name):
        return None
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, ~ of nobody
        return None


def _same(weights: Any, file: Path) -> bool:
    try:
        return isinstance(weights, str) and Path(weights).expanduser().resolve() == file.resolve()
    except (OSError, ValueError, RuntimeError):
        return False


def is_drop_rate(key: str) -> bool:
    """Whether a keyword argument of timm's says nothing of the weights: how often something is dropped in training."""
    return "drop" in key and key.endswith("_rate")


def _arguments(given: Any, told: Described, folder: Path, role: str) -> dict[str, Any]:
    """The folder's, and those of the recipe that say the same or nothing of the weights: rates of dropping."""
    if not isinstance(given, dict):
        return given  # pydantic tells
    for key, value in given.items():
        free = key in OF_THE_RUN or is_drop_rate(key)
        if not free and key in told.kwargs and json.dumps(told.kwargs[key]) != json.dumps(value):
            raise UserError(
                f"{role}.kwargs: {key} is {shortened(str(value))} here and {told.kwargs[key]} in {folder}. Leave it "
                f"out, or drop all with {role}.kwargs={{}}"
            )
    return told.kwargs | given


# ---------------------------------------------------------------- what a folder says


def read_folder(folder: Path, role: str) -> Described:
    """The one model of `folder`, with a weights file that is there. Raises `UserError` that names the `role`'s model."""
    try:
        if is_file(folder / "student.json"):
            reject_links(folder)  # not in timm's format: the Hub's cache consists of links
            told = _from_card(folder / "student.json")
        elif is_file(folder / "config.json"):
            told = _from_config(folder / "config.json")
        else:
            raise UserError(f"{folder} holds no model: {_what_it_holds(folder, role)}")
    except UserError as error:
        raise UserError(f"{role}.model: {error}") from None
    if not is_file(told.weights):
        remedy = (
            f"`scalekd export {in_shell(folder)}` makes it" if told.weights.name == "student.safetensors" else "add it"
        )
        raise UserError(f"{role}.model: {folder} has no {told.weights.name}; {remedy}")
    return told


def beside(weights: Path) -> Described | None:
    """What the card or configuration beside a weights file says of it, if there is one that can be read."""
    card = weights.with_suffix(".json")
    try:
        if weights.suffix == ".safetensors" and is_file(card):
            return _from_card(card)
        if weights.name in HF_WEIGHTS and is_file(weights.parent / "config.json"):
            return _from_config(weights.parent / "config.json")
    except UserError:
        pass
    return None


def _from_card(file: Path) -> Described:
    """Of a student that scalekd exported."""
    from .card import read_card

    card = read_card(file)
    return Described(
        card["model"],
        {key: value for key, value in card["kwargs"].items() if key not in OF_THE_RUN},
        file.with_suffix(".safetensors"),
        len(card["mean"]),
        (card["image_size"][0], card["image_size"][1]),
        card["mean"],
        card["std"],
        card["interpolation"],
        card["crop_pct"],
        card["classes"],
        card.get("sha256"),
    )


def _from_config(file: Path) -> Described:
    """As `timm.models.save_for_hf` and `push_to_hf_hub` write it; older ones keep everything on one level."""
    import timm

    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
            kind = "transformers'" if isinstance(config, dict) and "model_type" in config else "another"
            raise UserError(
                f"{file} is in {kind} format, not in timm's: it has no `architecture`. "
                "Name the timm model, and give the weights file as weights"
            )
        model = config["architecture"]
        if not timm.is_model(model):
            raise UserError(
                f"{file}: timm has no model `{printable(model)}`.{nearest(model.split('.')[0], timm.list_models())}"
            )
        made_for = config.get("pretrained_cfg", config)
        own = timm.get_pretrained_cfg(model)
        defaults = own.to_dict() if own else {}
        told = {key: made_for.get(key, defaults.get(key)) for key in ("input_size", "mean", "std")}
        channels, height, width = told["input_size"]
        args = config.get("model_args") or {}
        size = args.get("img_size") or (height, width)
        names = config.get("label_names") or made_for.get("label_names")
        return Described(
            model,
            {key: value for key, value in args.items() if key not in OF_THE_RUN},
            next((file.parent / n for n in HF_WEIGHTS if is_file(file.parent / n)), file.parent / HF_WEIGHTS[0]),
            int(args.get("in_chans") or channels),
            (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            [float(v) for v in told["mean"]],
            [float(v) for v in told["std"]],
            str(made_for.get("interpolation", "bicubic")),
            float(made_for.get("crop_pct") or 0.875),
            [str(name) for name in names] if isinstance(names, list) else None,
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a configuration of timm's: {shortened(first_line(error))}") from None


# ---------------------------------------------------------------- what is no model, and the way out


def _what_it_holds(folder: Path, role: str) -> str:
    if is_file(folder / "head.json"):
        return f"it is a head's (`scalekd head`); set {role}.head={folder}, with the backbone's own name"
    if files := weights_in(folder):
        return f"neither student.json (of a scalekd run) nor config.json (timm's). {_weights_alone(files[0], role)}"
    return (
        "neither student.json with student.safetensors (a scalekd run) nor config.json with model.safetensors (timm's)"
    )


def _what_it_is(file: Path, role: str) -> str:
    if any(is_file(file.parent / name) for name in ("student.json", "config.json")) and file.name.endswith(ENDINGS):
        return f"{file} is a file; name its folder: {role}.model={file.parent}"
    return f"{file} is a file. " + _weights_alone(file, role)


def _weights_alone(file: Path, role: str) -> str:
    """How to name a model by a file of weights; with what train.py wrote in it or beside it, if it did."""
    found = ((place, said_in(place)) for place in (file, file.parent / "args.yaml"))
    place, said = next((of_place for of_place in found if of_place[1]), (file, {}))
    told = f"By {place.name}: {as_text(said)}. " if said else ""
    return f"{told}Set the model by timm's name and the file as its weights: {as_overrides(said, file, role)}"
