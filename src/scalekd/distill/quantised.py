"""Puts a fake-quantised student into a distiller: quantisation-aware distillation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from scalekd.common.errors import UserError, first_line
from scalekd.common.sections import height_and_width
from scalekd.config.fields import Quantize
from scalekd.config.recipe import Config
from scalekd.data.batches import Images, bad_images, eval_batches
from scalekd.data.calibration import calibration_split
from scalekd.data.split import Split
from scalekd.data.transforms import eval_transform
from scalekd.models.inputs import scaled
from scalekd.models.int8.fake import FakeQuantised, GraphView
from scalekd.models.int8.graph import graph_of
from scalekd.models.int8.onnx_quantiser import CHUNK, places_of, quantised, ranges
from scalekd.train import checkpoint

from .distiller import Distiller


def calibration_images(split: Split, config: Config) -> Images:
    """The images that `quantize.images` asks for, as in validation."""
    assert config.quantize is not None
    numbers = calibration_split(split, config.quantize.images, config.data.seed).ranges
    transform = eval_transform(config.data, config.augment)
    return Images(split.train, numbers, transform, None, bad_images("train", config.data, len(numbers)))


def normalised(images: Images, mean: Tensor, std: Tensor, size: int = CHUNK) -> Iterator[Tensor]:
    """Batches of normalised images, on the CPU."""
    for batch in eval_batches(images, size, 0, False):
        yield (scaled(batch.images) - mean.cpu()) / std.cpu()


def fake_quantise(distiller: Distiller, config: Config, options: Quantize, images: Images) -> None:
    """Replaces the student of a distiller. Its places and first ranges are those of onnxruntime's quantiser.

    Raises `UserError` if torch cannot export the student, if a loss trains its second head, and without the packages of
    `scalekd[onnx]`.
    """
    for name, method in distiller.methods.items():
        if getattr(method, "needs_two_heads", False):
            raise UserError(
                f"losses.{name}: a quantised student gives the mean of its two heads only. Train it with kd instead "
                f"(losses.{name}=off losses.kd={{}}), or with labels only"
            )
    old, student = distiller.student_view, distiller.student
    mean, std = distiller.student_mean, distiller.student_std
    card = {
        "model": config.student.model,
        "image_size": list(height_and_width(config.data.image_size)),
        "mean": mean.flatten().tolist(),
    }
    graph = graph_of(student, card, config.student.cuts)
    found = ranges(graph, normalised(images, mean, std), options.calibration)
    fake = FakeQuantised(graph, places_of(quantised(graph, found)))
    fake.put_on(mean.device)
    distiller.student = fake
    distiller.student_view = GraphView(fake, old.name, old.shapes, old.refusal)  # type: ignore[assignment]


def load_methods(distiller: Distiller, options: Quantize) -> None:
    """Loads the trained parameters of the methods. Raises `UserError` if there are some and the run has none for them."""
    if not any(True for _ in distiller.methods.state_dict()):
        return
    file = Path(options.run).expanduser() / "last.pt"
    if not file.is_file():
        raise UserError(
            f"quantize.run: {file} does not exist, and the losses {', '.join(distiller.methods)} have parameters that were "
            "trained with it. Quantise with losses on logits only, or with labels only"
        )
    try:
        distiller.methods.load_state_dict(checkpoint.load(file)["methods"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"quantize.run: the losses in {file} are others than this recipe's: {first_line(error)}"
        ) from None
