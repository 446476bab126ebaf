"""What the pre-flight says of a teacher: its weights, names of classes, input, and how good it is on a sample."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from .build import Run, Taught
from .config import Augment, reads_logits
from .data import Images, eval_batches, eval_transform
from .distiller import default_statistics, interpolation
from .errors import UserError
from .methods import METHODS
from .model_folders import Described, beside
from .models import HeadCard, Loaded, create, read_head, resolve
from .wrong_teacher import Sample, by_neighbours, clearly_more, logits_of, other_order, other_statistics, percent

SAMPLE = 512  # validation images for the teacher's accuracy
BYTES = 2**28  # for the pixels of a sample
FEW = 256  # for its features, and for a second look at many classes
ENOUGH = 100  # images by which features must be clearly better than those of initial values
NOISE, ALL_NOISE = 0.4, 0.9  # shares of weight matrices without structure; up to 17 % in trained models that were tried
TIGHT = 10.0  # points: an accuracy known this well and at chance is chance


class Check(NamedTuple):
    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


def from_source(role: str, place: str, loaded: Loaded) -> Check:
    """role: what the screen calls the model. place: where the recipe describes it."""
    told = f"{loaded.matched} of {loaded.total} tensors from {loaded.source}"
    told += f" (sha256 {loaded.sha256[:12]})" if loaded.sha256 else ""
    told += f", under `{loaded.prefix}`" if loaded.prefix else ""
    unused = loaded.keys["unexpected"]
    told += f"; not used of it: {', '.join(unused[:2])}{', ...' * (len(unused) > 2)}" if unused else ""
    told += f"; {loaded.head}" if loaded.head else ""
    others = f"These weights were never trained; give others, or {place}.weights=random if you mean it"
    if loaded.untrained:
        initial = f"but {loaded.initial:.0%} of the biases and norms are at their initial values"
        return Check(f"{role} weights", "fail", f"{told}, {initial}", others)
    told += f"; {loaded.initial:.0%} of the biases and norms at initial values"
    if loaded.noise is None:
        return Check(f"{role} weights", "ok", told)
    told += f", {loaded.noise:.0%} of the weight matrices without structure"
    if loaded.noise <= NOISE:
        return Check(f"{role} weights", "ok", told)
    if loaded.noise < ALL_NOISE or role == "student":
        return Check(f"{role} weights", "warn", told, "Those were hardly trained, or never loaded")
    return Check(f"{role} weights", "fail", f"{told}: their entries might as well be shuffled", others)


def _beside_teacher(of: Taught) -> Described | None:
    """What stands beside the file of the teacher's weights, if they are from a file."""
    weights = of.spec.weights
    return beside(resolve(weights)) if weights not in (None, "random", "pretrained") else None


def _fitted(of: Taught) -> HeadCard | None:
    """What `scalekd head` wrote beside the teacher's head, if that is where it is from."""
    return read_head(resolve(of.spec.head), f"{of.place}.head")[0] if of.spec.head else None


def class_names(run: Run, of: Taught, told: str) -> Check:
    """Beside those that the teacher's file is told to have, where the numbers are equal."""
    card = _beside_teacher(of)
    theirs = card.classes if card and not of.spec.head else None
    if theirs is None or len(theirs) != len(run.classes) or theirs == [str(i) for i in range(len(theirs))]:
        return Check("classes", "ok", told)  # the file has no names
    if theirs == list(run.classes):
        return Check("classes", "ok", f"{told}, of the same names in the same order")
    odd = next(f"{i} is {a} there and {b} here" for i, (a, b) in enumerate(zip(theirs, run.classes)) if a != b)
    told += f"; what stands beside its weights names others, class {odd}"
    reading = [name for name in run.config.losses if getattr(METHODS[name], "needs_teacher", True)]
    logits = [name for name in reading if reads_logits(name)]
    if logits and set(theirs) == set(run.classes):
        fix = f"Its classes are in another order, so {', '.join(logits)} would teach the wrong ones; name the folders alike"
        return Check("classes", "fail", told, fix)
    return Check("classes", "warn", told, "If they are others, its logits are of no use")


