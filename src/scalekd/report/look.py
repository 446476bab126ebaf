"""A bounded pass over validation images: what student and teacher answer, and what their last maps are like."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scalekd.analyze.calibration import Answers
from scalekd.analyze.cka import StageCKA
from scalekd.analyze.distance import distances, statistics
from scalekd.analyze.frequency import Spectrum
from scalekd.analyze.runs import SEED, projector_calls
from scalekd.data.batches import Images, Sample, eval_batches
from scalekd.data.transforms import eval_transform
from scalekd.distill.run import DistillationRun
from scalekd.methods.shared import stage_map
from scalekd.models.shown import Shown
from scalekd.models.stages import Features, StageView

MOST_IMAGES, MOST_SECONDS = 2000, 60.0
MAP_IMAGES = 256  # whose maps are looked at
BATCH = 32
PICTURES, OF_A_CLASS = 12, 3
SIDE = 112  # pixels of a picture's longer side, at most
STUDENT, TEACHER = "this student", "teacher"


@dataclass
class Example:
    """An image that the teacher gets and the student does not."""

    picture: bytes
    kind: str  # png, jpeg
    small: bool  # shown larger than it is
    target: str
    student: str
    teacher_confidence: float
    student_confidence: float
    name: str


@dataclass
class Seen:
    """By model: STUDENT, TEACHER, and the labels of baselines."""

    images: int
    of_images: int
    classes: list[str]
    columns: dict[str, dict[str, Any]]  # `Answers.columns`
    results: dict[str, dict[str, Any]]  # `Answers.result`
    map_images: int = 0
    spectra: dict[str, dict[str, Any]] = field(default_factory=dict)  # `Spectrum.result`
    cka: list[list[float | None]] = field(default_factory=list)  # student's stages x teacher's
    distances: dict[str, dict[str, float]] = field(default_factory=dict)  # projector -> quantiles
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def looker_of(run: DistillationRun, deployed: nn.Module) -> Shown:
    d = run.distiller
    view = d.student_view
    if deployed is not d.student:
        view = StageView(deployed, name=view.name, image_size=d.image_size, cuts=run.config.student.cuts)
    return Shown(view, d.image_size, d.student_mean, d.student_std)


@torch.no_grad()
def look(
    run: DistillationRun,
    deployed: nn.Module,
    baselines: Mapping[str, Shown] | None = None,
    *,
    most: int = MOST_IMAGES,
    seconds: float = MOST_SECONDS,
) -> Seen:
    """`deployed`, the run's teachers and the baselines on `most` of the run's validation images, drawn by a fixed seed.

    All see the same pixels, each at its own size and statistics. It ends after `seconds`, with those seen so far. Maps
    are looked at on the first of them, with one teacher. Leaves the models in eval mode.
    """
    for module in (deployed, run.distiller):
        module.eval()
    students = {STUDENT: looker_of(run, deployed), **(baselines or {})}
    teachers = [Shown(t.view, t.size, t.mean, t.std) for t in run.distiller.teachers.values()]
    notes = _misfits(teachers, len(run.classes))
    answers = {label: Answers() for label in students} | ({TEACHER: Answers()} if teachers and not notes else {})
    maps = Maps(run, students[STUDENT], teachers[0] if len(teachers) == 1 else None)
    images = _chosen(run, [*students.values(), *teachers], most)
    workers = run.config.data.workers if len(images) > 10 * BATCH else 0  # for a few images, not worth their start
    skipped: set[str] = set()
    began, passed = time.monotonic(), 0
    batches = eval_batches(images, BATCH, workers, run.device.type == "cuda")
    for batch in batches:
        skipped |= {bad.name for bad in batch.skipped}
        passed += BATCH
        if not len(batch.targets):
            continue
        pixels, targets = batch.images.to(run.device).float() / 255, batch.targets.to(run.device)
        wanted = maps.wanted
        student = students[STUDENT].features(pixels, maps=wanted)
        taught = [of.features(pixels, maps=wanted) for of in teachers] if TEACHER in answers or wanted else []
        beside = torch.stack([f.logits.float() for f in taught]).mean(0) if TEACHER in answers else None
        answers[STUDENT].add(student.logits, targets, beside)
        if beside is not None:
            answers[TEACHER].add(beside, targets)
        for label, of in students.items():
            if label != STUDENT:
                answers[label].add(of.features(pixels, maps=False).logits, targets, beside)
        if wanted:
            maps.add(pixels, student, taught[0] if taught else None)
        if time.monotonic() - began > seconds:
            batches.close()
            break
    columns = {label: of.columns() for label, of in answers.items()}
    seen = Seen(
        len(columns[STUDENT]["target"]),
        len(run.val_images),
        run.classes,
        columns,
        {label: of.result(label != TEACHER and TEACHER in answers) for label, of in answers.items()},
        notes=notes,
    )
    if passed < len(images):
        notes.append(f"Stopped after {seconds:.0f} s.")
    maps.into(seen)
    places = [i for i in range(min(passed, len(images))) if images.source.where(images.indices[i]) not in skipped]
    seen.examples = _examples(images, places, seen)
    return seen


def _misfits(teachers: Sequence[Shown], classes: int) -> list[str]:
    """Why the teachers' answers cannot stand beside the student's, if so."""
    odd = [t.view.shapes.classes for t in teachers if t.view.shapes.classes != classes]
    told = f"A teacher answers in {odd[0]} classes and the data have {classes}" if odd else ""
    return [f"{told}: its answers are left out."] if odd else []


def _chosen(run: DistillationRun, models: Sequence[Shown], most: int) -> Images:
    """Spread evenly over the validation images, in a seeded order, so that a batch is a sample of all classes."""
    images, config = run.val_images, run.config
    n = min(most, len(images))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED)).tolist()
    size = tuple(map(max, zip(*(m.size for m in models))))
    spec = config.data.model_copy(update={"image_size": size})
    chosen = [images.indices[i * len(images) // n] for i in order]
    return Images(images.source, chosen, eval_transform(spec, config.augment), None, images.bad)


class Maps:
    """Frequencies of the last maps; likeness of the stages (CKA); how far the projectors' outputs are from the teacher."""

    def __init__(self, run: DistillationRun, student: Shown, teacher: Shown | None):
        self.run, self.images, self.refused = run, 0, ""
        self.spectra = {STUDENT: Spectrum()} | ({TEACHER: Spectrum()} if teacher else {})
        self.cka, self.distances = StageCKA(), dict[str, list[Tensor]]()
        self.trained = looker_of(run, run.distiller.student)  # whom the projectors were trained with
        self.is_deployed = student.view.model is run.distiller.student
        for of in (student, teacher):
            if of is not None and not self.refused:
                self.refused = of.view.refusal or ""

    @property
    def wanted(self) -> bool:
        return self.images < MAP_IMAGES and not self.refused

    def add(self, pixels: Tensor, student: Features, teacher: Features | None) -> None:
        self.images += len(pixels)
        for label, features in ((STUDENT, student), (TEACHER, teacher)):
            final = None if features is None else features.final
            if label in self.spectra and final is not None:
                try:
                    if final.shape[2:] == (1, 1):
                        raise ValueError
                    self.spectra[label].add(final)
                except ValueError:  # nothing but the direct component, or zero everywhere
                    del self.spectra[label]
        if teacher is None:
            return
        self.cka.add(*([stage_map(of, s) for s in (1, 2, 3, 4)] for of in (student, teacher)))
        own = student if self.is_deployed else self.trained.features(pixels)
        for name, call in projector_calls(self.run.distiller.methods, own, teacher).items():
            far = distances(call.output, stage_map(teacher, call.stage))
            self.distances.setdefault(name, []).append(far.cpu())

    def into(self, seen: Seen) -> None:
        seen.map_images = self.images
        seen.spectra = {label: of.result() for label, of in self.spectra.items() if of.direct}
        seen.cka = self.cka.result()
        seen.distances = {name: statistics(torch.cat(values)) for name, values in self.distances.items()}
        if self.refused:
            seen.notes.append(f"No maps to look at: {' '.join(self.refused.split())}")


