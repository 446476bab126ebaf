"""Recipe sections that describe a model: `student`, `teacher`, `backbone`."""

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

from scalekd.common.sections import HalfPrecision, ImageSize, Section
from scalekd.common.text import printable

from .weights.file import ENDINGS


def _natural_or_names(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            "must be `natural` or the names of the data's classes in the teacher's order; quote names that are numbers "
            f"(given {reprlib.repr(value)})"
        ) from None


ClassOrder = Annotated[Literal["natural"] | tuple[str, ...], WrapValidator(_natural_or_names)]
FIT = "fit"  # a value of `teacher.head`, instead of a folder


class Embedding(Section):
    dim: Annotated[int, Field(gt=0, le=2**14)] = 128
    """Numbers of an embedding."""
    kind: Literal["linear", "mlp"] = "linear"
    """`linear`: one layer. `mlp`: two layers with a GELU between them, the first as wide as the pooled features."""


class Backbone(Section):
    model: str
    """A timm model name, or the folder of a scalekd run or of a model in timm's format (docs/how-to/any-teacher.md)."""
    weights: str | None = None
    """`pretrained` for timm's weights, the path of a .safetensors or .pt file, or `random` (default) for initial values."""
    prefix: str | None = None
    """Prefix of the model's parameter names in the file `weights`, such as `teacher.backbone.`. Detected by default."""
    kwargs: dict[str, JsonValue] = Field(default={})
    """Arguments for `timm.create_model`."""
    image_size: ImageSize | None = None
    """Input size in pixels that the model is built for. Default: timm's for that model."""
    mean: tuple[float, ...] | None = None
    """Mean of each input channel, for pixels in [0, 1]. Default: timm's for that model."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Standard deviation of each input channel, for pixels in [0, 1]. Default: timm's for that model."""

    @field_validator("kwargs")
    @classmethod
    def _of_the_architecture(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        # timm would load weights from these locations, and its older versions run code from such files
        refused = [key for key in kwargs if key in ("checkpoint_path", "cache_dir") or key.startswith("pretrained")]
        if refused:
            raise ValueError(f"{', '.join(refused)}: not allowed here; use `weights`, such as student.weights=FILE")
        if odd := [key for key in kwargs if not key.isidentifier()]:
            raise ValueError(f"{printable(repr(odd[0]))} is not a valid argument name")
        return kwargs

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        import timm

        from . import added  # noqa: F401 - adds models to timm
        from .names import way_to

        if not timm.is_model(name):
            raise ValueError(f"timm has no model `{printable(name)}`{way_to(name)}")
        return name


class Model(Backbone):
    image_size: ImageSize | None = None
    """Teachers: input size in pixels, by default the student's. The student's augmented pixels are resized to it."""
    cuts: tuple[int, int, int, int] | None = None
    """Plain ViTs and MLPs: the blocks after which stages 1 to 4 end. Default: at each quarter of the depth."""
    top1: Annotated[float, Field(ge=0, le=100)] | None = None
    """Teachers: known top-1 accuracy in % on the validation images. The pre-flight warns if a sample is far below it."""
    head: str | None = None
    """Teachers: the folder of a classifier that `scalekd head` fitted on this backbone. It replaces the model's own.
    `fit`: before training, fit a classifier on the run's labelled images and save it in the run's folder. Or a file with
    the linear classifier that was published for a DINOv2 or DINOv3 (docs/how-to/any-teacher.md)."""
    classes: ClassOrder | None = None
    """Teachers: the order of the teacher's classes, if it differs from the data's: `natural` for the order that timm's
    train.py uses, or the names of all classes."""
    top_k: Annotated[int, Field(gt=0)] | None = None
    """Teachers: use only this many of the largest logits of an image, in half precision, and the probability of all
    other classes together, so that stored outputs are small (docs/how-to/compare.md). For `kd`, `dkd` and `bkd`; with the
    number of all classes for every loss on logits."""

    embedding: Embedding | None = None
    """Students: a head after the pooled features whose output is the embedding of an image, for retrieval. The loss `embed`
    trains it, and the exported files have it (docs/how-to/retrieval.md). {} for 128 numbers by a linear layer. A teacher
    has one if its folder has: then the folder's is used."""
    precision: HalfPrecision | None = None
    """Teachers: hold the weights in `bf16` or `fp16` and compute the teacher in it, its last stage under a method too.
    Its features are converted to float32, or taken as they are under the autocast of `train.precision`; losses are
    computed in float32. By default the weights stay in float32, and `train.precision` says how the teacher computes."""

    @property
    def has_head_folder(self) -> bool:
        """Whether `head` names a folder of `scalekd head`, and not a published file."""
        return bool(self.head) and not str(self.head).endswith(ENDINGS)

    @property
    def fits_head(self) -> bool:
        """Whether a classifier is fitted before training."""
        return self.head == FIT
