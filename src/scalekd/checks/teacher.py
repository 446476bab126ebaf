"""What the pre-flight says of a teacher: its weights, names of classes, input, and how good it is on a sample."""

from __future__ import annotations

import math
from typing import Literal

import torch

from scalekd.common.errors import UserError
from scalekd.data.batches import Images, eval_batches
from scalekd.data.options import Augment
from scalekd.data.transforms import eval_transform
from scalekd.distill.run import DistillationRun, Taught, gives_embeddings, logit_losses
from scalekd.models.class_order import natural, remedy, rows, teachers_order
from scalekd.models.create import create, resolve
from scalekd.models.fitted_head import HeadCard, read_head
from scalekd.models.inputs import Statistics, default_statistics, input_doubt, interpolation
from scalekd.models.weights.folder import Described, beside

from .evidence import (
    Sample,
    better_features,
    by_neighbours,
    clearly_more,
    features_of,
    is_order,
    logits_of,
    neighbours,
    other_order,
    other_statistics,
    percent,
)
from .model import Check, shown

SAMPLE = 512  # validation images for the teacher's accuracy
BYTES = 2**28  # for the pixels of a sample
FEW = 256  # for its features, and for a second look at many classes
ENOUGH = 100  # images by which features must be clearly better than those of initial values
TIGHT = 10.0  # points: an accuracy known this well and at chance is chance


def _beside_teacher(of: Taught) -> Described | None:
    """What stands beside the file of the teacher's weights, if they are from a file."""
    weights = of.spec.weights
    return beside(resolve(weights)) if weights not in (None, "random", "pretrained") else None


def _fitted(of: Taught) -> HeadCard | None:
    """What `scalekd head` wrote beside the teacher's head, if that is where it is from."""
    return read_head(resolve(of.spec.head), f"{of.place}.head")[0] if of.spec.head else None


def class_names(run: DistillationRun, of: Taught, told: str) -> Check:
    """Beside those that the teacher's file is told to have, where the numbers are equal."""
    card = _beside_teacher(of)
    theirs = card.classes if card and not of.spec.head else None
    ours, here = list(run.classes), "here"
    if of.spec.classes is not None:
        ours, here = teachers_order(of.spec.classes, ours, of.place), f"in {of.place}.classes"
        told += f", put in the data's order from that {here}"
    if theirs is None or len(theirs) != len(ours) or theirs == [str(i) for i in range(len(theirs))]:
        return Check("classes", "ok", told)  # the file has no names
    if theirs == ours:
        return Check("classes", "ok", f"{told}, of the same names in the same order")
    odd = next(f"{i} is {a} there and {b} {here}" for i, (a, b) in enumerate(zip(theirs, ours)) if a != b)
    told += f"; what stands beside its weights names others, class {odd}"
    logits = logit_losses(run.config, of.label)
    if logits and set(theirs) == set(ours):
        fix = f"Its classes are in another order, so {', '.join(logits)} would teach the wrong ones; "
        right = theirs == list(run.classes)
        fix += f"leave {of.place}.classes out" if right else remedy(theirs, run.classes, of.place)
        return Check("classes", "fail", told, fix)
    return Check("classes", "warn", told, "If they are others, its logits are of no use")


def teacher_input(run: DistillationRun, of: Taught, told: str) -> Check:
    """The teacher's input beside what it was made for, as far as that is known."""
    card, augment, name = _beside_teacher(of), run.config.augment, f"{of.label} input"
    ours = of.teacher.mean.flatten().cpu(), of.teacher.std.flatten().cpu()
    if doubt := input_doubt(*(v.tolist() for v in ours)):
        return Check(name, "warn", told, doubt)
    if fitted := _fitted(of):  # its mean, std and size were compared when it was loaded
        told += _cut_otherwise("its head was fitted", fitted.crop_pct, fitted.interpolation, augment)
    stated = _stated(of)
    if stated is None:
        return Check(name, "ok", told)
    if card and of.teacher.size != card.image_size:
        told += f"; made for {card.image_size[0]}x{card.image_size[1]}"
    if card and not fitted:
        told += _cut_otherwise("validated", card.crop_pct, card.interpolation, augment)
    if _as_stated(of):
        return Check(name, "ok", told)
    theirs = shown(*map(torch.tensor, stated))
    if card is None and of.spec.weights != "pretrained" and _has_the_classes(run, of):
        return Check(name, "ok", f"{told}; timm says {theirs}")  # its answers will tell which is right
    if card:
        fix = f"Beside its weights stands: {theirs}; set {of.place}.mean and {of.place}.std to that if it is right"
    else:
        fix = f"timm says: {theirs}; leave {of.place}.mean and {of.place}.std out to use it"
    return Check(name, "warn", told, fix)


