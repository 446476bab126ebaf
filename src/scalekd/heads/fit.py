"""`scalekd head`: a linear classifier for the user's classes on a frozen teacher's pooled features.

Features -> cache -> strength and temperature on held-out training images -> head.safetensors and head.json, which
`teacher.head` of a recipe names. run_head.py does the same for a recipe's `teacher.head: fit`. docs/how-to/any-teacher.md
tells how to read the numbers.
"""

from __future__ import annotations

import json
import statistics as stats
import time
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.common.files import make_folder, replacing, write_text
from scalekd.common.intervals import half_width
from scalekd.common.parallel import pick_device
from scalekd.common.provenance import command_line, git_state, machine, versions
from scalekd.common.sections import height_and_width, section_of
from scalekd.common.seeds import seed_from
from scalekd.common.shortages import explain_out_of_memory
from scalekd.common.text import printable, say
from scalekd.data.batches import Images, eval_batches
from scalekd.data.options import Augment, Data
from scalekd.data.sources.open import pair_of
from scalekd.data.split import Split, open_split
from scalekd.models.build import build_model
from scalekd.models.fitted_head import put_head
from scalekd.models.inputs import input_doubt, sensible_crop, statistics
from scalekd.models.inputs import interpolation as usual_interpolation
from scalekd.models.options import Model
from scalekd.models.weights.folder import beside, written_out
from scalekd.models.weights.match import sha256_of
from scalekd.models.weights.trained import Loaded, backbone_sha256, trained

from .features import FEATURES, Backbone, features, some
from .page import tell, tell_use
from .solver import Choice, Linear, choose, fit, scores


class Teacher(Backbone):
    """The frozen backbone as a recipe's teacher, with the names that its head is kept under.

    where: in the recipe; errors name it. crop_pct, interpolation: timm's for that model unless given.
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
        doubts = [_refuse_untrained(self.loaded, where)]
        if told := input_doubt(mean, std):
            doubts.append(f"mean {list(mean)}, std {list(std)}: {told}")
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
        if self.loaded.prefix:  # features of another model in the same file are kept apart
            card["prefix"] = self.loaded.prefix
        super().__init__(model, card, device, [doubt for doubt in doubts if doubt])
        self.spec = spec

    @torch.inference_mode()
    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
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
    """Fits a head, writes `out`/head.safetensors and `out`/head.json, prints the figures; returns the card.

    spec: the teacher, which a recipe describes at `where`; errors are told in a recipe's keys. data: as in a recipe,
    `limit` labels of `train`, seeded by `seed`. crop_pct, interpolation: timm's for that model unless given. draws: so
    many sets of labels, with the seeds `seed`, `seed` + 1, ...; the first one's head is kept. val_limit: use only so
    many validation images. cache: where features are kept. Raises `UserError`.
    """
    began = time.perf_counter()
    splits = [open_split(data.model_copy(update={"seed": data.seed + k})) for k in range(draws)]
    for split in splits:
        _refuse_empty_classes(split, data)
    teacher = Teacher(spec, data, device, where, crop_pct, interpolation)
    told = f"{teacher.spec.model}, sha256 {teacher.card['sha256'][:12]}, {teacher.size[0]}x{teacher.size[1]}"
    say(console, f"{told}: {teacher.loaded.matched} of {teacher.loaded.total} tensors from {teacher.loaded.source}")
    for doubt in teacher.doubts:
        say(console, f"warn: {doubt}")

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
        "prefix": teacher.loaded.prefix,
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
    """`fit_head` for plain values of the sections `teacher` and `data` of a recipe; returns the card.

    The folder of a model stands for its values, and a source with two parts for both. Raises `UserError`.
    """
    for name, count in (("draws", draws), ("val_limit", val_limit)):
        if count is not None and count < 1:
            raise UserError(f"`{name}` {count}: must be 1 or more")
    spec = section_of(Model, written_out(teacher, "teacher", data["channels"] or 3), "teacher")
    train, val = pair_of(data["train"]) or (data["train"], None)
    read = section_of(Data, data | {"train": train, "val": data["val"] or val}, "data")
    if crop_pct is not None:
        crop_pct = section_of(Augment, {"crop_pct": crop_pct}, "augment").crop_pct
    elif spec.model != teacher["model"] and (folder := beside(Path(str(spec.weights)))):
        crop_pct = folder.crop_pct
    check_folder(out)
    device = pick_device(device_name)
    with explain_out_of_memory(device, "Try device cpu, or a smaller image_size."):
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


def _refuse_untrained(loaded: Loaded, where: str) -> str:
    """What there is to tell of them, if anything."""
    if loaded.source == "random":
        raise UserError(f"{where}.weights: a head on initial values would know nothing; name a file, or pretrained")
    found = trained(loaded)
    told = f"{loaded.source}: {found.told}"
    if found.status == "fail":
        raise UserError(f"{where}.weights: {told}")
    return told if found.status == "warn" else ""


def _refuse_empty_classes(split: Split, data: Data) -> None:
    targets = split.train.targets
    empty = set(range(len(split.classes))) - {targets[i] for i in split.train_indices}
    if empty:
        names = ", ".join(split.classes[i] for i in sorted(empty)[:3]) + ", ..." * (len(empty) > 3)
        few = f"data.limit {data.limit} is fewer than the {len(split.classes)} classes" if data.limit else "label some"
        raise UserError(f"data.train: no labelled image of {len(empty)} of the classes: {printable(names)}; {few}")


def check_folder(out: Path) -> None:
    """Refuses a folder that holds something. Told before the minutes of a pass over the images."""
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
