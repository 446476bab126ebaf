"""One trainable module: the student and the methods' own parameters. The teachers are held outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError, nearest
from scalekd.common.stopwatch import Stopwatch
from scalekd.methods.names import METHODS
from scalekd.models.stages import Features, Shapes, StageView

if TYPE_CHECKING:
    pass
from scalekd.models.inputs import Statistics, default_statistics, resized


class Compiled(NamedTuple):
    """What `Distiller.forward` calls in place of its own functions."""

    images: int  # of a batch; others go through the plain functions: none is worth a minute of compiling
    terms: Callable[..., dict[str, Tensor]]  # the student's pass and the methods
    teachers: Mapping[str, Callable[[Tensor], Features]]


T = TypeVar("T")
ONE = "teacher"  # the name of a teacher that is the only one


@dataclass
class Teacher:
    """A frozen model and what it is shown. No module, so that it is in no `parameters()` of the distiller's."""

    view: StageView
    size: tuple[int, int]  # (height, width) in pixels
    mean: Tensor  # (1, C, 1, 1) for pixels in [0, 1], as `std`
    std: Tensor
    needs_maps: bool = False
    needs_classifier: bool = False

    def __call__(self, pixels: Tensor, see: Callable[[Tensor], Features] | None = None) -> Features:
        """pixels (B, C, H, W) in [0, 1] to what the methods need of it. see: what stands in for `self.see`."""
        features = (see or self.see)(resized(pixels, self.size, self.view.model))
        return self.view.resumable(features) if self.needs_maps and self.view.shapes.can_resume else features

    def see(self, pixels: Tensor) -> Features:
        """pixels (B, C, H, W) in [0, 1] of its size to features without `resume`."""
        return self.view((pixels - self.mean) / self.std, maps=self.needs_maps, classifier=self.needs_classifier)


