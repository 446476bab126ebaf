"""Opens several trained runs for an analysis: their students and projectors, their common teacher, and the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.common.files import is_file
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.sections import height_and_width
from scalekd.common.version import __version__
from scalekd.config.recipe import Config
from scalekd.data.batches import Images, eval_batches
from scalekd.data.sources.open import evaluated_part, open_source
from scalekd.data.sources.source import Source
from scalekd.data.split import class_difference, same_classes
from scalekd.data.transforms import eval_transform
from scalekd.distill.rebuild import load_trained, read_recipe, rebuild
from scalekd.distill.run import DistillationRun
from scalekd.methods.fd import FD
from scalekd.methods.scalekd import ScaleKD
from scalekd.models.inputs import scaled
from scalekd.models.normalised import Normalised
from scalekd.models.stages import Features
from scalekd.train import checkpoint
from scalekd.train.hardware import workers_for

SEED = 0  # of the order of the images, and of which of them are drawn


@dataclass
class Trained:
    """A run's student and projectors with the weights of its last checkpoint, in eval mode."""

    label: str
    config: Config
    classes: list[str]
    student: Normalised
    methods: nn.ModuleDict
    weights: dict[str, Any]  # of the student: "student", as trained, and "deployed", as exported
    step: int
    of_steps: int

    def use(self, which: Literal["student", "deployed"]) -> None:
        """Loads the weights that the projectors were trained with, or the exported ones (averaged with train.ema)."""
        self.student.view.model.load_state_dict(self.weights[which])

    def known(self) -> dict[str, Any]:
        """Plain data, for results.json."""
        c = self.config
        return {"run": self.label, "student": c.student.model, "losses": c.losses, "seed": c.seed} | {
            "step": self.step,
            "of_steps": self.of_steps,
        }