def _stated(of: Taught) -> Statistics | None:
    """Mean and std that the teacher was made for, as far as anything says so: its card, or timm.

    What timm says of a name counts for timm's own weights, and for a file where the recipe says otherwise.
    """
    if card := _beside_teacher(of):
        return tuple(card.mean), tuple(card.std)
    in_file = of.spec.weights not in (None, "random", "pretrained")
    if of.spec.weights == "pretrained" or (in_file and (of.spec.mean or of.spec.std)):
        return default_statistics(of.teacher.view.model)
    return None


def _as_stated(of: Taught) -> bool:
    stated = _stated(of)
    ours = of.teacher.mean.flatten().cpu(), of.teacher.std.flatten().cpu()
    return stated is not None and all(torch.allclose(a, torch.tensor(b), atol=1e-3) for a, b in zip(ours, stated))


def _has_the_classes(run: DistillationRun, of: Taught) -> bool:
    """Whether the teacher's logits can be held against the labels."""
    count = of.teacher.view.shapes.classes
    return 1 < len(run.classes) == count and not gives_embeddings(of.spec, count, count)


def _cut_otherwise(done: str, crop_pct: float, interpolation: str, augment: Augment) -> str:
    if (crop_pct, interpolation) == (augment.crop_pct, augment.interpolation):
        return ""
    return f"; {done} with crop_pct {crop_pct:g}, {interpolation}, which augment sets for both models"


def teacher_accuracy(run: DistillationRun, of: Taught) -> list[Check]:
    """By its logits on a sample, with what may be wrong with it; by its features where its classes are others."""
    if len(run.classes) < 2:
        return []
    return [_by_logits(run, of)] if _has_the_classes(run, of) else _by_features(run, of)


def _by_logits(run: DistillationRun, of: Taught) -> Check:
    classes, statistics = len(run.classes), (of.teacher.mean, of.teacher.std)
    model = of.teacher.view.model
    sample = _sample(run, of, SAMPLE)
    logits = logits_of(model, sample, *statistics)
    n = len(logits)
    top1 = 100 * (logits.argmax(1) == sample.targets).double().mean().item()
    fitted = _fitted(of)
    known = of.spec.top1 or (fitted.validation["after"]["top1"] if fitted else None)
    chance = 100 / classes
    told = f"{top1:.1f} % on {n} validation images" + (f" (known: {known:.1f} %)" if known else "")
    slack = 3 * math.sqrt(max(top1, 1) * max(100 - top1, 1) / n)  # three standard errors, in points
    at_chance = top1 <= chance + slack
    doubt = ""
    if at_chance and slack <= TIGHT:
        doubt = f"That is chance level ({chance:.1f} %): wrong weights, or classes in another order?"
    elif known and top1 < known - slack:
        doubt = "Far below its known figure: other mean/std, size or class order?"
    elif at_chance:
        doubt = f"That cannot be told from chance ({chance:.1f} %) on {n} images; if it should be far above, look at weights and class order"
    evidence = None
    if of.spec.weights != "random":
        seen, targets = logits, sample.targets
        order = other_order(seen, targets, run.classes)
        if at_chance and not order and n < 8 * classes:  # too few of each class
            few = _sample(run, of, FEW, of_few_classes=True)
            seen, targets = logits_of(model, few, *statistics), few.targets
            order = other_order(seen, targets, run.classes)
        if order:
            if _names_known(run, of):  # it takes some classes for others: few labels can do that
                return Check(f"{of.label} accuracy", "warn", told, f"{order}. Yet its classes have the data's names")
            status: Literal["warn", "fail"] = "fail" if logit_losses(run.config, of.label) else "warn"
            return Check(f"{of.label} accuracy", status, told, f"{order}. {_right_order(run, of, seen, targets)}")
        evidence = other_statistics(model, sample, *statistics, logits)
    return Check(f"{of.label} accuracy", "warn" if doubt or evidence else "ok", told, evidence or doubt)