class Distiller(nn.Module):
    """Student + method parameters, and frozen teachers that are in no `parameters()`, `state_dict()` or DDP bucket.

    student, teacher: timm models. The teacher is frozen and stays in eval mode. It may be None when
      no loss needs one, or several by name: `{"swin": ..., "dino": ...}`. Then methods of logits alone (kd, dkd, ...)
      read the mean of their logits, and every other method is there once for each of them, with parameters of its own
      and its share of the weight, as `scalekd@swin`.
    losses: method name -> options and `weight`, as in a recipe: `{"ce": {}, "kd": {"temperature": 2.0}}`, and with
      several teachers `teachers`, the names of those that it reads. A method of your own goes in as a callable in
      place of the options.
    image_size: (height, width) in pixels of what the student sees.
    teacher_size: what the teacher sees, if another. Pixels of another size than a model's are resized for it, with
      the interpolation that timm names for that model.
    student_stats, teacher_stats: (mean, std) per channel for pixels in [0, 1]; timm's own unless given.
    student_cuts, teacher_cuts: see `StageView`.
    With several teachers, `teacher_size`, `teacher_stats` and `teacher_cuts` are by name too.

    Raises `UserError` for an unknown method, option or teacher and for a pair that a method cannot serve.
    """

    student_mean: Tensor  # (1, C, 1, 1), as `student_std`
    student_std: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Mapping[str, nn.Module] | None,
        losses: Mapping[str, Any],
        *,
        image_size: tuple[int, int],
        teacher_size: tuple[int, int] | Mapping[str, tuple[int, int] | None] | None = None,
        student_stats: Statistics | None = None,
        teacher_stats: Statistics | Mapping[str, Statistics | None] | None = None,
        student_cuts: Sequence[int] | None = None,
        teacher_cuts: Sequence[int] | Mapping[str, Sequence[int] | None] | None = None,
    ):
        super().__init__()
        self.student = student
        self.image_size = image_size
        self.student_view = _view("student", student, image_size, student_cuts)
        for kind, values in zip(("mean", "std"), student_stats or default_statistics(student)):
            self.register_buffer(f"student_{kind}", _per_channel(values), persistent=False)
        self.teachers: dict[str, Teacher] = {}
        for name, model in ({ONE: teacher} if isinstance(teacher, nn.Module) else teacher or {}).items():
            model.requires_grad_(False).eval()
            size, stats = _of(teacher_size, name) or image_size, _of(teacher_stats, name) or default_statistics(model)
            view = _view(name, model, size, _of(teacher_cuts, name))
            self.teachers[name] = Teacher(view, size, _per_channel(stats[0]), _per_channel(stats[1]))
        self.weights: dict[str, float] = {}
        self.reads: dict[str, tuple[str, ...]] = {}  # the teachers of each method
        self.methods = nn.ModuleDict()
        for name, options in losses.items():
            self._add(name, options)
        self.needs_maps = any(getattr(m, "needs_maps", True) for m in self.methods.values())
        self.teacher_clock = Stopwatch()
        self.compiled: Compiled | None = None

    def _add(self, name: str, options: Any) -> None:
        """A loss of the recipe: one method, or one for each of its teachers."""
        method: Callable[..., nn.Module]
        if isinstance(options, Mapping):
            if name not in METHODS:
                raise UserError(f"unknown method `{name}`.{nearest(name, METHODS)}")
            method, options = METHODS[name], dict(options)
        else:
            method, options = options, {}
        weight, chosen = float(options.pop("weight", 1.0)), options.pop("teachers", None)
        names = self._chosen(name, method, chosen)
        if len(names) < 2 or not getattr(method, "needs_maps", True):
            uses = {name: names}
        else:
            uses = {f"{name}@{of}": (of,) for of in names}
        for key, read in uses.items():
            self.weights[key], self.reads[key] = weight / len(uses), read
            self.methods[key] = self._build(key, method, options)

    def _chosen(self, name: str, method: Callable[..., nn.Module], chosen: Sequence[str] | None) -> tuple[str, ...]:
        """The teachers that a loss reads."""
        needing = getattr(method, "needs_teacher", True)
        if unknown := [of for of in chosen or () if of not in self.teachers]:
            raise UserError(f"losses.{name}.teachers: no teacher {unknown[0]}.{nearest(unknown[0], self.teachers)}")
        if needing and not self.teachers:
            raise UserError(f"losses.{name} needs a teacher")
        if chosen is not None:
            return tuple(dict.fromkeys(chosen))
        return tuple(self.teachers) if needing or len(self.teachers) == 1 else ()

    def _build(self, key: str, method: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
        read = [self.teachers[of] for of in self.reads[key]]
        if getattr(method, "needs_maps", True):
            for view in (self.student_view, *(of.view for of in read)):
                if view.refusal:
                    raise UserError(f"losses.{key}: {view.refusal}")
        try:
            built = method(self.student_view.shapes, _together([of.view.shapes for of in read]), **options)
        except (ValueError, TypeError) as error:
            raise UserError(f"losses.{key}: {error}") from None
        for of in read:
            of.needs_maps |= getattr(built, "needs_maps", True)
            of.needs_classifier |= getattr(built, "needs_classifier", False)
        return built

    def forward(self, images: Tensor, targets: Tensor, teacher: Features | None = None) -> dict[str, Tensor]:
        """images (B, C, H, W), uint8 or float in [0, 1]; targets (B,) indices or (B, classes) probabilities.

        With fewer targets than images the first images are the labelled ones: methods that need targets see these
        alone, the others all images. Raises `UserError` when a method needs targets and there are none.
        teacher: what `teacher_features` gave for these images; computed here unless given. With one teacher only.
        Returns scalars: every weighted loss term by name, and their sum as `total`.
        """
        if not len(targets) and len(images):
            for key, method in self.methods.items():
                if getattr(method, "needs_targets", False):
                    raise UserError(f"losses.{key} needs labels, and this batch has none")
        compiled = self.compiled if self.compiled and self.compiled.images == len(images) else None
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        if teacher is None:
            given = self._all_features(pixels, compiled.teachers if compiled else None)
        else:
            given = dict.fromkeys(self.teachers, teacher)
        terms = compiled.terms if compiled else self.terms
        return terms(resized(pixels, self.image_size, self.student), targets, given)

    def terms(self, pixels: Tensor, targets: Tensor, given: dict[str, Features]) -> dict[str, Tensor]:
        """What `forward` returns. pixels (B, C, H, W) in [0, 1] of the student's size; given: of each teacher."""
        student = self.student_view((pixels - self.student_mean) / self.student_std, maps=self.needs_maps)
        if not self.student_view.shapes.classes:
            student.logits = student.logits[:, :0]  # timm gives what the pooling gives; that is not logits
        labelled = len(targets)
        losses: dict[str, Tensor] = {}
        for key, method in self.methods.items():
            seen = student, _mean_of([given[of] for of in self.reads[key]])
            if labelled < len(pixels) and getattr(method, "needs_targets", False):
                seen = student.first(labelled), seen[1] and seen[1].first(labelled)
            for term, value in method(*seen, targets).items():
                losses[key if term == key.partition("@")[0] else f"{key}.{term}"] = self.weights[key] * value
        losses["total"] = torch.stack(list(losses.values())).sum()
        return losses

    def teacher_features(self, pixels: Tensor) -> Features | None:
        """pixels (B, C, H, W) in [0, 1] to what the methods need of the only teacher; None without one."""
        return None if self.only_teacher() is None else self._all_features(pixels)[next(iter(self.teachers))]

    def _all_features(
        self, pixels: Tensor, compiled: Mapping[str, Callable[[Tensor], Features]] | None = None
    ) -> dict[str, Features]:
        if not self.teachers:
            return {}
        with self.teacher_clock.timing(pixels.device), torch.no_grad():
            return {name: teacher(pixels, (compiled or {}).get(name)) for name, teacher in self.teachers.items()}

    def held(self) -> list[Tensor]:
        """Parameters and buffers of the student and the methods, and of the teachers, which are no sub-modules."""
        modules = [self, *(teacher.view.model for teacher in self.teachers.values())]
        return [t for module in modules for t in (*module.parameters(), *module.buffers())]

    def only_teacher(self) -> Teacher | None:
        """The teacher, None without one. Raises `UserError` when there are several."""
        if len(self.teachers) > 1:
            raise UserError(f"this is for one teacher, and there are {', '.join(self.teachers)}")
        return next(iter(self.teachers.values()), None)

    @property
    def teacher_view(self) -> StageView | None:
        """The only teacher's; None without one."""
        teacher = self.only_teacher()
        return teacher.view if teacher else None

    @property
    def teacher_size(self) -> tuple[int, int]:
        """(height, width) that the only teacher sees; without one, what the student sees."""
        teacher = self.only_teacher()
        return teacher.size if teacher else self.image_size

    @property
    def teacher_mean(self) -> Tensor:
        """(1, C, 1, 1), the only teacher's."""
        teacher = self.only_teacher()
        assert teacher is not None
        return teacher.mean

    @property
    def teacher_std(self) -> Tensor:
        """(1, C, 1, 1), the only teacher's."""
        teacher = self.only_teacher()
        assert teacher is not None
        return teacher.std

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        # .to(device) takes the teachers along although they are no sub-modules
        super()._apply(fn, recurse)
        for teacher in self.teachers.values():
            teacher.view.model._apply(fn)
            teacher.mean, teacher.std = fn(teacher.mean), fn(teacher.std)
        return self


def _together(shapes: Sequence[Shapes]) -> Shapes | None:
    """What a method is told of its teachers: the one's, or of several what the mean of their logits has."""
    if len(shapes) < 2:
        return shapes[0] if shapes else None
    if len({of.classes for of in shapes}) > 1:
        told = ", ".join(f"{of.model} {of.classes}" for of in shapes)
        raise ValueError(
            f"the mean of several teachers' logits is taken, and their classes differ in number ({told}). "
            "Name those to take: `teachers: [...]`"
        )
    return Shapes(
        model=" + ".join(of.model for of in shapes),
        maps=(),
        final=None,
        classes=shapes[0].classes,
        can_resume=False,
        pooled=0,
    )


def _mean_of(features: Sequence[Features]) -> Features | None:
    """One teacher's features, or of several the mean of their logits."""
    if len(features) < 2:
        return features[0] if features else None
    return Features(logits=torch.stack([of.logits.float() for of in features]).mean(dim=0))


def _of(given: T | Mapping[str, T | None] | None, name: str) -> T | None:
    """A teacher's own value, of one for all or of one by name."""
    return given.get(name) if isinstance(given, Mapping) else given


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def _view(role: str, model: nn.Module, size: tuple[int, int], cuts: Sequence[int] | None) -> StageView:
    try:
        return StageView(model, name=_name(model), image_size=size, cuts=cuts)
    except ValueError as error:
        raise UserError(f"{role}: {error}") from None


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
