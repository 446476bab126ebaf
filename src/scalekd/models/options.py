"""The recipe sections that describe a model: `student`, `teacher`, `backbone`."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    JsonValue,
    ValidationError,
    WrapValidator,
    field_validator,
)

from scalekd.common.sections import ImageSize, Section
from scalekd.common.text import printable


def _natural_or_names(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            "use `natural`, or list the data's class names in the teacher's order, with names like numbers in quotes "
            f"(this is {reprlib.repr(value)})"
        ) from None


ClassOrder = Annotated[Literal["natural"] | tuple[str, ...], WrapValidator(_natural_or_names)]
FIT = "fit"  # value of `teacher.head` instead of a folder


class Backbone(Section):
    model: str
    """A timm model name, or the folder of a scalekd run or of a model in timm's format (docs/how-to/any-teacher.md)."""
    weights: str | None = None
    """`pretrained` (timm's own), the path of a .safetensors or .pt file, or `random` / nothing for the initial values."""
    prefix: str | None = None
    """Prefix of the model's tensor names in `weights`, such as `teacher.backbone.`; detected by default."""
    kwargs: dict[str, JsonValue] = Field(default={})
    """Passed to `timm.create_model`."""
    image_size: ImageSize | None = None
    """Input size in pixels; by default timm's for the model."""
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Mean and std of the model's input for pixels in [0, 1]; by default timm's for the model."""

    @field_validator("kwargs")
    @classmethod
    def _of_the_architecture(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        # timm would load weights from these, and older versions run code from such files
        refused = [key for key in kwargs if key in ("checkpoint_path", "cache_dir") or key.startswith("pretrained")]
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: not allowed here; set the weights with `weights`, such as student.weights=FILE"
            )
        if odd := [key for key in kwargs if not key.isidentifier()]:
            raise ValueError(f"{printable(repr(odd[0]))} is not the name of an argument")
        return kwargs

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        import timm

        from . import mixer  # noqa: F401 - registers `mlp_mixer` in timm
        from .names import way_to

        if not timm.is_model(name):
            raise ValueError(f"timm has no model `{printable(name)}`{way_to(name)}")
        return name


class Model(Backbone):
    image_size: ImageSize | None = None
    """Teachers: input size in pixels, if not the student's. The student's augmented images are resized to it."""
    cuts: tuple[int, int, int, int] | None = None
    """Plain ViTs and MLPs: the blocks after which stages 1 to 4 end; by default quarters of the depth."""
    top1: Annotated[float, Field(ge=0, le=100)] | None = None
    """Teachers: known top-1 accuracy in % on the validation images. The pre-flight warns if a sample is far below it."""
    head: str | None = None
    """Teachers: the folder of a classifier that `scalekd head` fitted on this backbone; it replaces any other.
    `fit`: `scalekd train` first fits one on the run's labelled images, into the run's folder."""
    classes: ClassOrder | None = None
    """Teachers: the class order if it is not the data's: `natural` for that of timm's train.py, or all names."""

    @property
    def fits_head(self) -> bool:
        return self.head == FIT
