"""`scalekd head`: a linear classifier for the user's classes on a frozen teacher's pooled features.

Features -> cache -> strength and temperature on held-out training images -> head.safetensors and head.json, which
`teacher.head` of a recipe names. docs/any-teacher.md tells how to read the numbers.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics as stats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .compare.results import half_width
from .config import Data, Model, Section, described, height_and_width
from .data import Images, Split, eval_batches, open_split, seed_from
from .distiller import interpolation
from .errors import UserError, printable
from .features import FEATURES, Backbone, features, say, sensible_crop, some
from .files import make_folder, replacing, write_text
from .head_solver import STRENGTHS, Choice, Linear, choose, fit, scores
from .models import Loaded, backbone_sha256, build_model, put_head, sha256_of, statistics
from .provenance import git_state, machine, versions


class Teacher(Backbone):
    """The frozen backbone as a recipe's teacher, with the names that its head is kept under."""

    def __init__(self, spec: Model, data: Data, crop_pct: float | None, device: torch.device):
        own = timm.get_pretrained_cfg(spec.model)
        size = height_and_width(spec.image_size or (tuple(own.input_size[1:]) if own else data.image_size))
        with_options = _as_options(build_model)
        model, self.loaded = with_options(spec, channels=data.channels, image_size=size, classes=None, where="teacher")
        _refuse_untrained(self.loaded)
        mean, std = _as_options(statistics)(model, spec, data.channels, "teacher")
        card = {
            "model": spec.model,
            "kwargs": {k: v for k, v in spec.kwargs.items() if k != "num_classes"},
            "weights": str(spec.weights),
            "sha256": backbone_sha256(model, self.loaded),
            "channels": data.channels,
            "image_size": list(size),
            "mean": list(mean),
            "std": list(std),
            "interpolation": interpolation(model),
            "crop_pct": sensible_crop(resolve_model_data_config(model)["crop_pct"]) if crop_pct is None else crop_pct,
        }
        super().__init__(model, card, device)
        self.spec = spec

    @torch.inference_mode()
    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        return model.to(self.device).eval()(self.normalised(images)).float().cpu()


def parsed(section: type[Section], values: dict[str, Any]) -> Any:
    """`section` with these values, less those that are None. Raises `UserError` that names the options."""
    try:
        return section.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        lines = [line for e in error.errors() for line in described(dict(e), section)]
        raise UserError("\n".join(re.sub(r"^(?!model)[a-z_]+", _option, line) for line in lines)) from None


def _option(key: re.Match[str]) -> str:
    name = {"train": "data"}.get(key[0], key[0])
    return "--" + name.replace("_", "-")


def fit_head(
    spec: Model,
    data: Data,
    out: Path,
    device: torch.device,
    console: Console,
    *,
    crop_pct: float | None = None,
    draws: int = 1,
    val_limit: int | None = None,
    cache: Path = FEATURES,
) -> dict[str, Any]:
    """Fits a head, writes `out`/head.safetensors and `out`/head.json, prints the figures; returns the card.

    spec: the teacher; data: as in a recipe, `limit` labels of `train`, seeded by `seed`. crop_pct: timm's for that
    model unless given. draws: so many sets of labels, with the seeds `seed`, `seed` + 1, ...; the first one's head is
    kept. val_limit: use only so many validation images. cache: where features are kept. Raises `UserError`.
    """
    began = time.perf_counter()
    _check_folder(out)
    splits = [open_split(data.model_copy(update={"seed": data.seed + k})) for k in range(draws)]
    for split in splits:
        _refuse_empty_classes(split, data)
    teacher = Teacher(spec, data, crop_pct, device)
    told = f"{teacher.spec.model}, sha256 {teacher.card['sha256'][:12]}, {teacher.size[0]}x{teacher.size[1]}"
    say(console, f"{told}: {teacher.loaded.matched} of {teacher.loaded.total} tensors from {teacher.loaded.source}")

    classes = splits[0].classes
    choices, heads, validations = list[Choice](), list[Linear](), list[dict[str, dict[str, float]]]()
    for k, split in enumerate(splits):
        x, y = features(teacher, split.train, split.train_indices, str(data.train), cache, console)
        choice = choose(x, y, len(classes), seed_from("head", data.seed + k))
        # the whole, with the penalty as chosen: in a sum over images it stands for the same prior
        plain = fit(x, y, len(classes), choice.strength)
        head = Linear(plain.weight / choice.temperature, plain.bias / choice.temperature)
        val_indices = some(split.val, split.val_indices, val_limit, data.seed)
        x, y = features(teacher, split.val, val_indices, str(data.val or data.train), cache, console)
        validation = {"before": scores(plain(x), y), "after": scores(head(x), y)}
        choices.append(choice)
        heads.append(head)
        validations.append(validation)
        if draws > 1:
            say(
                console,
                f"draw {k + 1} of {draws}: top-1 {validation['after']['top1']:.2f} %, strength {choice.strength:g}",
            )

    top1 = [validation["after"]["top1"] for validation in validations]
    choice = choices[0]
    tensors = {"weight": heads[0].weight.float().contiguous(), "bias": heads[0].bias.float().contiguous()}
    difference = _difference(teacher, splits[0], heads[0], tensors)
    make_folder(out)
    with replacing(out / "head.safetensors") as file:
        file.write(save(tensors))
    card = teacher.card | {
        "classes": classes,
        "labels": len(splits[0].train_indices),
        "head_sha256": sha256_of(out / "head.safetensors"),
        "data": data.model_dump(mode="json", include={"train", "val", "val_fraction", "limit", "seed"}),
        "features": tensors["weight"].shape[1],
        "strength": choice.strength,
        "temperature": choice.temperature,
        "held_out": choice.held_out,
        "tried": choice.tried,
        "validation": validations[0],
        "draws": {
            "seeds": [data.seed + k for k in range(draws)],
            "top1": top1,
            "mean": stats.mean(top1),
            "half_width_95": half_width(top1),
            "strengths": [c.strength for c in choices],
        },
        "largest_logit_difference": difference,
        "provenance": {
            "command": shlex.join(["scalekd", *sys.argv[1:]]),
            **versions(),
            "machine": machine(device),
            "git": git_state(),
            "seconds": round(time.perf_counter() - began, 1),
        },
    }
    write_text(out / "head.json", json.dumps(card, indent=2) + "\n")  # last: a folder without it holds no head
    _tell(console, card, choice, out)
    return card


