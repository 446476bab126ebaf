"""`scalekd head`: a linear classifier for the user's classes on a frozen teacher's pooled features.

Features -> cache -> strength and temperature on held-out training images -> head.safetensors and head.json, which
`teacher.head` of a recipe names. docs/any-teacher.md tells how to read the numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import statistics as stats
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .compare.results import half_width
from .config import Augment, Data, Model, Section, described, height_and_width
from .data import Images, Split, _by_class, eval_batches, eval_transform, open_split, seed_from
from .distiller import interpolation
from .errors import UserError, counted, printable
from .files import make_folder, replacing, write_text
from .head_solver import STRENGTHS, Choice, Linear, choose, fit, scores
from .models import Loaded, backbone_sha256, build_model, put_head, sha256_of, statistics
from .runlog import duration
from .runs import git_state, machine, versions
from .sources import Source

CHUNK = 512  # images whose features are written to the cache at a time
BATCH = 64
TELL_EVERY = 15.0  # seconds


class Teacher:
    """The frozen backbone, what it is shown, and the names of both that its features are kept under."""

    def __init__(self, spec: Model, data: Data, crop_pct: float | None, device: torch.device):
        own = timm.get_pretrained_cfg(spec.model)
        size = spec.image_size or (tuple(own.input_size[1:]) if own else data.image_size)
        self.size = height_and_width(size)
        with_options = _as_options(build_model)
        self.model, self.loaded = with_options(
            spec, channels=data.channels, image_size=self.size, classes=None, where="teacher"
        )
        _refuse_untrained(self.loaded)
        self.sha256 = backbone_sha256(self.model, self.loaded)
        self.model.to(device).eval().requires_grad_(False)
        self.spec, self.device = spec, device
        mean, std = _as_options(statistics)(self.model, spec, data.channels, "teacher")
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
        if crop_pct is None:  # below what `augment.crop_pct` may be there is nothing sensible
            crop_pct = max(0.1, min(1.0, resolve_model_data_config(self.model)["crop_pct"]))
        augment = Augment(crop_pct=crop_pct, interpolation=interpolation(self.model))
        self.transform = eval_transform(data.model_copy(update={"image_size": self.size}), augment)
        self.card: dict[str, Any] = {
            "model": spec.model,
            "kwargs": {k: v for k, v in spec.kwargs.items() if k != "num_classes"},
            "weights": str(spec.weights),
            "sha256": self.sha256,
            "channels": data.channels,
            "image_size": list(self.size),
            "mean": list(mean),
            "std": list(std),
            "interpolation": augment.interpolation,
            "crop_pct": crop_pct,
        }

    @torch.inference_mode()
    def pooled(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to (B, D) float32: what the model's own classifier would be given."""
        return pooled(self.model, self._normalised(images)).float().cpu()

    @torch.inference_mode()
    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        return model.to(self.device).eval()(self._normalised(images)).float().cpu()

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.to(self.device).float() / 255 - self.mean) / self.std


