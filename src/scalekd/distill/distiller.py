"""`Distiller`: the student, the methods and frozen teachers, from images to loss terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scalekd.common.errors import UserError, nearest
from scalekd.common.stopwatch import Stopwatch
from scalekd.methods.names import METHODS
from scalekd.models.inputs import Statistics, default_statistics, expect_unit_range, per_channel, resized, scaled
from scalekd.models.stages import Features, StageView
from scalekd.models.two_heads import train_apart

from .balance import Gradients
from .several_teachers import left_out, mean_logits, shapes_together
from .streams import Beside
from .teacher import Teacher
from .top_logits import TopK


class Compiled(NamedTuple):
    """Compiled functions that `Distiller.forward` uses for batches of one size."""

    images: int  # images per batch; other batches are too rare to be worth a minute of compiling
    terms: Callable[..., dict[str, Tensor]]  # for `Distiller.terms`
    # for `Teacher.see`, by teacher
    teachers: Mapping[str, Callable[[Tensor], Features]]
    cuda_graphs: bool = False


T = TypeVar("T")
ONE = "teacher"  # name of a single teacher


class Distiller(nn.Module):
    """The student and the methods as one trainable module, with frozen teachers.

    The teachers are moved with the module, but they are not in its `parameters()` or `state_dict()`, and DDP does not
    see them. They stay in eval mode; `forward` puts them back if something else changed it.

    Methods on logits alone (`kd`, `dkd`, ...) use the mean of the logits of several teachers. Any other method is built
    once for each of its teachers, named `scalekd@swin`, with its own parameters and an equal share of the weight.

    Args:
        student: a timm model.
        teacher: a timm model, several by name (`{"swin": ..., "dino": ...}`), or None if no loss needs one. They are
            frozen in place.
        losses: options of each method by name, with `weight`, as in a recipe: `{"ce": {}, "kd": {"temperature": 2.0}}`.
            With several teachers also `teachers`, the names of those that the method uses. For a method of your own,
            give its class or a function that builds it instead of the options: `{"ce": {}, "mine": MyMethod}`.
        image_size: the student's input size, (height, width) in pixels.
        teacher_size: a teacher's input size; the student's by default. Images of another size are resized, with the
            interpolation that timm states for the model.
        student_stats: (mean, std) per channel for pixels in [0, 1]; timm's for the model by default.
        teacher_stats: the same of the teacher; by name for several, as `teacher_size` and `teacher_cuts`.
        student_cuts: the blocks after which stages end, see `StageView`.
        teacher_cuts: the same of the teacher.
        teacher_top_k: how many of a teacher's largest logits the methods see, as `teacher.top_k` in a recipe; all by default.

    Raises:
        UserError: an unknown method, option or teacher, or models that a method does not support.

    Example:
        >>> import timm, torch
        >>> from scalekd import Distiller
        >>> student = timm.create_model("test_resnet", num_classes=5)
        >>> teacher = timm.create_model("test_vit", num_classes=5, img_size=64)
        >>> distiller = Distiller(student, teacher, {"ce": {}, "kd": {"weight": 0.5}, "fd": {}}, image_size=(64, 64))
        >>> optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
        >>> images, targets = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])
        >>> losses = distiller(images, targets)
        >>> sorted(losses)
        ['ce', 'fd.s4', 'kd', 'total']
        >>> losses["total"].backward()
        >>> optimizer.step()
    """

    student_mean: Tensor  # (1, C, 1, 1)
    student_std: Tensor  # (1, C, 1, 1)

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
        teacher_top_k: int | Mapping[str, int | None] | None = None,
    ):
        super().__init__()
        self.student = student
        self.image_size = image_size
        self.student_view = _view("student", student, image_size, student_cuts)
        for kind, values in zip(("mean", "std"), student_stats or default_statistics(student)):
            self.register_buffer(f"student_{kind}", per_channel(values), persistent=False)
        self.teachers: dict[str, Teacher] = {}
        for name, model in ({ONE: teacher} if isinstance(teacher, nn.Module) else teacher or {}).items():
            model.requires_grad_(False).eval()
            size = _value_for(teacher_size, name) or image_size
            stats = _value_for(teacher_stats, name) or default_statistics(model)
            view = _view(name, model, size, _value_for(teacher_cuts, name))
            self.teachers[name] = Teacher(view, size, per_channel(stats[0]), per_channel(stats[1]))
            if k := _value_for(teacher_top_k, name):
                where = f"{'' if name == ONE else 'teachers.'}{name}.top_k"
                self.teachers[name].top_k = TopK(where, k, view.shapes.classes)
        self.weights: dict[str, float] = {}
        self.reads: dict[str, tuple[str, ...]] = {}  # names of the teachers that each method uses
        self.dropping: dict[tuple[str, ...], float] = {}  # methods of one loss: probability of leaving out a teacher
        self.methods = nn.ModuleDict()
        for name, options in losses.items():
            self._add(name, options)
        self.needs_maps = any(getattr(m, "needs_maps", True) for m in self.methods.values())
        self.needs_pooled = any(getattr(m, "needs_pooled", False) for m in self.methods.values())
        self.needs_again = any(getattr(m, "needs_again", False) for m in self.methods.values())
        train_apart(student, any(getattr(m, "needs_two_heads", False) for m in self.methods.values()))
        self.teacher_clock = Stopwatch()
        self.pixels_checked = False
        self.eager = False  # do not use `compiled`
        self.compiled: Compiled | None = None
        self.beside = Beside()  # where the teachers run; a CUDA stream of their own with `train.streams`
        self.gradients: Gradients | None = None  # measures, and with `Balance` scales, the losses of a run

    def _add(self, name: str, options: Any) -> None:
        """Adds one method, or one for each teacher that it uses."""
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
            uses = {f"{name}@{teacher}": (teacher,) for teacher in names}
        for key, teachers in uses.items():
            self.weights[key], self.reads[key] = weight / len(uses), teachers
            self.methods[key] = self._build(key, method, options)
        if drop := getattr(self.methods[key], "teacher_drop", 0.0):
            if len(uses) < 2:
                raise UserError(f"losses.{name}.teacher_drop: needs several teachers and the loss uses one; remove it")
            self.dropping[tuple(uses)] = drop

    def _chosen(self, name: str, method: Callable[..., nn.Module], chosen: Sequence[str] | None) -> tuple[str, ...]:
        """The names of the teachers that a method uses."""
        needing = getattr(method, "needs_teacher", True)
        if unknown := [teacher for teacher in chosen or () if teacher not in self.teachers]:
            raise UserError(f"losses.{name}.teachers: no teacher `{unknown[0]}`.{nearest(unknown[0], self.teachers)}")
        if needing and not self.teachers:
            raise UserError(f"losses.{name} needs a teacher")
        if chosen is not None:
            return tuple(dict.fromkeys(chosen))
        return tuple(self.teachers) if needing or len(self.teachers) == 1 else ()

    def _build(self, key: str, method: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
        teachers = [self.teachers[name] for name in self.reads[key]]
        if getattr(method, "needs_maps", True):
            for view in (self.student_view, *(teacher.view for teacher in teachers)):
                if view.refusal:
                    raise UserError(f"losses.{key}: {view.refusal}")
        try:
            shapes = shapes_together([teacher.view.shapes for teacher in teachers])
            built = method(self.student_view.shapes, shapes, **options)
        except (ValueError, TypeError) as error:
            raise UserError(f"losses.{key}: {error}") from None
        if getattr(built, "needs_again", False) and has_batch_norms(self.student):
            raise UserError(
                f"losses.{key}: it runs the student again on other images, which would enter the statistics of the batch norms "
                f"of {_name(self.student)}; use a ViT, Mixer or ConvNeXt, or for fm set masked_weight=0"
            )
        for teacher in teachers:
            if teacher.top_k is not None:
                teacher.top_k.serve(key, built)
            teacher.needs_maps |= getattr(built, "needs_maps", True)
            teacher.needs_pooled |= getattr(built, "needs_pooled", False)
            teacher.needs_classifier |= getattr(built, "needs_classifier", False)
        return built

    def forward(self, images: Tensor, targets: Tensor, teacher: Features | None = None) -> dict[str, Tensor]:
        """The loss terms of a batch.

        Args:
            images: `(B, C, H, W)`, uint8 or float in [0, 1].
            targets: class indices `(B,)` or probabilities `(B, classes)`. If there are fewer targets than images, the
                first images are the labelled ones. Methods that need targets then get only these, the others all.
            teacher: the result of `teacher_features` for these images, if it is known. With one teacher only.

        Returns:
            Scalars: every weighted term by name, and their sum as `total`.

        Raises:
            UserError: a method needs targets and there are none; or the first batch was normalised already, because more
                than 1 % of its values lie outside [0, 1].
        """
        if not len(targets) and len(images):
            for key, method in self.methods.items():
                if getattr(method, "needs_targets", False):
                    raise UserError(
                        f"losses.{key} needs labels and this batch has none; remove the loss or add labelled images"
                    )
        compiled = self.compiled if self.compiled and self.compiled.images == len(images) else None
        if self.eager:
            compiled = None
        if compiled and compiled.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the graphs of the step before may be overwritten
        if not self.pixels_checked:  # once, because it waits for the device
            expect_unit_range(images)
            self.pixels_checked = True
        pixels = scaled(images) if images.dtype == torch.uint8 else images
        for frozen in self.teachers.values():
            frozen.stay_in_eval()
        if teacher is None:
            with self.beside.work(pixels):
                by_teacher = self._all_features(pixels, compiled.teachers if compiled else None)
        else:
            by_teacher = dict.fromkeys(self.teachers, teacher)
        if self.images_to_measure:
            self.beside.join(by_teacher)
            self._observe(by_teacher)
            self._freeze()
        pixels = resized(pixels, self.image_size, self.student)
        if compiled:
            self.beside.join(by_teacher)
            return compiled.terms(pixels, targets, by_teacher)
        student = self.student_features(pixels)
        self.beside.join(by_teacher)
        return self.compare(student, targets, by_teacher)

    def terms(self, pixels: Tensor, targets: Tensor, by_teacher: dict[str, Features]) -> dict[str, Tensor]:
        """The loss terms, as `forward` returns them, from the features of each teacher.

        pixels: `(B, C, H, W)` in [0, 1] of the student's input size.
        """
        return self.compare(self.student_features(pixels), targets, by_teacher)

    def compare(self, student: Features, targets: Tensor, by_teacher: dict[str, Features]) -> dict[str, Tensor]:
        """The loss terms of the features of all models."""
        labelled = len(targets)
        found: dict[str, Mapping[str, Tensor]] = {}
        for key, method in self.methods.items():
            inputs = student, mean_logits([by_teacher[name] for name in self.reads[key]])
            if labelled < len(student.logits) and getattr(method, "needs_targets", False):
                inputs = student.first(labelled), inputs[1] and inputs[1].first(labelled)
            found[key] = method(*inputs, targets)
        for keys, probability in self.dropping.items():
            found |= left_out({key: found[key] for key in keys}, probability)
        losses: dict[str, Tensor] = {}
        for key, terms in found.items():
            for term, value in terms.items():
                losses[key if term == key.partition("@")[0] else f"{key}.{term}"] = self.weights[key] * value
        losses["total"] = torch.stack(list(losses.values())).sum()
        return losses

    def student_features(self, pixels: Tensor) -> Features:
        """The student's features that the methods need, for pixels `(B, C, H, W)` in [0, 1] of its input size."""
        normalised = (pixels - self.student_mean) / self.student_std
        features = self._student_pass(normalised)
        if self.needs_again:
            features.images, features.again = normalised, self._student_pass
        return features

    def _student_pass(self, images: Tensor) -> Features:
        """The same for normalised images."""
        features = self.student_view(images, maps=self.needs_maps, classifier=self.needs_pooled)
        if not self.student_view.shapes.classes:
            features.logits = features.logits[:, :0]  # without a classifier timm returns pooled features
        return features

    @property
    def images_to_measure(self) -> int:
        """Number of images on which the methods want to measure their teachers before the first step; 0 once they have."""
        return max((getattr(method, "images_to_measure", 0) for method in self.methods.values()), default=0)

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Measures the teachers' features for methods that standardise them (`fm`). Does nothing if they were measured.

        Without this call, the first batch of `forward` is measured. In several processes, call it in all of them, each
        with its own images.

        batches: images `(B, C, H, W)`, uint8 or float in [0, 1]; together about `images_to_measure`. Raises `UserError` if there
        are none.
        """
        if not self.images_to_measure:
            return
        for teacher in self.teachers.values():
            teacher.stay_in_eval()
        images = None
        for images in batches:
            self._observe(self._all_features(scaled(images) if images.dtype == torch.uint8 else images))
        if images is None:
            raise UserError("`batches` has no images to measure the teachers' features on")
        self._freeze()

    def skip_measuring(self) -> None:
        """Leaves the features as they are, to count or time steps."""
        for name in self._to_measure():
            self.methods[name].images_to_measure = 0  # type: ignore[assignment]

    def _to_measure(self) -> list[str]:
        return [name for name, method in self.methods.items() if getattr(method, "images_to_measure", 0)]

    def _observe(self, by_teacher: Mapping[str, Features]) -> None:
        for name in self._to_measure():
            self.methods[name].observe(by_teacher[self.reads[name][0]])  # type: ignore[operator]

    def _freeze(self) -> None:
        for name in self._to_measure():
            self.methods[name].freeze()  # type: ignore[operator]

    def teacher_features(self, pixels: Tensor) -> Features | None:
        """The single teacher's features that the methods need, for pixels `(B, C, H, W)` in [0, 1]; None without one.

        Raises `UserError` if there are several teachers.
        """
        if (only := self.only_teacher()) is None:
            return None
        only.stay_in_eval()
        return self._all_features(pixels)[next(iter(self.teachers))]

    def _all_features(
        self, pixels: Tensor, compiled: Mapping[str, Callable[[Tensor], Features]] | None = None
    ) -> dict[str, Features]:
        if not self.teachers:
            return {}
        with self.teacher_clock.timing(pixels.device), torch.no_grad():
            return {name: teacher(pixels, (compiled or {}).get(name)) for name, teacher in self.teachers.items()}

    def held(self) -> list[Tensor]:
        """All parameters and buffers, including those of the teachers, which are not sub-modules."""
        modules = [self, *(teacher.view.model for teacher in self.teachers.values())]
        return [t for module in modules for t in (*module.parameters(), *module.buffers())]

    def only_teacher(self) -> Teacher | None:
        """The single teacher, or None without one. `teachers` has them all.

        Raises `UserError` if there are several. `teacher_view`, `teacher_size`, `teacher_mean` and `teacher_std` are
        shortcuts to its attributes, with the same error.
        """
        if len(self.teachers) > 1:
            raise UserError(f"this supports one teacher and the recipe has several: {', '.join(self.teachers)}")
        return next(iter(self.teachers.values()), None)

    @property
    def teacher_view(self) -> StageView | None:
        """The single teacher's view, or None without a teacher."""
        teacher = self.only_teacher()
        return teacher.view if teacher else None

    @property
    def teacher_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the single teacher's input; the student's without a teacher."""
        teacher = self.only_teacher()
        return teacher.size if teacher else self.image_size

    @property
    def teacher_mean(self) -> Tensor:
        """`(1, C, 1, 1)`, of the single teacher's input."""
        teacher = self.only_teacher()
        assert teacher is not None
        return teacher.mean

    @property
    def teacher_std(self) -> Tensor:
        """`(1, C, 1, 1)`, of the single teacher's input."""
        teacher = self.only_teacher()
        assert teacher is not None
        return teacher.std

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        # .to(device) must also move the teachers, which are not sub-modules
        super()._apply(fn, recurse)
        for teacher in self.teachers.values():
            teacher.view.model._apply(fn)
            held = teacher.view.held
            if held and any(p.dtype != held for p in teacher.view.model.parameters()):
                teacher.view.model.to(held)
            teacher.mean, teacher.std = fn(teacher.mean), fn(teacher.std)
        return self


def _value_for(values: T | Mapping[str, T | None] | None, name: str) -> T | None:
    """The value for a teacher, from one value for all or from values by name."""
    return values.get(name) if isinstance(values, Mapping) else values


def _view(role: str, model: nn.Module, size: tuple[int, int], cuts: Sequence[int] | None) -> StageView:
    try:
        return StageView(model, name=_name(model), image_size=size, cuts=cuts)
    except ValueError as error:
        raise UserError(f"{role}: {error}") from None


def has_batch_norms(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
