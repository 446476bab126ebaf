"""A frozen teacher beside the backbone of a detector or segmenter: the coarse map learns the teacher's last map.

RT-DETRv4 (arXiv:2510.25257) aligns the deep layers of its detectors with a foundation model in this way. The teacher and the
projector are not part of the deployed model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalekd.common.errors import UserError, first_line
from scalekd.common.sections import height_and_width
from scalekd.common.stopwatch import Stopwatch
from scalekd.methods.projectors import CrossAttentionProjector, linear_projector, make_norm
from scalekd.methods.shared import full_precision
from scalekd.models.build import build_model
from scalekd.models.inputs import Statistics, per_channel, resized, statistics, usual_size
from scalekd.models.options import Model
from scalekd.models.stages import MapShape, StageView
from scalekd.models.weights.trained import Loaded

from .config import LoopTeacher, Projector
from .pyramid import Pyramid, Size


class TeacherTerm(nn.Module):
    """Images and the backbone's coarsest map to a weighted scalar loss: 1 - cosine, averaged over the teacher's grid.

    Each image is resized to the teacher's input size, without keeping its aspect ratio. The student's map is averaged
    over the area of each position of the teacher's grid (`area_shares`), so that both maps show the same places and the
    padding of a batch is left out. Then the projector takes it to the teacher's channels.

    The teacher is frozen. It is moved with this module, but is not in its `parameters()` or `state_dict()`.

    Args:
        view: the teacher, with maps.
        size: (height, width) in pixels of its input.
        stats: (mean, std) of its input, for pixels in [0, 1].
        channels: of the student's map.
        stride: pixels per position of that map.
        projector: `linear`: a 1x1 convolution. `mlp`: two of them, with layer norm and GELU between. `cap`: ScaleKD's
            cross attention projector (arXiv:2411.06786, eq. 1) with layer norm.
        weight: factor of the loss.
    """

    def __init__(
        self,
        view: StageView,
        size: Size,
        stats: Statistics,
        channels: int,
        stride: int,
        projector: Projector,
        weight: float,
    ):
        super().__init__()
        assert view.shapes.final is not None
        view.model.requires_grad_(False).eval()
        self.view, self.size, self.stride, self.weight = view, size, stride, weight
        self.mean, self.std = (per_channel(values) for values in stats)
        self.target: MapShape = view.shapes.final
        self.projector = _projector(projector, (channels, *self.target[1:]), self.target)
        self.clock = Stopwatch()

    def forward(self, images: Sequence[Tensor], coarse: Tensor) -> Tensor:
        """images: B of `(C, h, w)` in [0, 1], without padding. coarse: `(B, channels, H, W)`, whose first
        ceil(h / stride) rows and ceil(w / stride) columns are those of the image."""
        target = self.see(images)
        rows, columns = (
            torch.stack(
                [area_shares(image.shape[side], self.stride, coarse.shape[side + 1], positions) for image in images]
            )
            for side, positions in zip((1, 2), self.target[1:])
        )  # (B, positions, H) and (B, positions, W)
        with torch.autocast(coarse.device.type, enabled=False):
            student = full_precision(coarse)
            aligned = torch.einsum("biy,bcyx,bjx->bcij", rows.to(student), student, columns.to(student))
        projected = self.projector(aligned)
        with torch.autocast(coarse.device.type, enabled=False):
            cosine = F.cosine_similarity(full_precision(projected), full_precision(target), dim=1)
        return self.weight * (1 - cosine).mean()

    @torch.no_grad()
    def see(self, images: Sequence[Tensor]) -> Tensor:
        """The teacher's last map after its final norm, `(B, D, h, w)`."""
        model = self.view.model
        if model.training:
            model.eval()
        with self.clock.timing(images[0].device):
            pixels = torch.cat([resized(image[None], self.size, model) for image in images])
            final = self.view((pixels - self.mean) / self.std).final
        assert final is not None
        return final

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.view.model._apply(fn)
        self.mean, self.std = fn(self.mean), fn(self.std)
        return self


def area_shares(length: int, stride: int, cells: int, positions: int) -> Tensor:
    """`(positions, cells)`: the share of each cell in the area of each position, along one side of an image.

    The side has `length` pixels, which `positions` divide evenly. Cell k covers the pixels from k * stride to
    (k + 1) * stride. Rows sum to 1; cells beyond the image have no share.
    """
    edges = torch.linspace(0, length, positions + 1, dtype=torch.float64)
    borders = (stride * torch.arange(cells + 1, dtype=torch.float64)).clamp(max=length)
    overlap = torch.minimum(edges[1:, None], borders[None, 1:]) - torch.maximum(edges[:-1, None], borders[None, :-1])
    return (overlap.clamp(min=0) * positions / length).float()


def _projector(name: Projector, student: MapShape, teacher: MapShape) -> nn.Module:
    """`(B, ds, h, w)` to `(B, dt, h, w)`; both maps have the same grid."""
    if name == "linear":
        return linear_projector(student, teacher)
    if name == "cap":
        return CrossAttentionProjector(student, teacher, norm="layer")
    width = teacher[0]
    first, second = nn.Conv2d(student[0], width, 1), nn.Conv2d(width, width, 1)
    return nn.Sequential(first, make_norm("layer", width), nn.GELU(), second)


def build_teacher(
    spec: LoopTeacher | None, channels: int, pyramid: Pyramid
) -> tuple[TeacherTerm | None, dict[str, Loaded]]:
    """Builds the section `teacher` of a recipe, and where its weights came from, by role; (None, {}) without one.

    channels: of the images. Raises `UserError`.
    """
    if spec is None:
        return None, {}
    size = height_and_width(spec.image_size or usual_size(spec.model))
    named = Model.model_validate(spec.of_model())
    model, loaded = build_model(named, channels=channels, image_size=size, classes=None, where="teacher")
    try:
        view = StageView(model, name=spec.model, image_size=size)
    except ValueError as error:
        reason = first_line(error).replace(" Use a larger data.image_size.", "")
        raise UserError(f"teacher.model: {reason} Set teacher.image_size to a size that it accepts.") from None
    if view.shapes.final is None:
        raise UserError(f"teacher.model: {str(view.refusal).splitlines()[0]} Use a ViT, such as DINOv2 or DINOv3.")
    if spec.projector == "cap" and view.shapes.final[1] * view.shapes.final[2] == 1:
        raise UserError(
            "teacher.projector: cap needs several positions; raise teacher.image_size, or use linear or mlp"
        )
    stats = statistics(model, named, channels, "teacher")
    level = pyramid.channels[-1], pyramid.strides[-1]
    return TeacherTerm(view, size, stats, *level, spec.projector, spec.weight), {"teacher": loaded}