def pooled(model: Any, images: Tensor) -> Tensor:
    """(B, D): timm's `forward_head(..., pre_logits=True)`, with the model's own pooling and norm. Raises `UserError`."""
    x = model.forward_head(model.forward_features(images), pre_logits=True)
    if isinstance(x, Tensor) and x.ndim == 4 and x.shape[-2:] == (1, 1):
        x = x.flatten(1)  # the classifier is a 1x1 convolution
    if not isinstance(x, Tensor) or x.ndim != 2:
        raise UserError(
            f"{type(model).__name__} does not pool into one vector per image: a linear head does not fit it"
        )
    return x


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
    cache: Path = Path("runs/features"),
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
    told = f"{teacher.spec.model}, sha256 {teacher.sha256[:12]}, {teacher.size[0]}x{teacher.size[1]}"
    _say(console, f"{told}: {teacher.loaded.matched} of {teacher.loaded.total} tensors from {teacher.loaded.source}")

    classes = splits[0].classes
    choices, heads, validations = list[Choice](), list[Linear](), list[dict[str, dict[str, float]]]()
    for k, split in enumerate(splits):
        x, y = _features(teacher, split.train, split.train_indices, data.train, cache, console)
        choice = choose(x, y, len(classes), seed_from("head", data.seed + k))
        # the whole, with the penalty as chosen: in a sum over images it stands for the same prior
        plain = fit(x, y, len(classes), choice.strength)
        head = Linear(plain.weight / choice.temperature, plain.bias / choice.temperature)
        val_indices = _some(split.val, split.val_indices, val_limit, data.seed)
        x, y = _features(teacher, split.val, val_indices, data.val or data.train, cache, console)
        validation = {"before": scores(plain(x), y), "after": scores(head(x), y)}
        choices.append(choice)
        heads.append(head)
        validations.append(validation)
        if draws > 1:
            _say(
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


# ---------------------------------------------------------------- features, computed once


def _features(
    teacher: Teacher, source: Source, indices: Sequence[int], name: str, cache: Path, console: Console
) -> tuple[Tensor, Tensor]:
    """((N, D) float32, (N,) targets) of these images, in their order; read from `cache` as far as they are there."""
    folder = cache / _cache_name(teacher, source, name)
    known: dict[int, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        try:
            part = load_file(file)
            known |= dict(zip(part["indices"].tolist(), part["features"]))
        except (SafetensorError, OSError, KeyError):  # cut off, or of something else: its images are computed again
            continue
    missing = sorted(set(indices) - known.keys())
    _say(console, f"{name}: features of {counted(len(indices), 'image')}, {len(indices) - len(missing)} from {folder}")
    began = told = time.perf_counter()
    done = 0
    for first in range(0, len(missing), CHUNK):
        chunk = missing[first : first + CHUNK]
        found = []
        for batch in eval_batches(Images(source, chunk, teacher.transform, None), BATCH, 0, False):
            found.append(teacher.pooled(batch.images))
            done += len(batch.images)
            if time.perf_counter() - told > TELL_EVERY:
                told = time.perf_counter()
                left = (told - began) / done * (len(missing) - done)
                _say(console, f"  {done} of {len(missing)}, about {duration(left)} left")
        features = torch.cat(found)
        if not features.isfinite().all():
            raise UserError("the teacher's features are not finite; look at its weights, mean and std")
        _keep(folder / f"{seed_from(*chunk):016x}.safetensors", chunk, features)
        known |= dict(zip(chunk, features))
    targets = source.targets
    return torch.stack([known[i] for i in indices]), torch.tensor([targets[i] for i in indices])


def _keep(file: Path, indices: Sequence[int], features: Tensor) -> None:
    make_folder(file.parent)
    with replacing(file) as opened:
        opened.write(save({"indices": torch.tensor(indices), "features": features.contiguous()}))


def _cache_name(teacher: Teacher, source: Source, name: str) -> str:
    """Differs where the weights, the preprocessing or the images differ: names, labels and the pixels of a sample.

    Pixels of all images would cost nearly what a small teacher costs.
    """
    told = {k: v for k, v in teacher.card.items() if k != "weights"}  # a copy of the file under another name is as good
    summed = hashlib.sha256(json.dumps([told, name, timm.__version__], sort_keys=True, default=str).encode())
    for i, target in enumerate(source.targets):
        summed.update(f"{source.where(i)} {target}\n".encode())
    sample = range(0, len(source), max(1, len(source) // 16))[:16]
    for batch in eval_batches(Images(source, sample, teacher.transform, None), 16, 0, False):
        summed.update(batch.images.numpy().tobytes())
    return summed.hexdigest()[:24]


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


def _some(source: Source, indices: Sequence[int], limit: int | None, seed: int) -> Sequence[int]:
    """`limit` of the indices, the same number per class, chosen by `seed`; all without one."""
    targets = source.targets
    order = _by_class([targets[i] for i in indices], seed)
    return sorted(indices[i] for i in order[:limit])


# ---------------------------------------------------------------- what is printed


def _tell(console: Console, card: dict[str, Any], choice: Choice, out: Path) -> None:
    labels = f"{card['labels']} labels of {len(card['classes'])} classes, {card['features']} features"
    if choice.held_out:
        images = choice.held_out["after"]["images"]
        _say(
            console,
            f"{labels}; strength {choice.strength:.3g}, temperature {choice.temperature:.3f}, chosen on {images}",
        )
        if choice.strength in (STRENGTHS[0], STRENGTHS[-1]):
            _say(console, f"the strength is at the end of what is tried, {STRENGTHS[-1]:g} to {STRENGTHS[0]:g}")
    else:
        _say(console, f"{labels}; one of each class, so nothing could be held out: strength {choice.strength:g}")
    _say(console, f"{'':30}{'top-1 %':>9}{'top-5 %':>9}{'nll':>9}{'ECE %':>9}{'images':>9}")
    for part, found in (("held out", choice.held_out), ("validation", card["validation"])):
        for when, s in found.items():
            row = "".join(f"{s[k]:9.{digits}f}" for k, digits in (("top1", 2), ("top5", 2), ("nll", 4), ("ece", 2)))
            _say(console, f"{part + ', ' + when + ' temperature':30}{row}{s['images']:9}")
    if half := card["draws"]["half_width_95"]:
        told = f"{len(card['draws']['top1'])} draws of the labels: top-1 {card['draws']['mean']:.2f} ± {half:.2f} %"
        _say(console, f"{told} (95 % interval of the mean)")
    _say(console, f"{out / 'head.safetensors'}  largest difference of logits {card['largest_logit_difference']:.1e}")
    size = "x".join(map(str, card["image_size"]))
    _say(console, f"In `scalekd train`: teacher.head={out}, with the same teacher.weights, shown {size} pixels")


def _say(console: Console, text: str) -> None:
    console.print(printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)