def teacher_input(run: Run, of: Taught, told: str) -> Check:
    """The teacher's input beside what it was made for, as far as that is known."""
    card, augment, name = _beside_teacher(of), run.config.augment, f"{of.label} input"
    ours = of.teacher.mean.flatten().cpu(), of.teacher.std.flatten().cpu()
    if max(v.max().item() for v in ours) > 2:
        fix = "They are for pixels in [0, 1]; divide those for pixels up to 255 by 255"
        return Check(name, "warn", told, fix)
    if fitted := _fitted(of):  # its mean, std and size were compared when it was loaded
        told += _cut_otherwise("its head was fitted", fitted.crop_pct, fitted.interpolation, augment)
    if card is None and of.spec.weights != "pretrained":
        return Check(name, "ok", told)
    stated = (card.mean, card.std) if card else default_statistics(of.teacher.view.model)
    if card and of.teacher.size != card.image_size:
        told += f"; made for {card.image_size[0]}x{card.image_size[1]}"
    if card and not fitted:
        told += _cut_otherwise("validated", card.crop_pct, card.interpolation, augment)
    if all(torch.allclose(a, torch.tensor(b), atol=1e-3) for a, b in zip(ours, stated)):
        return Check(name, "ok", told)
    theirs = shown(*map(torch.tensor, stated))
    if card:
        fix = f"Beside its weights stands: {theirs}; set {of.place}.mean and {of.place}.std to that if it is right"
    else:
        fix = f"timm says: {theirs}; leave {of.place}.mean and {of.place}.std out to use it"
    return Check(name, "warn", told, fix)


def _cut_otherwise(done: str, crop_pct: float, interpolation: str, augment: Augment) -> str:
    if (crop_pct, interpolation) == (augment.crop_pct, augment.interpolation):
        return ""
    return f"; {done} with crop_pct {crop_pct:g}, {interpolation}, which augment sets for both models"


def shown(mean: torch.Tensor, std: torch.Tensor) -> str:
    mean_text, std_text = (" ".join(f"{v:.3f}" for v in t.flatten().tolist()) for t in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def teacher_accuracy(run: Run, of: Taught) -> list[Check]:
    """By its logits on a sample, with what may be wrong with it; by its features where its classes are others."""
    if len(run.classes) < 2:
        return []
    same = of.teacher.view.shapes.classes == len(run.classes)
    return [_by_logits(run, of)] if same else _by_features(run, of)


def _by_logits(run: Run, of: Taught) -> Check:
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
        evidence = other_order(logits, sample.targets, run.classes)
        if at_chance and not evidence and n < 8 * classes:  # too few of each class
            few = _sample(run, of, FEW, of_few_classes=True)
            evidence = other_order(logits_of(model, few, *statistics), few.targets, run.classes)
        evidence = evidence or other_statistics(model, sample, *statistics, logits)
    return Check(f"{of.label} accuracy", "warn" if doubt or evidence else "ok", told, evidence or doubt)


def _by_features(run: Run, of: Taught) -> list[Check]:
    name, own, statistics = f"{of.label} features", of.loaded, (of.teacher.mean, of.teacher.std)
    sample = _sample(run, of, FEW, of_few_classes=True)
    if len(sample.targets) < 2:
        return []
    try:
        found = by_neighbours(of.teacher.view.model, sample, *statistics)
    except (UserError, AttributeError):  # it does not pool, or timm has no such method for it
        return []
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
    return [Check(name, "ok", told)]


def _sample(run: Run, of: Taught, most: int, of_few_classes: bool = False) -> Sample:
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
        raise UserError("none of the validation images can be read; mend them, or name another data.val")
    return Sample(torch.cat([b.images for b in batches]), torch.cat([b.targets for b in batches]))
