"""One trainable module: the student and the methods' own parameters. The teacher is held outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from .clock import Stopwatch
from .errors import UserError, nearest
from .methods import METHODS
from .stages import Features, StageView, input_channels

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one value per channel


class Distiller(nn.Module):
    """Student + method parameters, and a frozen teacher that is in no `parameters()`, `state_dict()` or DDP bucket.

    student, teacher: timm models. The teacher is frozen and stays in eval mode. It may be None when
      no loss needs one.
    losses: method name -> options and `weight`, as in a recipe: `{"ce": {}, "kd": {"temperature": 2.0}}`.
      A method of your own goes in as a callable in place of the options.
    image_size: (height, width) in pixels of what the student sees.
    teacher_size: what the teacher sees, if another. Pixels of another size than a model's are resized for it, with
      the interpolation that timm names for that model.
    student_stats, teacher_stats: (mean, std) per channel for pixels in [0, 1]; timm's own unless given.
    student_cuts, teacher_cuts: see `StageView`.

    Raises `UserError` for an unknown method or option and for a pair that a method cannot serve.
    """

    student_mean: Tensor  # (1, C, 1, 1), as the three below
    student_std: Tensor
    teacher_mean: Tensor
    teacher_std: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        losses: Mapping[str, Any],
        *,
        image_size: tuple[int, int],
        teacher_size: tuple[int, int] | None = None,
        student_stats: Statistics | None = None,
        teacher_stats: Statistics | None = None,
        student_cuts: Sequence[int] | None = None,
        teacher_cuts: Sequence[int] | None = None,
    ):
        super().__init__()
        self.student = student
        self.image_size = image_size
        self.student_view = _view("student", student, image_size, student_cuts)
        self.teacher_view: StageView | None = None
        self.teacher_size = teacher_size or image_size
        _add_statistics(self, "student", student, student_stats)
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self.teacher_view = _view("teacher", teacher, self.teacher_size, teacher_cuts)
            _add_statistics(self, "teacher", teacher, teacher_stats)
        self.weights = {
            name: float(options.get("weight", 1.0)) if isinstance(options, Mapping) else 1.0
            for name, options in losses.items()
        }
        self.methods = nn.ModuleDict({name: self._build(name, options) for name, options in losses.items()})
        self.needs_maps = any(getattr(m, "needs_maps", True) for m in self.methods.values())
        self.needs_classifier = any(getattr(m, "needs_classifier", False) for m in self.methods.values())
        self.teacher_clock = Stopwatch()

    def _build(self, name: str, options: Any) -> nn.Module:
        method: Callable[..., nn.Module]
        if isinstance(options, Mapping):
            if name not in METHODS:
                raise UserError(f"unknown method `{name}`.{nearest(name, METHODS)}")
            method, options = METHODS[name], {k: v for k, v in options.items() if k != "weight"}
        else:
            method, options = options, {}
        student, teacher = self.student_view.shapes, self.teacher_view and self.teacher_view.shapes
        if getattr(method, "needs_teacher", True) and teacher is None:
            raise UserError(f"losses.{name} needs a teacher")
        if getattr(method, "needs_maps", True):
            for view in (self.student_view, self.teacher_view):
                if view is not None and view.refusal:
                    raise UserError(f"losses.{name}: {view.refusal}")
        try:
            return method(student, teacher, **options)
        except (ValueError, TypeError) as error:
            raise UserError(f"losses.{name}: {error}") from None

    def forward(self, images: Tensor, targets: Tensor, teacher: Features | None = None) -> dict[str, Tensor]:
        """images (B, C, H, W), uint8 or float in [0, 1]; targets (B,) indices or (B, classes) probabilities.

        teacher: what `teacher_features` gave for these images; computed here unless given.
        Returns scalars: every weighted loss term by name, and their sum as `total`.
        """
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        if teacher is None:
            teacher = self.teacher_features(pixels)
        seen = resized(pixels, self.image_size, self.student)
        student = self.student_view((seen - self.student_mean) / self.student_std, maps=self.needs_maps)
        losses: dict[str, Tensor] = {}
        for name, method in self.methods.items():
            for term, value in method(student, teacher, targets).items():
                losses[name if term == name else f"{name}.{term}"] = self.weights[name] * value
        losses["total"] = torch.stack(list(losses.values())).sum()
        return losses

    def teacher_features(self, pixels: Tensor) -> Features | None:
        """pixels (B, C, H, W) in [0, 1] to what the methods need of the teacher; None without one."""
        if self.teacher_view is None:
            return None
        with self.teacher_clock.timing(pixels.device), torch.no_grad():
            seen = resized(pixels, self.teacher_size, self.teacher_view.model)
            return self.teacher_view(
                (seen - self.teacher_mean) / self.teacher_std,
                maps=self.needs_maps,
                resumable=self.needs_maps and self.teacher_view.shapes.can_resume,
                classifier=self.needs_classifier,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        # .to(device) takes the teacher along although it is not a sub-module
        super()._apply(fn, recurse)
        if self.teacher_view is not None:
            self.teacher_view.model._apply(fn)
        return self


def dead_parameters(distiller: Distiller) -> list[str]:
    """After a backward pass: names of trainable parameters that received no gradient."""
    return [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None]


def resized(pixels: Tensor, size: tuple[int, int], model: nn.Module) -> Tensor:
    """pixels (B, C, H, W) in [0, 1] at `size`, with the interpolation that the model was trained with."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode=interpolation(model), antialias=True).clamp(0, 1)


def interpolation(model: nn.Module) -> Literal["bilinear", "bicubic"]:
    """timm's for that model; bicubic where it names one that torch cannot do with antialiasing."""
    return "bilinear" if resolve_model_data_config(model)["interpolation"] == "bilinear" else "bicubic"


def default_statistics(model: nn.Module) -> Statistics:
    """timm's (mean, std) of the model's input for pixels in [0, 1]; those of three colours averaged for a grey model."""
    own, channels = resolve_model_data_config(model), input_channels(model)
    if len(own["mean"]) == channels:
        return own["mean"], own["std"]
    mean, std = ((sum(v) / len(v),) * channels for v in (own["mean"], own["std"]))
    return mean, std


def _add_statistics(module: nn.Module, role: str, model: nn.Module, given: Statistics | None) -> None:
    for kind, values in zip(("mean", "std"), given or default_statistics(model)):
        module.register_buffer(f"{role}_{kind}", torch.tensor(values).view(1, -1, 1, 1), persistent=False)


def _view(role: str, model: nn.Module, size: tuple[int, int], cuts: Sequence[int] | None) -> StageView:
    try:
        return StageView(model, name=_name(model), image_size=size, cuts=cuts)
    except ValueError as error:
        raise UserError(f"{role}: {error}") from None


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
