"""Builds the model that a recipe section or a command-line argument describes, with checked weights."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from torch import Tensor, nn

from scalekd.common.errors import UserError, first_line

from . import added  # noqa: F401 - adds models to timm
from .create import build_plain, resolve
from .embedding_head import add_embedding_head, head_state
from .fitted_head import build_with_head
from .names import models_like
from .options import Model
from .published_head import build_with_published_head
from .weights.match import read_weights
from .weights.trained import Loaded, Verdict, trained


def build_model(
    spec: Model, *, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """The timm model of `spec` with its weights, and where they came from.

    With `spec.head` the classifier is the one that `scalekd head` fitted, or a published one. If the weights have another number of classes,
    a student gets a new head, described in `Loaded.head`; a teacher keeps the head of its file, if the file has one.

    Args:
        classes: width of the head; None keeps that of the pre-trained weights.
        where: recipe key of the model, such as `teacher`, for errors.

    Raises `UserError` for unknown arguments and for weights that do not fit.
    """
    with_head = build_with_head if spec.has_head_folder else build_with_published_head
    build = with_head if spec.head else build_plain
    model, loaded = build(spec, channels=channels, image_size=image_size, classes=classes, where=where)
    if spec.embedding is not None:
        _put_embedding_head(model, spec, loaded.prefix, where)
    return model, loaded


def _put_embedding_head(model: nn.Module, spec: Model, prefix: str, where: str) -> None:
    """Gives a model of a recipe the head that `spec.embedding` describes, with the weights of its file if they fit.

    A student without such weights starts with initial values. prefix: of the tensor names in the file. Raises
    `UserError` for a teacher without them.
    """
    assert spec.embedding is not None
    head, read = add_embedding_head(model, spec.embedding), dict[str, Tensor]()
    if spec.weights not in (None, "random", "pretrained"):
        read = head_state(read_weights(resolve(str(spec.weights)), where), prefix)
    if {key: value.shape for key, value in read.items()} == {k: v.shape for k, v in head.state_dict().items()}:
        head.load_state_dict(read)
    elif where != "student":
        source = Path(str(spec.weights)).name if read else spec.weights
        raise UserError(
            f"{where}.embedding: {source} has no embedding head of {spec.embedding.dim} numbers and kind "
            f"{spec.embedding.kind}; remove it, and the teacher's pooled features are the target"
        )


def timm_model(name: str, weights: str, size: tuple[int, int], remedy: str) -> tuple[nn.Module, Loaded, Verdict]:
    """A timm model with three input channels, where its weights came from, and whether they are trained.

    weights: as in a recipe. size: (height, width) in pixels. remedy: the line that ends an error about the weights.
    Raises `UserError`, also for untrained weights. The message does not name the model; the caller adds that.
    """
    try:
        spec = Model(model=name, weights=weights)
    except ValidationError:
        hint = models_like(name) if name else ""
        raise UserError(
            f"this is neither a timm model nor an exported student.{hint}\n"
            "Use a timm name, NAME=FILE for weights in a file, or a run's folder."
        ) from None
    try:
        model, loaded = build_model(spec, channels=3, image_size=size, classes=None, where="teacher")
    except UserError as error:
        message = first_line(error).removeprefix("teacher").lstrip(":. ")
        raise UserError(f"{message}\n{remedy}") from None
    verdict = trained(loaded)
    if verdict.status == "fail":
        raise UserError(f"{verdict.text}\n{remedy}")
    return model, loaded, verdict
