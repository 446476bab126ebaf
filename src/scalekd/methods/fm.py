"""`fm`: features of foundation models, class token and patch tokens (after UNIC, Proteus and PHI-S, all 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, MapShape, Shapes

from .projectors import Resample
from .shared import check_choice, check_features, check_weights, full_precision, pooled
from .standardise import Standardisation, Standardise

Loss = Literal["cosine_l1", "mse"]

IMAGES = 2048  # measured before training unless the option says otherwise
RATIO = 0.3  # of masked positions: the middle of Proteus' 0.1 to 0.5
TARGET = {"class": "class", "patch": "patch", "masked": "patch"}  # whose statistics a term's targets have


class FM(nn.Module):
    """`fm`: match a foundation model's class token and patch tokens, standardised, through expendable projectors.

    The teacher needs no classifier and the images need no labels. There are two terms, and a third if it has a weight:

    - `class`: the input of the model's classifier, `(B, D)`: the class token after the final norm, or what the model pools
      instead. A model without a single classifier gives the mean of its final map.
    - `patch`: the map after the final norm, `(B, D, H, W)`. The student's is first resampled to the teacher's grid, see
      `Resample`.
    - `masked`: the same map at random positions that the student does not see (Proteus). The student runs a second time,
      on images in which the cells of these positions show a learned patch of pixels.

    Each goes through a projector of its own: layer norm, linear layer, GELU, linear layer. The target is the teacher's
    vector, standardised by statistics of the run's first images (`Standardise`), so that its scale does not matter.

    Args:
        standardise: `phi-s`, rotated and divided by one number (PHI-S, arXiv:2410.01680); `channel`, each channel divided by
            its standard deviation (as UNIC does); `none` (as Proteus does).
        images: number of images that are measured before the first step. None: 2048. The statistics do not change later.
            For `phi-s` it should exceed the teacher's channels, or rounding chooses a part of the rotation.
        loss: `cosine_l1`: the mean of 1 - cosine similarity and of the smooth L1 distance (UNIC, arXiv:2408.05088); `mse`:
            the squared difference (Proteus, arXiv:2407.10366). Both are averaged over channels, positions and images.
        class_weight: weight of the term `class`; 0 leaves it out. Default 0.5, as in the code of UNIC.
        patch_weight: weight of the term `patch`; 0 leaves it out. Default 0.5, as in the code of UNIC.
        masked_weight: weight of the term `masked`; 0 leaves it and the second pass out. Default 0. Proteus has 1.
        mask_ratio: part of the teacher's positions that are masked in every image, at least one. None: 0.3.
        hidden: channels between the linear layers. None: 4 x the teacher's channels. 0: one linear layer after the layer
            norm, as in Proteus.
        teacher_drop: with several teachers, the probability of leaving out a teacher for an image; never the one with the
            largest loss (UNIC, which uses 0.5). Default 0.

    Raises:
        ValueError: no teacher, a model without maps, a number out of range, `images` with nothing to measure, `mask_ratio`
            without `masked_weight`, images that do not divide into the teacher's grid, or `phi-s` with a number of channels
            without a known Hadamard matrix.
    """

    needs_pooled = True
    measured: Tensor  # (), whether the statistics were set

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        standardise: Standardisation = "phi-s",
        images: int | None = None,
        loss: Loss = "cosine_l1",
        class_weight: float = 0.5,
        patch_weight: float = 0.5,
        masked_weight: float = 0.0,
        mask_ratio: float | None = None,
        hidden: int | None = None,
        teacher_drop: float = 0.0,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_choice("fm", "standardise", standardise, ("phi-s", "channel", "none"))
        check_choice("fm", "loss", loss, ("cosine_l1", "mse"))
        check_weights("fm", class_weight=class_weight, patch_weight=patch_weight, masked_weight=masked_weight)
        if images is not None and (images < 2 or standardise == "none"):
            raise ValueError(
                f"fm: images is {images}; it must be 2 or more, and needs standardise 'phi-s' or 'channel'"
            )
        if hidden is not None and hidden < 0:
            raise ValueError(f"fm: hidden is {hidden} and must be 0 or more")
        if not 0 <= teacher_drop < 1:
            raise ValueError(f"fm: teacher_drop is {teacher_drop} and must be in [0, 1)")
        assert student.final is not None and teacher.final is not None
        self.loss: Loss = loss
        self.teacher_drop = teacher_drop
        self.images = 0 if standardise == "none" else images or IMAGES
        self.images_to_measure = self.images
        self.weights = {"class": class_weight, "patch": patch_weight, "masked": masked_weight}
        tokens = (student.final[0], teacher.final[0])
        widths = {
            "class": (student.pooled or student.final[0], teacher.pooled or teacher.final[0]),
            "patch": tokens,
            "masked": tokens,
        }
        used = {term: sizes for term, sizes in widths.items() if self.weights[term]}
        self.resample = Resample(teacher.final[1:])
        self.hide = Hide(student.image, teacher.final[1:], mask_ratio) if masked_weight else None
        self.needs_again = self.hide is not None
        if mask_ratio is not None and not masked_weight:
            raise ValueError(f"fm: mask_ratio is {mask_ratio:g} and nothing is masked; set masked_weight, or remove it")
        self.projectors = nn.ModuleDict({term: projector(s, t, hidden) for term, (s, t) in used.items()})
        try:
            self.targets = nn.ModuleDict({TARGET[term]: Standardise(t, standardise) for term, (_, t) in used.items()})
        except ValueError as error:
            raise ValueError(f"fm: {error}") from None
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))
        self.register_load_state_dict_post_hook(_measure_if_needed)

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """`class`, `patch` and `masked`, weights applied: scalars, or with `teacher_drop` one value per image, `(B,)`."""
        assert teacher is not None
        ours = self._vectors(student, resample=True)
        theirs = {name: self.targets[name](x.detach()) for name, x in self._vectors(teacher).items()}
        if self.hide is not None:
            assert student.images is not None and student.again is not None
            images, masked = self.hide(student.images)
            unseen = self._vectors(student.again(images), resample=True)["patch"]
            ours["masked"], theirs["masked"] = (at(x, masked) for x in (unseen, theirs["patch"]))
        losses = {}
        for term, project in self.projectors.items():
            each = self.weights[term] * distance(project(ours[term]), theirs[term], self.loss)
            losses[term] = each if self.teacher_drop else each.mean()
        return losses

    def observe(self, teacher: Features) -> None:
        """Adds the teacher's features of a batch to the statistics."""
        vectors = self._vectors(teacher)
        for name, standardise in self.targets.items():
            standardise.observe(vectors[name])  # type: ignore[operator]

    def freeze(self) -> None:
        """Sets the statistics from what all processes observed. They do not change any more."""
        for standardise in self.targets.values():
            standardise.freeze()  # type: ignore[operator]
        self.measured.fill_(True)
        self.images_to_measure = 0

    def _vectors(self, features: Features, resample: bool = False) -> dict[str, Tensor]:
        """The vectors that the terms need: `class` `(B, D)`, `patch` `(B, H*W, D)`."""
        assert features.final is not None
        vectors = {}
        if "class" in self.targets:
            vectors["class"] = pooled(features) if features.pooled is None else features.pooled
        if "patch" in self.targets:
            x = self.resample(features.final) if resample else features.final
            vectors["patch"] = x.flatten(2).transpose(1, 2)
        return vectors


