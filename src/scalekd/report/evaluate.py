"""Evaluates student, teachers and baselines on a limited number of validation images, for the report."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
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
from scalekd.common.errors import UserError
from scalekd.common.text import printable
from scalekd.data.batches import Batch, Images, Sample, eval_batches
from scalekd.data.transforms import eval_transform
from scalekd.distill.run import DistillationRun
from scalekd.methods.shared import stage_map
from scalekd.models.inputs import scaled
from scalekd.models.normalised import Normalised
from scalekd.models.stages import Features, StageView
from scalekd.train.hardware import workers_of

MOST_IMAGES, MOST_SECONDS = 2000, 60.0
MAP_IMAGES = 256  # images whose maps are analysed
BATCH = 32
PICTURES, OF_A_CLASS = 12, 3
SIDE = 112  # pixels of a picture's longer side, at most
STUDENT, TEACHER = "this student", "teacher"


@dataclass
class Example:
    """An image that the teacher classifies correctly and the student does not."""

    picture: bytes
    kind: str  # png, jpeg
    small: bool  # enlarged on the page
    target: str
    student: str
    teacher_confidence: float
    student_confidence: float
    name: str


@dataclass
class Seen:
    """The results. Keys of `columns` and `results`: STUDENT, TEACHER, and the labels of baselines."""

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


def shown_student(run: DistillationRun, deployed: nn.Module) -> Normalised:
    d = run.distiller
    view = d.student_view
    if deployed is not d.student:
        view = StageView(deployed, name=view.name, image_size=d.image_size, cuts=run.config.student.cuts)
    return Normalised(view, d.image_size, d.student_mean, d.student_std)


@dataclass
class Compared:
    """The models of a report, and the validation images on which they are compared."""

    models: dict[str, list[Normalised]]  # STUDENT, the baselines and TEACHER; the logits of several are averaged
    teachers: list[Normalised]  # also those whose predictions cannot be compared
    images: Images
    notes: list[str]

    def batches(self, run: DistillationRun, seconds: float) -> Iterator[Batch]:
        """The batches of the images, until `seconds` are over. Raises `UserError` if none of the images can be read."""
        workers = (
            workers_of(run.config) if len(self.images) > 10 * BATCH else 0
        )  # few images: not worth starting workers
        began, seen = time.monotonic(), 0
        with contextlib.closing(eval_batches(self.images, BATCH, workers, run.device.type == "cuda")) as batches:
            for batch in batches:
                yield batch
                seen += len(batch.images)
                if time.monotonic() - began > seconds and seen < len(self.images):
                    self.notes.append(f"Stopped after {seconds:.0f} s.")
                    break
        if not seen:
            raise UserError("none of the validation images can be read")


def compared(
    run: DistillationRun, deployed: nn.Module, baselines: Mapping[str, Normalised] | None, most: int
) -> Compared:
    """`deployed`, the run's teachers and the baselines, in eval mode, and `most` of the run's validation images."""
    for module in (deployed, run.distiller):
        module.eval()
    models = {label: [model] for label, model in {STUDENT: shown_student(run, deployed), **(baselines or {})}.items()}
    teachers = [Normalised(t.view, t.size, t.mean, t.std) for t in run.distiller.teachers.values()]
    odd = [t.view.shapes.classes for t in teachers if t.view.shapes.classes != len(run.classes)]
    notes = [
        f"A teacher has {count} classes and the data {len(run.classes)}, so its predictions are left out."
        for count in odd[:1]
    ]
    if teachers and not odd:
        models[TEACHER] = teachers
    images = chosen_images(run, [model for group in (*models.values(), teachers) for model in group], most)
    return Compared(models, teachers, images, notes)


@torch.no_grad()
def look(
    run: DistillationRun,
    deployed: nn.Module,
    baselines: Mapping[str, Normalised] | None = None,
    *,
    most: int = MOST_IMAGES,
    seconds: float = MOST_SECONDS,
) -> Seen:
    """Evaluates `deployed`, the run's teachers and the baselines on `most` of the run's validation images.

    All models get the same pixels, each at its own size and statistics. The pass ends after `seconds`, with the images
    so far. The maps of the first images are analysed if there is one teacher at most. The models stay in eval mode.
    """
    found = compared(run, deployed, baselines, most)
    answers = {label: Answers() for label in found.models}
    maps = Maps(run, found.models[STUDENT][0], found.teachers[0] if len(found.teachers) == 1 else None)
    for batch in found.batches(run, seconds):
        _add_batch(scaled(batch.images.to(run.device)), batch.targets.to(run.device), found, answers, maps)
    columns = {label: model.columns() for label, model in answers.items()}
    seen = Seen(
        len(columns[STUDENT]["target"]),
        len(run.val_images),
        run.classes,
        columns,
        {label: model.result(label != TEACHER and TEACHER in answers) for label, model in answers.items()},
        notes=found.notes,
    )
    maps.into(seen)
    images, bad = found.images, found.images.bad.found if found.images.bad else {}
    places = [i for i, k in enumerate(images.indices) if printable(images.source.where(k)) not in bad][: seen.images]
    seen.examples = wrong_examples(images, places, seen)
    return seen


def _add_batch(pixels: Tensor, targets: Tensor, found: Compared, answers: Mapping[str, Answers], maps: Maps) -> None:
    wanted = maps.wanted
    student = found.models[STUDENT][0].features(pixels, maps=wanted)
    taught = [t.features(pixels, maps=wanted) for t in found.teachers] if TEACHER in answers or wanted else []
    teacher_logits = torch.stack([f.logits.float() for f in taught]).mean(0) if TEACHER in answers else None
    answers[STUDENT].add(student.logits, targets, teacher_logits)
    if teacher_logits is not None:
        answers[TEACHER].add(teacher_logits, targets)
    for label, (model, *_) in found.models.items():
        if label not in (STUDENT, TEACHER):
            answers[label].add(model.features(pixels, maps=False).logits, targets, teacher_logits)
    if wanted:
        maps.add(pixels, student, taught[0] if taught else None)


def chosen_images(run: DistillationRun, models: Sequence[Normalised], most: int) -> Images:
    """Images spread evenly over the validation images, in a seeded order, so a batch is a sample of all classes."""
    images, config = run.val_images, run.config
    n = min(most, len(images))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED)).tolist()
    size = tuple(map(max, zip(*(m.size for m in models))))
    spec = config.data.model_copy(update={"image_size": size})
    chosen = [images.indices[i * len(images) // n] for i in order]
    return Images(images.source, chosen, eval_transform(spec, config.augment), None, images.bad)


class Maps:
    """Frequencies of the last maps, similarity of the stages (CKA), distance of the projectors' outputs from the teacher."""

    def __init__(self, run: DistillationRun, student: Normalised, teacher: Normalised | None):
        self.run, self.images, self.refused = run, 0, ""
        self.spectra = {STUDENT: Spectrum()} | ({TEACHER: Spectrum()} if teacher else {})
        self.cka, self.distances = StageCKA(), dict[str, list[Tensor]]()
        self.trained = shown_student(run, run.distiller.student)  # the student that the projectors were trained with
        self.is_deployed = student.view.model is run.distiller.student
        for model in (student, teacher):
            if model is not None and not self.refused:
                self.refused = model.view.refusal or ""

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
                except ValueError:  # only the direct component, or zero everywhere
                    del self.spectra[label]
        if teacher is None:
            return
        self.cka.add(*([stage_map(f, s) for s in (1, 2, 3, 4)] for f in (student, teacher)))
        own = student if self.is_deployed else self.trained.features(pixels)
        for name, call in projector_calls(self.run.distiller.methods, own, teacher).items():
            far = distances(call.output, stage_map(teacher, call.stage))
            self.distances.setdefault(name, []).append(far.cpu())

    def into(self, seen: Seen) -> None:
        seen.map_images = self.images
        seen.spectra = {label: s.result() for label, s in self.spectra.items() if s.direct}
        seen.cka = self.cka.result()
        seen.distances = {name: statistics(torch.cat(values)) for name, values in self.distances.items()}
        if self.refused:
            seen.notes.append(f"No stage maps: {' '.join(self.refused.split())}")