def _examples(images: Images, places: Sequence[int], seen: Seen) -> list[Example]:
    """The images that the teacher is surest of, rightly, and the student gets wrong; few of each class."""
    if TEACHER not in seen.columns:
        return []
    student, teacher = seen.columns[STUDENT], seen.columns[TEACHER]
    found: list[Example] = []
    of_class: dict[int, int] = {}
    for i in np.argsort(-teacher["confidence"], kind="stable"):
        target = int(student["target"][i])
        if not teacher["right"][i] or student["right"][i] or of_class.get(target, 0) == OF_A_CLASS:
            continue
        sample = images[0, places[i]]
        if not isinstance(sample, Sample) or sample.image is None:
            continue
        of_class[target] = of_class.get(target, 0) + 1
        said = seen.classes[int(student["predicted"][i])]
        sure = float(teacher["confidence"][i]), float(student["confidence"][i])
        name = images.source.where(images.indices[places[i]])
        found.append(Example(*_encoded(sample.image), seen.classes[target], said, *sure, name))
        if len(found) == PICTURES:
            break
    return found


def _encoded(pixels: Tensor) -> tuple[bytes, str, bool]:
    """(C, H, W) uint8 to a file of a few KB; PNG where the pixels are few."""
    shown = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)
    small = max(image.size) <= SIDE // 2
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "png" if small else "jpeg", quality=80)
    return file.getvalue(), "png" if small else "jpeg", small