@dataclass
class Runs:
    """Runs with the same teacher, and the images to analyse them on."""

    trained: list[Trained]
    teacher: Normalised
    images: Images
    data: str
    of_images: int
    batch: int
    device: torch.device

    def batches(self, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, C, H, W) in [0, 1] and classes (B,), on the device, of all images or the first `most`.

        The images are in a seeded random order, so a batch is a sample of all classes.
        """
        images, spec = self.images, self.trained[0].config.data
        if most is not None:
            images = Images(images.source, images.indices[:most], images.transform, None)
        workers = (
            workers_for(spec.workers, self.device) if len(images) > 10 * self.batch else 0
        )  # few images: not worth starting workers
        with explain_out_of_memory(self.device, f"Try a smaller `batch` (now {self.batch}), or `device` cpu."):
            for b in eval_batches(images, self.batch, workers, self.device.type == "cuda"):
                yield scaled(b.images.to(self.device)), b.targets.to(self.device)

    def known(self) -> dict[str, Any]:
        """Plain data, for results.json."""
        versions = {"scalekd": __version__, "torch": torch.__version__, "timm": timm.__version__}
        return {
            "data": self.data,
            "images": len(self.images),
            "of_images": self.of_images,
            "order_seed": SEED,
            "teacher": self.teacher.view.name,
            "versions": versions,
        }


def open_runs(folders: Sequence[Path], data: str | None, most: int | None, batch: int, device: torch.device) -> Runs:
    """Opens the runs in `folders`. They must have the same teacher, classes and validation pixels.

    At least one run must have a teacher. data: any source with their classes; by default the first run's validation
    images. most: use this many images, spread evenly. Raises `UserError`.
    """
    for name, value in (("images", most), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"`{name}` {value}: must be 1 or more")
    if double := [f for i, f in enumerate(folders) if f.resolve() in [other.resolve() for other in folders[:i]]]:
        raise UserError(f"{double[0]} is given twice; name each run once")
    trained: list[Trained] = []
    teacher: Normalised | None = None
    teacher_of = ""
    validation: Images | None = None
    for folder, label in zip(folders, labels(folders)):
        one, run = _rebuilt(folder, label, device)
        for other in trained[:1]:
            _check_alike(other, one, validated=data is None)
        own = _teacher(run, label)
        if own and teacher:
            _check_same_teacher(teacher_of, teacher, label, own)
        elif own:
            teacher, teacher_of = own, label
        trained.append(one)
        validation = validation or run.val_images
    if teacher is None or validation is None:
        raise UserError("none of these runs has a teacher; name at least one that has")
    first = trained[0]
    place, source, indices = first.config.data.val or "data.train, held out", validation.source, validation.indices
    if data is not None:
        place = evaluated_part(data)
        source = _opened(place, first)
        indices = range(len(source))
    n = min(most or len(indices), len(indices))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen = [indices[i * len(indices) // n] for i in order]
    size = tuple(map(max, first.student.size, teacher.size))  # as in training: pixels for the larger of the two
    pixels = first.config.data.model_copy(update={"image_size": size})
    images = Images(source, chosen, eval_transform(pixels, first.config.augment), None)
    return Runs(trained, teacher, images, place, len(indices), min(batch, n), device)


def _opened(place: str, run: Trained) -> Source:
    source = open_source(place, "`data`")
    if not same_classes(run.classes, source.classes):
        raise UserError(
            f"`data`: {place} has other classes than the runs: {class_difference(run.classes, source.classes)}"
        )
    return source


def labels(folders: Sequence[Path]) -> list[str]:
    """The folders without the beginning that all paths share, such as `CAP/seed0` and `DFM/seed0`."""
    parts = [folder.absolute().parts for folder in folders]
    common = 0
    while len(parts) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return ["/".join(p[common:] if len(parts) > 1 else p[-1:]) for p in parts]


def _rebuilt(folder: Path, label: str, device: torch.device) -> tuple[Trained, DistillationRun]:
    if not is_file(folder / "recipe.yaml"):
        raise UserError(f"{folder} has no recipe.yaml, so it is not a run; choose a folder that `scalekd train` wrote")
    last = folder / "last.pt"
    if not is_file(last):
        raise UserError(
            f"{folder} has no last.pt, the checkpoint with the run's projectors: it was removed, or the run stopped "
            "before its first checkpoint"
        )
    config = read_recipe(folder)
    try:
        run = rebuild(config, device)
    except UserError as error:
        raise UserError(f"{folder} cannot be rebuilt: {error}") from None
    state = checkpoint.load(last)
    step = load_trained(run, state, last)
    distiller = run.distiller.eval()
    weights = {"student": state["student"], "deployed": state["deployed"]}
    size = height_and_width(config.data.image_size)
    student = Normalised(distiller.student_view, size, distiller.student_mean, distiller.student_std)
    trained = Trained(label, config, run.classes, student, distiller.methods, weights, step, run.total_steps)
    return trained, run


def _teacher(run: DistillationRun, label: str) -> Normalised | None:
    d = run.distiller
    try:
        view = d.teacher_view
    except UserError as error:  # several teachers
        raise UserError(f"{label}: {error}") from None
    return None if view is None else Normalised(view, d.teacher_size, d.teacher_mean, d.teacher_std)


def _check_alike(a: Trained, b: Trained, validated: bool) -> None:
    """Raises `UserError` unless both have the same classes and pixels and, with `validated`, validation images."""
    if a.classes != b.classes:
        raise UserError(f"{a.label} and {b.label} have different classes; analyse them separately")
    keys = ["data.image_size", "data.channels", "augment.crop_pct", "augment.interpolation"]
    if validated:  # else one may have been trained on what the other held out
        held_out = ["data.train", "data.val_fraction", "data.seed"]
        keys += ["data.val", *(held_out if a.config.data.val is None else [])]
    for key in keys:
        section, field = key.split(".")
        one, other = (getattr(getattr(t.config, section), field) for t in (a, b))
        if one != other:
            remedy = ", or set `data`" if field in ("train", "val", "val_fraction", "seed") else ""
            raise UserError(
                f"{a.label} and {b.label} were validated on different pixels ({key}: {one} and {other}); analyse them "
                f"separately{remedy}"
            )


def _check_same_teacher(label: str, teacher: Normalised, other_label: str, other: Normalised) -> None:
    """Raises `UserError` unless name, size, statistics and loaded weights are equal. Files are not compared: they may change."""
    a, b = (t.view.model.state_dict() for t in (teacher, other))
    same = teacher.view.name == other.view.name and teacher.size == other.size and a.keys() == b.keys()
    same = same and teacher.view.indices == other.view.indices
    same = same and torch.equal(teacher.mean, other.mean) and torch.equal(teacher.std, other.std)
    if not same or not all(torch.equal(a[key], b[key]) for key in a):
        raise UserError(
            f"{label} and {other_label} have different teachers ({teacher.view.name} and {other.view.name}: they differ "
            "in model, size, mean, std or weights); analyse them separately"
        )


# ---------------------------------------------------------------- projectors


class Call(NamedTuple):
    """One call of a projector, with its output (B, dt, H, W)."""

    projector: nn.Module
    stage: int  # the teacher's stage whose map is the target
    inputs: tuple[Tensor, ...]  # the student's map (B, ds, h, w), and queries if a CAP gets some
    output: Tensor


def projector_calls(methods: nn.ModuleDict, student: Features, teacher: Features) -> dict[str, Call]:
    """Calls the projectors onto teacher maps with these features; `METHOD.VIEW`, such as `scalekd.alt`, -> `Call`.

    `cap`, `dfm`, `tpp` and `scalekd` have those of the student path, by view, and of the proxy path (`proxy_VIEW`, onto
    the teacher's stage 3); `fd` has one per stage, such as `fd.s4`. The projectors of other methods are not comparable.
    """
    calls: dict[str, Call] = {}

    def note(name: str, stage: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name] = Call(module, stage, inputs, output)

    for name, method in methods.items():
        hooks = [
            projector.register_forward_hook(partial(note, f"{name}.{view}", stage))
            for view, projector, stage in _projectors(method)
        ]
        try:
            if hooks:
                method(student, teacher, torch.empty(0, dtype=torch.int64))  # these methods read no targets
        finally:
            for hook in hooks:
                hook.remove()
    order = [f"{name}.{view}" for name, method in methods.items() for view, *_ in _projectors(method)]
    return {name: calls[name] for name in order}  # proxies are called first and listed last


def _projectors(method: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """(view, projector, the teacher's stage that it projects onto) of a method."""
    if isinstance(method, ScaleKD):
        proxied = method.cap_of.items() if method.proxy_caps else ()  # one projector may serve both views
        proxies = [(f"proxy_{view}", method.proxy_caps[key], 3) for view, key in proxied]
        return [(view, method.student_caps[method.cap_of[view]], 4) for view in method.student_path] + proxies
    if isinstance(method, FD):
        return [(name, projector, int(name[1:])) for name, projector in method.projectors.items()]  # s1 to s4
    return []