# ---------------------------------------------------------------- checks


def _as_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, its errors naming this command's options where they name a recipe's keys."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            text = str(error).replace("data.channels", "--channels")
            for option in ("weights", "kwargs", "mean", "std"):
                text = text.replace(f"teacher.{option}", f"--{option}")
            raise UserError(text) from None

    return call


def _refuse_untrained(loaded: Loaded) -> None:
    if loaded.source == "random":
        raise UserError("--weights: a head on initial values would know nothing; name a file, or pretrained")
    if loaded.untrained:
        raise UserError(
            f"--weights: {loaded.initial:.0%} of the biases and norms in {loaded.source} are at their initial values: "
            "these weights were never trained; give others"
        )


def _refuse_empty_classes(split: Split, data: Data) -> None:
    targets = split.train.targets
    empty = set(range(len(split.classes))) - {targets[i] for i in split.train_indices}
    if empty:
        names = ", ".join(split.classes[i] for i in sorted(empty)[:3]) + ", ..." * (len(empty) > 3)
        few = f"--limit {data.limit} is fewer than the {len(split.classes)} classes" if data.limit else "label some"
        raise UserError(f"--data: no labelled image of {len(empty)} of the classes: {printable(names)}; {few}")


def _check_folder(out: Path) -> None:
    """Told before the minutes of a pass over the images."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give --out another folder, or remove this one")


def _difference(teacher: Teacher, split: Split, head: Linear, tensors: dict[str, Tensor]) -> float:
    """The largest difference between the logits of the model with its new classifier and those of the fit."""
    model, _ = put_head(teacher.model.cpu(), teacher.loaded, tensors, teacher.spec.model, teacher.size, "head")
    teacher.model.to(teacher.device)
    images = Images(split.train, split.train_indices[:8], teacher.transform, None)
    (batch,) = eval_batches(images, 8, 0, False)
    wanted = head(teacher.pooled(batch.images))
    difference = (teacher.logits(model, batch.images).double() - wanted).abs().max().item()
    if not difference < 1e-3 * (1 + wanted.abs().max().item()):
        raise UserError(
            f"{teacher.spec.model} does not give its logits by one linear layer on its pooled features (they differ by "
            f"{difference:.1e}): a linear head does not fit it. Fine-tune it instead (`scalekd train own-teacher`)"
        )
    return difference


# ---------------------------------------------------------------- what is printed


def _tell(console: Console, card: dict[str, Any], choice: Choice, out: Path) -> None:
    labels = f"{card['labels']} labels of {len(card['classes'])} classes, {card['features']} features"
    if choice.held_out:
        images = choice.held_out["after"]["images"]
        say(
            console,
            f"{labels}; strength {choice.strength:.3g}, temperature {choice.temperature:.3f}, chosen on {images}",
        )
        if choice.strength in (STRENGTHS[0], STRENGTHS[-1]):
            say(console, f"the strength is at the end of what is tried, {STRENGTHS[-1]:g} to {STRENGTHS[0]:g}")
    else:
        say(console, f"{labels}; one of each class, so nothing could be held out: strength {choice.strength:g}")
    say(console, f"{'':30}{'top-1 %':>9}{'top-5 %':>9}{'nll':>9}{'ECE %':>9}{'images':>9}")
    for part, found in (("held out", choice.held_out), ("validation", card["validation"])):
        for when, s in found.items():
            row = "".join(f"{s[k]:9.{digits}f}" for k, digits in (("top1", 2), ("top5", 2), ("nll", 4), ("ece", 2)))
            say(console, f"{part + ', ' + when + ' temperature':30}{row}{s['images']:9}")
    if half := card["draws"]["half_width_95"]:
        told = f"{len(card['draws']['top1'])} draws of the labels: top-1 {card['draws']['mean']:.2f} ± {half:.2f} %"
        say(console, f"{told} (95 % interval of the mean)")
    say(console, f"{out / 'head.safetensors'}  largest difference of logits {card['largest_logit_difference']:.1e}")
    weights = "" if card["weights"] == "pretrained" else f"teacher.weights={card['weights']} "
    size = card["image_size"][0] if len(set(card["image_size"])) == 1 else f"'{card['image_size']}'"
    say(console, f"In `scalekd train`: teacher.head={out} {weights}teacher.image_size={size}")
    say(
        console,
        f"As it was fitted: augment.crop_pct={card['crop_pct']:g} augment.interpolation={card['interpolation']}",
    )
