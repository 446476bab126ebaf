"""`wkd_f`: Wasserstein distance between Gaussians of features (Lv et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

from .shared import check_features, check_positive, check_stages, full_precision, stage_map

EPS = 1e-5  # added to the variances, as in the authors' code


class WKDF(nn.Module):
    """`wkd_f`: Wasserstein distance between Gaussians of the two models' features in each cell of a coarse grid.

    Lv et al., NeurIPS 2024 (arXiv:2412.08139), WKD-F with diagonal covariances. The student's map of a stage goes
    through 1x1, 3x3 and 1x1 convolutions (`ds -> width -> width -> dt`) and a BatchNorm. Each map is cut into
    `grid x grid` cells. In a cell the features have the mean m and the standard deviation d per channel, `(dt,)`. One
    term per stage, `s4` for example:

        alpha * mean over cells and batch of  mean_weight * |m_s - m_t|^2 + |d_s - d_t|^2

    Cell i of n takes the rows from floor(i h / n) to ceil((i + 1) h / n), so neighbours overlap where n does not divide
    h. Variances are those of a sample, plus 1e-5. Each map is cut on its own grid, so grids may differ; the authors' code
    resamples the student's map to the teacher's grid.

    Args:
        stages: stages 1 to 4; stage 4 is the map after the final norm. Default 4 alone, as in the authors' ImageNet code.
        alpha: weight of each stage. Default 0.02, the authors' for ResNet-34 to ResNet-18; ResNet-50 to MobileNet-V1
            has 0.005.
        mean_weight: factor of the means. Default 2, as in the authors' code.
        grid: cells per side. None (default): 4, as in the authors' code, or 2 or 1 where a cell would have a single
            position.
        width: channels between the convolutions. Default 256, as in the authors' code.
        relu: add a ReLU after the BatchNorm, as in the authors' code, whose teachers end with a ReLU. Default False,
            because the features of a ViT may be negative.

    Raises:
        ValueError: no teacher, a model without maps, a map with a single position, a cell with one, or an option out of
            range.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        stages: tuple[int, ...] = (4,),
        alpha: float = 0.02,
        mean_weight: float = 2.0,
        grid: int | None = None,
        width: int = 256,
        relu: bool = False,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_stages("wkd_f", stages)
        check_positive("wkd_f", alpha=alpha, mean_weight=mean_weight, width=width, grid=4 if grid is None else grid)
        self.stages, self.alpha, self.mean_weight = stages, alpha, mean_weight
        self.grids: dict[int, int] = {}
        self.projectors = nn.ModuleDict()
        for stage in stages:
            ds, dt = stage_map(student, stage)[0], stage_map(teacher, stage)[0]
            self.grids[stage] = _grid(student, teacher, stage, grid)
            self.projectors[f"s{stage}"] = nn.Sequential(
                nn.Conv2d(ds, width, 1),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.Conv2d(width, dt, 1, bias=False),
                nn.BatchNorm2d(dt),
                nn.ReLU() if relu else nn.Identity(),
            )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per stage, `alpha` applied. The targets are not used."""
        assert teacher is not None
        losses = {}
        for stage in self.stages:
            s = gaussians(self.projectors[f"s{stage}"](stage_map(student, stage)), self.grids[stage])
            t = gaussians(stage_map(teacher, stage).detach(), self.grids[stage])
            means, deviations = ((a - b).square().sum(dim=1).mean() for a, b in zip(s, t))
            losses[f"s{stage}"] = self.alpha * (self.mean_weight * means + deviations)
        return losses


def cells(length: int, count: int) -> list[slice]:
    """The `count` cells of `length` rows, as in adaptive average pooling."""
    return [slice(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]


def gaussians(x: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of `(B, D, H, W)` in each cell, `(B, D, cells)` each, in float32 or float64."""
    x = full_precision(x)
    parts = [x[:, :, rows, columns] for rows in cells(x.shape[2], grid) for columns in cells(x.shape[3], grid)]
    means = torch.stack([part.mean(dim=(2, 3)) for part in parts], dim=2)
    return means, torch.stack([(part.var(dim=(2, 3)) + EPS).sqrt() for part in parts], dim=2)


def _grid(student: Shapes, teacher: Shapes, stage: int, wanted: int | None) -> int:
    """The cells per side. Raises ValueError if a cell would have a single position, whose variance is not defined."""
    for grid in (4, 2, 1) if wanted is None else (wanted,):
        small = [model for model in (student, teacher) if _smallest(stage_map(model, stage)[1:], grid) < 2]
        if not small:
            return grid
    height, width = stage_map(small[0], stage)[1:]
    remedy = "use a larger data.image_size" if grid == 1 else "set a smaller grid, or None"
    raise ValueError(
        f"wkd_f: a cell needs two positions, and {small[0].model}'s map of stage {stage} is {height}x{width} for "
        f"{grid}x{grid} cells; {remedy}"
    )


def _smallest(size: tuple[int, ...], grid: int) -> int:
    """The number of positions of the smallest cell."""
    height, width = (min(cell.stop - cell.start for cell in cells(length, grid)) for length in size)
    return height * width