def _names_known(run: DistillationRun, of: Taught) -> bool:
    """Whether names beside the weights say that the teacher's classes are in the data's order; a head's always are."""
    card = _beside_teacher(of)
    in_order = card is not None and of.spec.classes is None and card.classes == list(run.classes)
    return of.spec.head is not None or in_order


def _right_order(run: DistillationRun, of: Taught, logits: torch.Tensor, targets: torch.Tensor) -> str:
    """What to set, where these logits were found to be in another order than the data's classes."""
    if of.spec.classes is not None:
        return f"Is {of.place}.classes right? It is the order of the teacher's classes, first to last"
    theirs = natural(run.classes)
    if theirs and is_order(logits, targets, rows(theirs, run.classes)):
        return f"That is the order of timm's train.py: set {of.place}.classes=natural"
    return f"Set {of.place}.classes to the names in the teacher's order, or start with --no-preflight if they are right"


def _by_features(run: DistillationRun, of: Taught) -> list[Check]:
    name, own, statistics = f"{of.label} features", of.loaded, (of.teacher.mean, of.teacher.std)
    sample = _sample(run, of, FEW, of_few_classes=True)
    if len(sample.targets) < 2:
        return []
    try:
        features = features_of(of.teacher.view.model, sample, *statistics)
    except (UserError, AttributeError):  # it does not pool, or timm has no such method for it
        return []
    found = neighbours(features, sample.targets)
    n = len(found)
    told = f"{percent(found)} of {n} validation images are of the class of most of their nearest neighbours in them"
    if own.source == "random":
        return [Check(name, "ok", told)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh, _ = create(of.spec.model, of.teacher.size, False, own.kwargs, of.place)
    before = by_neighbours(fresh.to(run.device).eval(), sample, *statistics)
    told += f" ({percent(before)} with the model at initial values)"
    if n >= ENOUGH and not clearly_more(found, before):
        fix = "They are not clearly better than those of initial values: are its weights, mean and std right?"
        return [Check(name, "warn", told, fix)]
    if not _as_stated(of) and (evidence := better_features(of.teacher.view.model, sample, *statistics, features)):
        return [Check(name, "warn", told, evidence)]
    return [Check(name, "ok", told)]


def _sample(run: DistillationRun, of: Taught, most: int, of_few_classes: bool = False) -> Sample:
    """Validation images as the teacher sees them, spread evenly; or 16 of each class, of as many as that gives."""
    val, size = run.val_images, of.teacher.size
    data = run.config.data.model_copy(update={"image_size": size})
    augment = run.config.augment.model_copy(update={"interpolation": interpolation(of.teacher.view.model)})
    indices = list(val.indices)
    most = max(1, min(most, BYTES // (data.channels * size[0] * size[1])))
    if of_few_classes and most < 16 * len(run.classes):
        targets = val.source.targets
        chosen = range(0, len(run.classes), -(-len(run.classes) * 16 // most))
        indices = [i for c in chosen for i in [i for i in indices if targets[i] == c][:16]]
    else:
        indices = indices[:: max(1, len(indices) // most)][:most]
    batches = list(
        eval_batches(Images(val.source, indices, eval_transform(data, augment), None, val.bad), 64, 0, False)
    )
    if not batches:
        raise UserError("none of the validation images can be read; repair them, or set another data.val")
    return Sample(torch.cat([b.images for b in batches]), torch.cat([b.targets for b in batches]))
