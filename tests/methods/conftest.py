"""A small pair with grids that differ and are not square, and random features of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes

CLASSES = 5
POOLED = 20  # channels of what the teacher's classifier is given: not those of its final map


class Tail(nn.Module):
    """A frozen last stage that halves the grid, as a Swin's does: conv, GELU, linear, norm."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 2, stride=2)
        self.linear = nn.Linear(after, after)
        self.norm = nn.LayerNorm(after)
        self.batches: list[int] = []
        self.double().requires_grad_(False)

    def forward(self, k: int, x: Tensor, end: bool = True) -> Tensor:
        assert k == 3
        self.batches.append(len(x))
        x = self.linear(F.gelu(self.conv(x)).permute(0, 2, 3, 1))
        return (self.norm(x) if end else x).permute(0, 3, 1, 2)


@dataclass
class Pair:
    student: Shapes
    teacher: Shapes
    tail: Tail
    classifier: nn.Linear

    def features(self, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Features, Features, Tensor]:
        """Student and teacher features, all leaves that ask for a gradient, and class indices."""

        def random(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, dtype=dtype, requires_grad=True)

        def of(shapes: Shapes) -> Features:
            assert shapes.final is not None
            return Features(random(shapes.classes), tuple(random(*m) for m in shapes.maps), random(*shapes.final))

        student, teacher = of(self.student), of(self.teacher)
        self.tail.to(dtype)
        teacher.resume = self.tail
        teacher.pooled, teacher.classify = random(POOLED), self.classifier.to(dtype)
        targets = torch.randint(0, CLASSES, (batch,))
        student.distilled = random(self.student.classes)
        return student, teacher, targets


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(1)
    classifier = nn.Linear(POOLED, CLASSES).requires_grad_(False)
    torch.manual_seed(0)  # what follows does not depend on the line above
    student = Shapes("student", ((4, 8, 6), (4, 8, 6), (6, 4, 3), (8, 2, 3)), (8, 2, 3), CLASSES, two_heads=True)
    teacher = Shapes("teacher", ((4, 16, 12), (6, 8, 6), (8, 6, 4), (12, 3, 2)), (12, 3, 2), CLASSES, True, POOLED)
    return Pair(student, teacher, Tail(8, 12), classifier)
