"""Model folders: a folder as `model` in a recipe, from a scalekd run or in timm's format for Hugging Face.

`with_folders` copies the folder's values into the recipe when it is read, so a run's recipe needs only the folder's
weights file later. docs/how-to/any-teacher.md says which value counts if recipe and folder differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import is_file, reject_links
from scalekd.common.text import in_shell, printable, shortened

from ..licences import UNKNOWN, derived, licence_of, licences_in
from ..names import models_like
from ..transformers_families import NAME as OF_TRANSFORMERS
from .file import ENDINGS, as_overrides, as_text, train_arguments, weights_in
from .transformers_folder import is_transformers, read_transformers

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in timm's order
SET_BY_RUN = ("img_size", "num_classes", "in_chans")  # keyword arguments that follow from the data or the weights


class Described(NamedTuple):
    """A weights file and the metadata next to it."""

    model: str
    kwargs: dict[str, Any]  # for `timm.create_model`, without SET_BY_RUN
    weights: Path
    channels: int
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    classes: list[str] | None  # names in the order of the classifier's rows, if known
    sha256: str | None = None  # of `weights`, if known
    licence: str = UNKNOWN  # of `weights`
    embedding: dict[str, Any] | None = None  # `Embedding`, if the weights have such a head


def with_folders(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values, with each `model` that is a folder replaced by its values. Raises `UserError`."""
    data = values.get("data")
    channels = data.get("channels", 3) if isinstance(data, dict) else 3
    sections = {role: values[role] for role in ("student", "teacher", "backbone") if isinstance(values.get(role), dict)}
    whole = values | {role: written_out(section, role, channels) for role, section in sections.items()}
    if isinstance(several := values.get("teachers"), dict):
        whole["teachers"] = {
            name: written_out(section, f"teachers.{name}", channels) if isinstance(section, dict) else section
            for name, section in several.items()
        }
    return whole


def written_out(section: dict[str, Any], role: str, channels: Any) -> dict[str, Any]:
    """A recipe's `student`, `teacher` or `backbone`, with a folder as `model` replaced by its name, kwargs, weights and input.

    The folder's mean, std and, for a teacher, image size are used if the section sets none, and its weights also for
    `pretrained`. `weights: random` is kept. Raises `UserError` for weights or arguments that contradict the folder's.
    """
    folder = _path(section.get("model"))
    if folder is None:
        return section
    if is_file(folder):
        raise UserError(f"{role}.model: {_about_file(folder, role)}")
    described = read_folder(folder, role)
    if described.model == OF_TRANSFORMERS and role != "teacher" and not role.startswith("teachers."):
        raise UserError(
            f"{role}.model: {folder} is a model of transformers, which can only be a teacher; use a timm model"
        )
    if channels != described.channels:
        raise UserError(
            f"{role}.model: {folder} needs images with {described.channels} channel{'s' * (described.channels > 1)}, but "
            f"data.channels is {shortened(str(channels))}; set data.channels={described.channels}, or use another model"
        )
    weights = section.get("weights")
    if weights not in (None, "pretrained", "random") and not _same(weights, described.weights):
        raise UserError(
            f"{role}.weights is {shortened(str(weights))}, but {role}.model is {folder}, which has its own weights. Remove "
            f"{role}.weights, or set {role}.model={described.model}"
        )
    own: dict[str, Any] = {"image_size": list(described.image_size)} if role != "student" else {}
    own |= {"mean": described.mean, "std": described.std}
    if described.embedding and weights != "random" and (role == "teacher" or role.startswith("teachers.")):
        own |= {"embedding": described.embedding}  # a student has the head that its recipe asks for
    return (
        section
        | {"model": described.model, "weights": "random" if weights == "random" else str(described.weights)}
        | {"kwargs": _arguments(section.get("kwargs") or {}, described, folder, role)}
        | {key: value for key, value in own.items() if section.get(key) is None}
    )


def _path(name: Any) -> Path | None:
    """The folder or file that `model` names, or None. Timm names come first: a folder of that name is ./resnet50."""
    import timm

    if not isinstance(name, str) or not name or timm.is_model(name):
        return None
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # not a path: too long, or ~ of an unknown user
        return None


def _same(weights: Any, file: Path) -> bool:
    try:
        return isinstance(weights, str) and Path(weights).expanduser().resolve() == file.resolve()
    except (OSError, ValueError, RuntimeError):
        return False


def is_drop_rate(key: str) -> bool:
    """Whether a timm keyword argument is a drop rate, which does not affect the weights."""
    return "drop" in key and key.endswith("_rate")


def _arguments(given: Any, described: Described, folder: Path, role: str) -> dict[str, Any]:
    """The folder's keyword arguments with the recipe's. Raises `UserError` if they differ, except for drop rates."""
    if not isinstance(given, dict):
        return given  # pydantic reports it
    for key, value in given.items():
        free = key in SET_BY_RUN or is_drop_rate(key)
        if not free and key in described.kwargs and json.dumps(described.kwargs[key]) != json.dumps(value):
            raise UserError(
                f"{role}.kwargs: {key} is {shortened(str(value))} here and {described.kwargs[key]} in {folder}. Remove it, "
                f"or remove all with {role}.kwargs={{}}"
            )
    return described.kwargs | given