def wrong_examples(images: Images, places: Sequence[int], seen: Seen) -> list[Example]:
    """Images that the teacher classifies correctly with the highest confidence and the student wrongly, few per class."""
    if TEACHER not in seen.columns:
        return []
    student, teacher = seen.columns[STUDENT], seen.columns[TEACHER]
    examples: list[Example] = []
    per_class: dict[int, int] = {}
    for i in np.argsort(-teacher["confidence"], kind="stable"):
        target = int(student["target"][i])
        if not teacher["right"][i] or student["right"][i] or per_class.get(target, 0) == OF_A_CLASS:
            continue
        sample = images[0, places[i]]
        if not isinstance(sample, Sample) or sample.image is None:
            continue
        per_class[target] = per_class.get(target, 0) + 1
        predicted = seen.classes[int(student["predicted"][i])]
        confidences = float(teacher["confidence"][i]), float(student["confidence"][i])
        name = images.source.where(images.indices[places[i]])
        examples.append(Example(*_encoded(sample.image), seen.classes[target], predicted, *confidences, name))
        if len(examples) == PICTURES:
            break
    return examples


def _encoded(pixels: Tensor) -> tuple[bytes, str, bool]:
    """Encodes pixels (C, H, W) uint8 as a file of a few KB, its format, and whether it is small. PNG if small."""
    shown = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)
    small = max(image.size) <= SIDE // 2
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "png" if small else "jpeg", quality=80)
    return file.getvalue(), "png" if small else "jpeg", small
