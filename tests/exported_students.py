"""Exported students for tests, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scalekd.models.create import create
from scalekd.models.student_file import export_student


def exported(
    folder: Path, name: str, size: tuple[int, int], channels: int = 3, classes: int = 3, kwargs: Any = None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A student whose parameters and statistics are not at their initial values, exported into `folder`; and its card.

    Its classes are ant, bee, cat and so on. Its predictions differ from image to image of `write_images`.
    """
    torch.manual_seed(0)
    given = {"in_chans": channels, "num_classes": classes} | (kwargs or {})
    student, given = create(name, size, False, given, "student")
    with torch.no_grad():
        for tensor in (*student.parameters(), *student.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
    card = {
        "model": name,
        "kwargs": given,
        "classes": [*["ant", "bee", "cat"], *(f"class {i}" for i in range(3, classes))][:classes],
        "image_size": list(size),
        "mean": [0.4, 0.45, 0.5][:channels],
        "std": [0.21, 0.22, 0.23][:channels],
        "interpolation": "bilinear" if classes == 3 else "bicubic",
        "crop_pct": 0.9,
    }
    assert export_student(student, folder / "student.safetensors", card) == 0
    return student.eval(), card
