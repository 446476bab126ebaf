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
            "`natural`, or the names of the data's classes in the teacher's order, those like numbers in quotes "
            f"(given {reprlib.repr(value)})"
        ) from None


ClassOrder = Annotated[Literal["natural"] | tuple[str, ...], WrapValidator(_natural_or_names)]
FIT = "fit"  # of `teacher.head`, in place of a folder


class Backbone(Section):
    model: str
    """A timm model name; or a folder, a scalekd run's or one in timm's format (docs/how-to/any-teacher.md)."""
    weights: str | None = None
    """`pretrained` (timm's own), the path of a .safetensors or .pt file, or `random` / nothing for the initial values."""
    prefix: str | None = None
    """What stands before the model's names in `weights`, such as `teacher.backbone.`; found out unless given."""
    kwargs: dict[str, JsonValue] = Field(default={})
    """Passed to `timm.create_model`."""
    image_size: ImageSize | None = None
    """Pixels that it is built for; timm's own for that model unless given."""
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Statistics of the model's input for pixels in [0, 1]; timm's own for that model unless given."""

    @field_validator("kwargs")
    @classmethod
    def _of_the_architecture(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        # timm would fetch weights from where these say, and older versions of it run code from such a file
        refused = [key for key in kwargs if key in ("checkpoint_path", "cache_dir") or key.startswith("pretrained")]
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: not here; `weights` names the weights, such as student.weights=FILE"
            )
        if odd := [key for key in kwargs if not key.isidentifier()]:
            raise ValueError(f"{printable(repr(odd[0]))} is no name of an argument")
        return kwargs

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        import timm

        from . import mixer  # noqa: F401 - adds a name to timm's
        from .names import way_to

        if not timm.is_model(name):
            raise ValueError(f"timm has no model `{printable(name)}`{way_to(name)}")
        return name


class Model(Backbone):
    image_size: ImageSize | None = None
    """Teachers: the size the teacher sees, if not the student's; resized from the same augmented pixels."""
    cuts: tuple[int, int, int, int] | None = None
    """Plain ViTs and MLPs: the blocks after which stages 1 to 4 end. Quarters of the depth unless given."""
    top1: Annotated[float, Field(ge=0, le=100)] | None = None
    """Teachers: known top-1 accuracy in % on the validation images; pre-flight warns when a sample is far below."""
    head: str | None = None
    """Teachers: the folder of a classifier that `scalekd head` fitted on this backbone; it takes the place of any other.
    `fit`: `scalekd train` fits one first, on the run's labelled images, into the run's folder."""
    classes: ClassOrder | None = None
    """Teachers: the order of its classes where it is not the data's: `natural`, that of timm's train.py, or all names."""

    @property
    def fits_head(self) -> bool:
        return self.head == FIT
