"""Pre-flight checks of a teacher: class names, input, and accuracy on a sample of the validation images."""

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

from .model import Check, shown
from .statistical_tests import (
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
from .teacher_of_sets import accuracy_on_sets

SAMPLE = 512  # validation images for the teacher's accuracy
BYTES = 2**28  # most memory for the pixels of a sample
FEW = 256  # images for a test of its features, and of few classes where there are many
ENOUGH = 100  # from this many images on, features must be clearly better than those of initial values
TIGHT = 10.0  # percentage points: if three standard errors are below this, an accuracy at chance level is certain


def card_of(taught: Taught) -> Described | None:
    """The metadata next to the teacher's weights file, if there is any."""
    weights = taught.spec.weights
    return beside(resolve(weights)) if weights not in (None, "random", "pretrained") else None


def _head_card(taught: Taught) -> HeadCard | None:
    """The card of the teacher's head, if `scalekd head` fitted it."""
    spec = taught.spec
    return read_head(resolve(str(spec.head)), f"{taught.place}.head")[0] if spec.has_head_folder else None


def class_names(run: DistillationRun, taught: Taught, text: str) -> Check:
    """Compares the data's class names with those next to the teacher's weights, for equal numbers of classes."""
    card = card_of(taught)
    theirs = card.classes if card and not taught.spec.head else None
    ours, source = list(run.classes), "the data"
    if taught.spec.classes is not None:
        ours, source = teachers_order(taught.spec.classes, ours, taught.place), f"{taught.place}.classes"
        text += f", reordered from {source} to the data's order"
    if theirs is None or len(theirs) != len(ours) or theirs == [str(i) for i in range(len(theirs))]:
        return Check("classes", "ok", text)  # the file has no names
    if theirs == ours:
        return Check("classes", "ok", f"{text}, with the same names in the same order")
    i, a, b = next((i, a, b) for i, (a, b) in enumerate(zip(theirs, ours)) if a != b)
    text += f"; class {i} is {a} in the file next to its weights and {b} in {source}"
    logits = logit_losses(run.config, taught.label)
    if logits and set(theirs) == set(ours):
        fix = f"Its class order differs, so {', '.join(logits)} would teach the wrong classes; "
        right = theirs == list(run.classes)
        fix += f"remove {taught.place}.classes" if right else remedy(theirs, run.classes, taught.place)
        return Check("classes", "fail", text, fix)
    return Check("classes", "warn", text, "If its classes really differ, do not use its logits")


def teacher_input(run: DistillationRun, taught: Taught, text: str) -> Check:
    """Compares the teacher's input with what it was trained for, as far as that is known."""
    card, augment, name = card_of(taught), run.config.augment, f"{taught.label} input"
    ours = taught.teacher.mean.flatten().cpu(), taught.teacher.std.flatten().cpu()
    if doubt := input_doubt(*(v.tolist() for v in ours)):
        return Check(name, "warn", text, doubt)
    if head := _head_card(taught):  # its mean, std and size were compared when it was loaded
        text += _other_crop("its head was fitted", head.crop_pct, head.interpolation, augment)
    stated = _stated(taught)
    if stated is None:
        return Check(name, "ok", text)
    if card and taught.teacher.size != card.image_size:
        text += f"; trained for {card.image_size[0]}x{card.image_size[1]}"
    if card and not head:
        text += _other_crop("it was validated", card.crop_pct, card.interpolation, augment)
    if _as_stated(taught):
        return Check(name, "ok", text)
    theirs = shown(*map(torch.tensor, stated))
    if card is None and taught.spec.weights != "pretrained" and has_data_classes(run, taught):
        return Check(name, "ok", f"{text}; timm's default is {theirs}")  # the accuracy check finds out which is right
    if card:
        fix = f"The file next to its weights says {theirs}; if that is right, set {taught.place}.mean and {taught.place}.std to it"
    else:
        fix = f"timm's default is {theirs}; to use it, remove {taught.place}.mean and {taught.place}.std"
    return Check(name, "warn", text, fix)


def _stated(taught: Taught) -> Statistics | None:
    """Mean and std that the teacher was trained with, from its card or from timm; None if unknown.

    timm's values count for timm's own weights, and for a file if the recipe sets other values.
    """
    if card := card_of(taught):
        return tuple(card.mean), tuple(card.std)
    in_file = taught.spec.weights not in (None, "random", "pretrained")
    if taught.spec.weights == "pretrained" or (in_file and (taught.spec.mean or taught.spec.std)):
        return default_statistics(taught.teacher.view.model)
    return None


def _as_stated(taught: Taught) -> bool:
    stated = _stated(taught)
    ours = taught.teacher.mean.flatten().cpu(), taught.teacher.std.flatten().cpu()
    return stated is not None and all(torch.allclose(a, torch.tensor(b), atol=1e-3) for a, b in zip(ours, stated))


def _statistics(taught: Taught) -> tuple[torch.Tensor, torch.Tensor]:
    return taught.teacher.mean, taught.teacher.std


def has_data_classes(run: DistillationRun, taught: Taught) -> bool:
    """Whether the teacher's logits can be compared with the labels."""
    count = taught.teacher.view.shapes.classes
    return 1 < len(run.classes) == count and not gives_embeddings(taught.spec, count, count)


def _other_crop(what: str, crop_pct: float, interpolation: str, augment: Augment) -> str:
    """what: the clause in front, such as `it was validated`."""
    if (crop_pct, interpolation) == (augment.crop_pct, augment.interpolation):
        return ""
    return f"; {what} with crop_pct {crop_pct:g}, {interpolation} (set them in `augment`, for both models)"


def teacher_accuracy(run: DistillationRun, taught: Taught) -> list[Check]:
    """Evaluates the teacher on a sample: its logits, or its features if it has other classes, and likely errors.

    With sets of labels, only its logits.
    """
    if len(run.classes) < 2:
        return []
    if not run.multi_label:
        return [accuracy_by_logits(run, taught)] if has_data_classes(run, taught) else _by_features(run, taught)
    if not has_data_classes(run, taught):
        return []
    sample = sample_of(run, taught, SAMPLE)
    logits = logits_of(taught.teacher.view.model, sample, *_statistics(taught))
    head = _head_card(taught)
    known = head.validation["after"].get("map") if head else None
    return [accuracy_on_sets(f"{taught.label} accuracy", logits, sample, logit_losses(run.config, taught.label), known)]


def accuracy_by_logits(run: DistillationRun, taught: Taught) -> Check:
    """Top-1 accuracy on a sample, with a warning or an error for a wrong class order, mean or std."""
    name, model, statistics = f"{taught.label} accuracy", taught.teacher.view.model, _statistics(taught)
    sample = sample_of(run, taught, SAMPLE)
    logits = logits_of(model, sample, *statistics)
    n, classes = len(logits), len(run.classes)
    top1 = 100 * (logits.argmax(1) == sample.targets).double().mean().item()
    head = _head_card(taught)
    known = taught.spec.top1 or (head.validation["after"].get("top1") if head else None)
    text = f"{top1:.1f} % on {n} validation images" + (f" (known: {known:.1f} %)" if known else "")
    at_chance, doubt = _doubt(top1, known, n, 100 / classes)
    evidence = None
    if taught.spec.weights != "random":
        tested, targets = logits, sample.targets
        order = other_order(tested, targets, run.classes)
        if at_chance and not order and n < 8 * classes:  # too few images per class
            few = sample_of(run, taught, FEW, of_few_classes=True)
            tested, targets = logits_of(model, few, *statistics), few.targets
            order = other_order(tested, targets, run.classes)
        if order:
            if _names_known(run, taught):  # it confuses some classes; a head fitted on few labels may do that
                return Check(name, "warn", text, f"{order}. But its class names are in the data's order")
            status: Literal["warn", "fail"] = "fail" if logit_losses(run.config, taught.label) else "warn"
            return Check(name, status, text, f"{order}. {_right_order(run, taught, tested, targets)}")
        evidence = other_statistics(model, sample, *statistics, logits)
    return Check(name, "warn" if doubt or evidence else "ok", text, evidence or doubt)


def _doubt(top1: float, known: float | None, n: int, chance: float) -> tuple[bool, str]:
    """Whether an accuracy on `n` images may be chance, and a warning if it is too low. All in %."""
    slack = 3 * math.sqrt(max(top1, 1) * max(100 - top1, 1) / n)  # three standard errors, in percentage points
    at_chance = top1 <= chance + slack
    if at_chance and slack <= TIGHT:
        return True, f"This is chance level ({chance:.1f} %): check its weights and class order"
    if known and top1 < known - slack:
        return at_chance, "This is far below its known accuracy: check mean, std, image size and class order"
    if at_chance:
        return True, (
            f"{n} images cannot tell this from chance level ({chance:.1f} %): if it should be far above, check its weights "
            "and class order"
        )
    return False, ""


def _names_known(run: DistillationRun, taught: Taught) -> bool:
    """Whether the names next to the weights are in the data's order. Those of a fitted head always are."""
    card = card_of(taught)
    in_order = card is not None and taught.spec.classes is None and card.classes == list(run.classes)
    return taught.spec.has_head_folder or in_order


def _right_order(run: DistillationRun, taught: Taught, logits: torch.Tensor, targets: torch.Tensor) -> str:
    """How to fix a class order that differs from the data's, for the logits that show it."""
    if taught.spec.classes is not None:
        return f"Check {taught.place}.classes: it must list the teacher's classes in the order of its outputs"
    theirs = natural(run.classes)
    if theirs and is_order(logits, targets, rows(theirs, run.classes)):
        return f"The order is that of timm's train.py: set {taught.place}.classes=natural"
    return f"Set {taught.place}.classes to the class names in the order of its outputs; if the order is right, skip the checks (`preflight`)"


def _by_features(run: DistillationRun, taught: Taught) -> list[Check]:
    name, own, statistics = f"{taught.label} features", taught.loaded, _statistics(taught)
    sample = sample_of(run, taught, FEW, of_few_classes=True)
    if len(sample.targets) < 2:
        return []
    try:
        features = features_of(taught.teacher.view.model, sample, *statistics)
    except (UserError, AttributeError):  # the model does not pool, or has no such method in timm
        return []
    hits = neighbours(features, sample.targets)
    n = len(hits)
    text = f"nearest-neighbour accuracy {percent(hits)} on {n} validation images"
    if own.source == "random":
        return [Check(name, "ok", text)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh, _ = create(taught.spec.model, taught.teacher.size, False, own.kwargs, taught.place)
    before = by_neighbours(fresh.to(run.device).eval(), sample, *statistics)
    text += f" ({percent(before)} with initial values)"
    if n >= ENOUGH and not clearly_more(hits, before):
        fix = "Its features are not clearly better than those of initial values: check its weights, mean and std"
        return [Check(name, "warn", text, fix)]
    if not _as_stated(taught) and (
        evidence := better_features(taught.teacher.view.model, sample, *statistics, features)
    ):
        return [Check(name, "warn", text, evidence)]
    return [Check(name, "ok", text)]


def sample_of(run: DistillationRun, taught: Taught, most: int, of_few_classes: bool = False) -> Sample:
    """At most `most` validation images, preprocessed for the teacher and evenly spaced.

    of_few_classes: 16 images per class instead, of evenly spaced classes.
    """
    val, size = run.val_images, taught.teacher.size
    data = run.config.data.model_copy(update={"image_size": size})
    augment = run.config.augment.model_copy(update={"interpolation": interpolation(taught.teacher.view.model)})
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
        raise UserError("none of the validation images can be read; fix them, or set data.val to another folder")
    return Sample(torch.cat([b.images for b in batches]), torch.cat([b.targets for b in batches]))
