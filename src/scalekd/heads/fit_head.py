"""`scalekd head`: fits a linear classifier for the user's classes on a frozen teacher's pooled features.

It writes head.safetensors and head.json; the recipe key `teacher.head` names their folder. runs/heads.py calls
`fit_head` for `teacher.head: fit`. docs/how-to/any-teacher.md explains the figures.
"""

from __future__ import annotations

import json
import statistics as stats
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from rich.console import Console
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.common.files import make_folder, replacing, write_text
from scalekd.common.intervals import half_width
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.parallel import pick_device
from scalekd.common.provenance import command_line, git_state, machine, versions
from scalekd.common.sections import height_and_width, section_of
from scalekd.common.seeds import seed_from
from scalekd.common.set_figures import Scores, class_table
from scalekd.common.text import printable, say
from scalekd.data.batches import Images, bad_images, eval_batches
from scalekd.data.description import KEY, tell_data
from scalekd.data.options import Augment, Data
from scalekd.data.sources.open import pair_of
from scalekd.data.split import Split, open_split
from scalekd.data.targets import are_sets, classes_in
from scalekd.models.build import build_model
from scalekd.models.fitted_head import put_head
from scalekd.models.inputs import input_doubt, sensible_crop, statistics
from scalekd.models.inputs import interpolation as usual_interpolation
from scalekd.models.options import Model
from scalekd.models.weights.folder import beside, written_out
from scalekd.models.weights.match import sha256_of
from scalekd.models.weights.trained import Loaded, backbone_sha256, trained

from .features import FEATURES, Backbone, features, some
from .linear import Choice, Linear, choose, fit
from .page import main_figure, tell, tell_use
from .scores import before_and_after