class Hide(nn.Module):
    """Masks cells of images at random, in the same number in every image, from torch's global generator.

    A masked cell shows `pixels`, which are learned. Through a patch embedding whose patches are the cells they become one
    learned token, as Proteus has.

    Args:
        image: shape of the images. grid: cells, (height, width). ratio: part of the cells; None: 0.3.

    Raises:
        ValueError: the images do not divide into the cells, or a ratio out of range.
    """

    def __init__(self, image: MapShape, grid: Sequence[int], ratio: float | None):
        super().__init__()
        (channels, *size), (H, W) = image, grid
        if ratio is not None and not 0 < ratio < 1:
            raise ValueError(f"fm: mask_ratio is {ratio:g} and must be above 0 and below 1")
        if size[0] % H or size[1] % W or H * W < 2:
            raise ValueError(
                f"fm: masked_weight needs images that divide into the teacher's grid, and {size[0]}x{size[1]} pixels do not "
                f"into {H}x{W}; change data.image_size or teacher.image_size"
            )
        self.grid, self.cell = (H, W), (size[0] // H, size[1] // W)
        self.count = min(H * W - 1, max(1, round((RATIO if ratio is None else ratio) * H * W)))
        self.pixels = nn.Parameter(torch.zeros(channels, *self.cell))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` to the masked images and the indices of their masked cells, row by row, `(B, count)`."""
        (H, W), (h, w) = self.grid, self.cell
        masked = torch.rand(len(images), H * W, device=images.device).argsort(dim=1)[:, : self.count]
        cells = torch.zeros(len(images), H * W, device=images.device, dtype=torch.bool).scatter(1, masked, True)
        where = cells.view(-1, 1, H, W).repeat_interleave(h, dim=2).repeat_interleave(w, dim=3)
        return torch.where(where, self.pixels.to(images.dtype).repeat(1, H, W), images), masked


def at(x: Tensor, positions: Tensor) -> Tensor:
    """The vectors of `(B, N, D)` at positions `(B, n)`: `(B, n, D)`."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[2]))


def projector(student: int, teacher: int, hidden: int | None) -> nn.Module:
    """`(..., student)` to `(..., teacher)`; hidden as for `FM`."""
    width = 4 * teacher if hidden is None else hidden
    if not width:
        return nn.Sequential(nn.LayerNorm(student), nn.Linear(student, teacher))
    return nn.Sequential(nn.LayerNorm(student), nn.Linear(student, width), nn.GELU(), nn.Linear(width, teacher))


def distance(x: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The distance of vectors `(B, D)` or `(B, N, D)`, `(B,)`, averaged over N, in float32 or float64."""
    with torch.autocast(x.device.type, enabled=False):
        x = full_precision(x)
        if loss == "mse":
            each = (x - target).square().mean(dim=-1)
        else:
            smooth = F.smooth_l1_loss(x, target, reduction="none").mean(dim=-1)
            each = (1 - F.cosine_similarity(x, target, dim=-1) + smooth) / 2
    return each if each.ndim == 1 else each.mean(dim=1)


def _measure_if_needed(module: nn.Module, _: object) -> None:
    """After `load_state_dict`: a checkpoint has the statistics unless it was written before they were measured."""
    assert isinstance(module, FM)
    module.images_to_measure = 0 if module.measured else module.images