# ---------------------------------------------------------------- reading a folder


def read_folder(folder: Path, role: str) -> Described:
    """The model in `folder`, whose weights file exists. Raises `UserError` that begins with `role`.model."""
    try:
        if is_file(folder / "student.json"):
            reject_links(folder)  # not in timm's format: the Hub's cache consists of links
            described = _from_card(folder / "student.json")
        elif is_file(folder / "config.json"):
            described = _from_config(folder / "config.json")
        else:
            raise UserError(f"{folder} contains no model: {_about_folder(folder, role)}")
    except UserError as error:
        raise UserError(f"{role}.model: {error}") from None
    if not is_file(described.weights):
        made = described.weights.name == "student.safetensors"
        remedy = f"create it with `scalekd export {in_shell(folder)}`" if made else "add it"
        raise UserError(f"{role}.model: {folder} has no {described.weights.name}; {remedy}")
    return described


def beside(weights: Path) -> Described | None:
    """The metadata next to a weights file, from its card or config.json; None if there is none that can be read."""
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
    """From the card of a student that scalekd exported."""
    from .card import read_card

    card = read_card(file)
    return Described(
        card["model"],
        {key: value for key, value in card["kwargs"].items() if key not in SET_BY_RUN},
        file.with_suffix(".safetensors"),
        len(card["mean"]),
        (card["image_size"][0], card["image_size"][1]),
        card["mean"],
        card["std"],
        card["interpolation"],
        card["crop_pct"],
        card["classes"],
        card.get("sha256"),
        licence_of(card) if "license" in card else derived(licences_in(card).values()),
        card.get("embedding"),
    )


def _from_config(file: Path) -> Described:
    """From a config.json of `timm.models.save_for_hf` or `push_to_hf_hub`. Older ones have all values on one level."""
    import timm

    try:
        config = json.loads(file.read_text())
        if is_transformers(config):
            return Described(**read_transformers(file.parent, config))
        if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
            raise UserError(
                f"{file} is not in the format of timm or transformers: it has neither `architecture` nor `model_type`. Set "
                "`model` to the timm name and `weights` to the weights file"
            )
        model = config["architecture"]
        if not timm.is_model(model):
            raise UserError(f"{file}: timm has no model `{printable(model)}`.{models_like(model)}")
        made_for = config.get("pretrained_cfg", config)
        own = timm.get_pretrained_cfg(model)
        defaults = own.to_dict() if own else {}
        cfg = {key: made_for.get(key, defaults.get(key)) for key in ("input_size", "mean", "std")}
        channels, height, width = cfg["input_size"]
        args = config.get("model_args") or {}
        size = args.get("img_size") or (height, width)
        names = config.get("label_names") or made_for.get("label_names")
        return Described(
            model,
            {key: value for key, value in args.items() if key not in SET_BY_RUN},
            next((file.parent / n for n in HF_WEIGHTS if is_file(file.parent / n)), file.parent / HF_WEIGHTS[0]),
            int(args.get("in_chans") or channels),
            (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            [float(v) for v in cfg["mean"]],
            [float(v) for v in cfg["std"]],
            str(made_for.get("interpolation", "bicubic")),
            float(made_for.get("crop_pct") or 0.875),
            [str(name) for name in names] if isinstance(names, list) else None,
            None,
            licence_of(made_for),
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a valid timm configuration: {shortened(first_line(error))}") from None


# ---------------------------------------------------------------- errors about folders and files without a model


def _about_folder(folder: Path, role: str) -> str:
    if is_file(folder / "head.json"):
        return f"it contains a head from `scalekd head`; set {role}.head={folder}, and {role}.model to the backbone"
    if files := weights_in(folder):
        return f"it has neither student.json (from a scalekd run) nor config.json (timm's format). {_weights_alone(files[0], role)}"
    return (
        "it has neither student.json with student.safetensors (from a scalekd run) nor config.json with model.safetensors "
        "(timm's format)"
    )


def _about_file(file: Path, role: str) -> str:
    if any(is_file(file.parent / name) for name in ("student.json", "config.json")) and file.name.endswith(ENDINGS):
        return f"{file} is a file; use its folder: {role}.model={file.parent}"
    return f"{file} is a file. " + _weights_alone(file, role)


def _weights_alone(file: Path, role: str) -> str:
    """How to set model and weights for a weights file, with the arguments that train.py wrote in it or next to it."""
    sources = ((path, train_arguments(path)) for path in (file, file.parent / "args.yaml"))
    path, arguments = next((source for source in sources if source[1]), (file, {}))
    text = f"{path.name} says: {as_text(arguments)}. " if arguments else ""
    return f"{text}Set model to the timm name and weights to the file: {as_overrides(arguments, file, role)}"