class Teacher(Backbone):
    """The frozen backbone that a recipe describes.

    where: its recipe key, for errors. crop_pct, interpolation: timm's defaults for the model if None.
    Raises `UserError`, also for untrained weights.
    """

    def __init__(
        self,
        spec: Model,
        data: Data,
        device: torch.device,
        where: str,
        crop_pct: float | None,
        interpolation: str | None,
    ):
        own = timm.get_pretrained_cfg(spec.model)
        size = height_and_width(spec.image_size or (tuple(own.input_size[1:]) if own else data.image_size))
        model, self.loaded = build_model(spec, channels=data.channels, image_size=size, classes=None, where=where)
        mean, std = statistics(model, spec, data.channels, where)
        doubts = [_untrained_doubt(self.loaded, where)]
        if doubt := input_doubt(mean, std):
            doubts.append(f"mean {list(mean)}, std {list(std)}: {doubt}")
        card = {
            "model": spec.model,
            "kwargs": {k: v for k, v in spec.kwargs.items() if k != "num_classes"},
            "weights": str(spec.weights),
            "sha256": backbone_sha256(model, self.loaded),
            "channels": data.channels,
            "image_size": list(size),
            "mean": list(mean),
            "std": list(std),
            "interpolation": interpolation or usual_interpolation(model),
            "crop_pct": crop_pct or sensible_crop(resolve_model_data_config(model)["crop_pct"]),
        }
        if self.loaded.prefix:  # another model in the same file has its own cache
            card["prefix"] = self.loaded.prefix
        super().__init__(model, card, device, [doubt for doubt in doubts if doubt])
        self.spec = spec

    @torch.inference_mode()
    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) to the logits of `model` with this preprocessing, float32, on the CPU."""
        return model.to(self.device).eval()(self.normalised(images)).float().cpu()


def fit_head(
    spec: Model,
    data: Data,
    out: Path,
    device: torch.device,
    console: Console,
    *,
    where: str = "teacher",
    crop_pct: float | None = None,
    interpolation: str | None = None,
    draws: int = 1,
    val_limit: int | None = None,
    cache: Path = FEATURES,
) -> dict[str, Any]:
    """Fits a head, writes `out`/head.safetensors and `out`/head.json, and prints the results. Returns the card.

    Args:
        spec: the teacher. Its recipe key is `where`, for errors.
        data: the recipe section; `limit` labels of `train` are drawn with `seed`.
        crop_pct, interpolation: timm's defaults for the model if None.
        draws: number of random draws of the labels, with the seeds `seed`, `seed` + 1, ... The first head is kept.
        val_limit: number of validation images; all if None.
        cache: folder of the cached features.

    Raises `UserError`.
    """
    began = time.perf_counter()
    splits = [open_split(data.model_copy(update={"seed": data.seed + k})) for k in range(draws)]
    for split in splits:
        _refuse_empty_classes(split, data)
    tell_data(console, splits[0].described)
    teacher = Teacher(spec, data, device, where, crop_pct, interpolation)
    _tell_backbone(teacher, console)
    fits = []
    for k, split in enumerate(splits):
        val_indices = some(split.val, split.val_indices, val_limit, data.seed)
        fits.append(_fit_split(teacher, split, val_indices, data, seed_from("head", data.seed + k), cache, console))
        if draws > 1:
            name, figure = main_figure(fits[-1].validation["after"])
            say(console, f"draw {k + 1} of {draws}: {name} {figure:.2f} %, strength {fits[-1].choice.strength:g}")

    head, choice = fits[0].head, fits[0].choice
    tensors = {"weight": head.weight.float().contiguous(), "bias": head.bias.float().contiguous()}
    difference = _difference(teacher, splits[0], data, head, tensors)
    make_folder(out)
    with replacing(out / "head.safetensors") as file:
        file.write(save(tensors))
    card = _card(teacher, splits[0], data, fits, sha256_of(out / "head.safetensors")) | {
        KEY: dict(splits[0].described),
        "largest_logit_difference": difference,
        "provenance": {
            "command": command_line(),
            **versions(),
            "machine": machine(device),
            "git": git_state(),
            "seconds": round(time.perf_counter() - began, 1),
        },
    }
    write_text(out / "head.json", json.dumps(card, indent=2) + "\n")  # last: a folder without it holds no head
    tell(console, card, choice, out)
    return card


def _tell_backbone(teacher: Teacher, console: Console) -> None:
    text = f"{teacher.spec.model}, sha256 {teacher.card['sha256'][:12]}, {teacher.size[0]}x{teacher.size[1]}"
    say(console, f"{text}: {teacher.loaded.matched} of {teacher.loaded.total} tensors from {teacher.loaded.source}")
    for doubt in teacher.doubts:
        say(console, f"warn: {doubt}")


class Fit(NamedTuple):
    """The head for one draw of the labels."""

    choice: Choice
    head: Linear
    validation: dict[str, dict[str, float]]  # `scores` before and after the temperature
    classes: list[dict[str, Any]]  # with sets of classes the `class_table` of the validation images, else []


def _fit_split(
    teacher: Teacher,
    split: Split,
    val_indices: Sequence[int],
    data: Data,
    seed: int,
    cache: Path,
    console: Console,
) -> Fit:
    classes, several = len(split.classes), are_sets(split.train.targets)
    bad = bad_images("train", data, len(split.train_indices))
    x, y = features(teacher, split.train, split.train_indices, str(data.train), cache, console, bad)
    what = "labelled images" if several else "labels"
    say(console, f"fitting {classes} classes to {len(y)} {what}; the strength is chosen on held-out ones")
    if several and (always := [split.classes[c] for c in y.bool().all(0).nonzero().flatten().tolist()]):
        say(
            console,
            f"warn: every labelled image has {printable(', '.join(always[:3]))}: the head will see it everywhere",
        )
    choice = choose(x, y, classes, seed, partial(say, console))
    # all labels, with the chosen penalty: in a sum over the images it is the same prior
    plain = fit(x, y, classes, choice.strength)
    head = Linear(plain.weight / choice.temperature, plain.bias / choice.temperature)
    bad = bad_images("val", data, len(val_indices))
    x, y = features(teacher, split.val, val_indices, str(data.val or data.train), cache, console, bad)
    if several and not y.any():
        raise UserError("none of the validation images has a label, so there is no mAP; set another data.val")
    validation = before_and_after(plain(x), y, choice.temperature, choice.threshold)
    by_class = class_table(Scores(head(x), y > 0.5), split.classes, choice.threshold) if choice.threshold else []
    return Fit(choice, head, validation, by_class)


def _card(teacher: Teacher, split: Split, data: Data, fits: Sequence[Fit], head_sha256: str) -> dict[str, Any]:
    """The contents of head.json, without logit difference and provenance. split, fits[0]: of the head that is kept."""
    choice = fits[0].choice
    key = "map" if fits[0].choice.threshold else "top1"
    figures = [f.validation["after"][key] for f in fits]
    sets = {"multi_label": True, "threshold": choice.threshold, "by_class": fits[0].classes} if key == "map" else {}
    return teacher.card | {
        "prefix": teacher.loaded.prefix,
        "classes": split.classes,
        "labels": len(split.train_indices),
        "head_sha256": head_sha256,
        "data": data.model_dump(mode="json", include={"train", "val", "val_fraction", "limit", "seed"}),
        "features": fits[0].head.weight.shape[1],
        "strength": choice.strength,
        "temperature": choice.temperature,
        "held_out": choice.held_out,
        "tried": choice.tried,
        "validation": fits[0].validation,
        "draws": {
            "seeds": [data.seed + k for k in range(len(fits))],
            key: figures,
            "mean": stats.mean(figures),
            "half_width_95": half_width(figures),
            "strengths": [f.choice.strength for f in fits],
        },
        **sets,
    }


def fit_named(
    teacher: dict[str, Any],
    data: dict[str, Any],
    out: Path,
    console: Console,
    *,
    crop_pct: float | None,
    draws: int,
    val_limit: int | None,
    cache: Path | None,
    device_name: str | None,
) -> dict[str, Any]:
    """`fit_head` with plain values of the recipe sections `teacher` and `data`. Returns the card.

    `teacher["model"]` may be a model folder, and `data["train"]` a source that has both parts. Raises `UserError`.
    """
    for name, count in (("draws", draws), ("val_limit", val_limit)):
        if count is not None and count < 1:
            raise UserError(f"`{name}` is {count} and must be 1 or more")
    spec = section_of(Model, written_out(teacher, "teacher", data["channels"] or 3), "teacher")
    train, val = pair_of(data["train"], test=True) or (data["train"], None)
    read = section_of(Data, data | {"train": train, "val": data["val"] or val}, "data")
    if crop_pct is not None:
        crop_pct = section_of(Augment, {"crop_pct": crop_pct}, "augment").crop_pct
    elif spec.model != teacher["model"] and (folder := beside(Path(str(spec.weights)))):
        crop_pct = folder.crop_pct
    check_folder(out)
    device = pick_device(device_name)
    with explain_out_of_memory(device, "Try a smaller `image_size`, or the CPU with `device`."):
        card = fit_head(
            spec,
            read,
            out,
            device,
            console,
            crop_pct=crop_pct,
            draws=draws,
            val_limit=val_limit,
            cache=cache or FEATURES,
        )
    tell_use(console, spec, card, out)
    return card


# ---------------------------------------------------------------- checks


def _untrained_doubt(loaded: Loaded, where: str) -> str:
    """A warning about weights that may be untrained, or "". Raises `UserError` if they are untrained."""
    if loaded.source == "random":
        raise UserError(f"{where}.weights: a head needs a trained backbone; set it to `pretrained` or to a file")
    verdict = trained(loaded)
    message = f"{loaded.source}: {verdict.text}"
    if verdict.status == "fail":
        raise UserError(f"{where}.weights: {message}")
    return message if verdict.status == "warn" else ""


def _refuse_empty_classes(split: Split, data: Data) -> None:
    found = {c for i in split.train_indices for c in classes_in(split.train.targets[i])}
    empty = set(range(len(split.classes))) - found
    if empty:
        names = ", ".join(split.classes[i] for i in sorted(empty)[:3]) + ", ..." * (len(empty) > 3)
        few = f"data.limit {data.limit} is fewer than the {len(split.classes)} classes"
        if data.limit and data.limit >= len(split.classes):  # sets of classes: an image may count for another class
            few = f"data.limit {data.limit} leaves them out; raise it"
        fix = few if data.limit else "label some"
        count = f"{len(empty)} of the {len(split.classes)} classes"
        raise UserError(f"data.train: no labelled images of {count}: {printable(names)}; {fix}")


def check_folder(out: Path) -> None:
    """Raises `UserError` if the folder is not empty. Call it before the pass over the images."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; choose another folder with `out`, or remove this one")


def _difference(teacher: Teacher, split: Split, data: Data, head: Linear, tensors: dict[str, Tensor]) -> float:
    """The largest logit difference between the model with its new classifier and the fit, on up to 8 images."""
    model, _ = put_head(teacher.model.cpu(), teacher.loaded, tensors, teacher.spec.model, teacher.size, "head")
    teacher.model.to(teacher.device)
    bad = bad_images("train", data, len(split.train_indices))
    batch = next(eval_batches(Images(split.train, split.train_indices, teacher.transform, None, bad), 8, 0, False))
    wanted = head(teacher.pooled(batch.images))
    difference = (teacher.logits(model, batch.images).double() - wanted).abs().max().item()
    if not difference < 1e-3 * (1 + wanted.abs().max().item()):
        raise UserError(
            f"{teacher.spec.model} does not compute its logits with one linear layer on its pooled features (they differ by "
            f"{difference:.1e}), so it cannot have a linear head; fine-tune it instead (`scalekd train own-teacher`)"
        )
    return difference
