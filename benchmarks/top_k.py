"""Measures how far `teacher.top_k` changes losses on logits and their gradients, for k from 5 to all classes.

    python benchmarks/top_k.py --out docs/results/performance

The teachers: the demo's on Fashion-MNIST (10 classes), the laboratory's on its canvases (100 classes), and drawn logits
of 1,000 classes, normal with a standard deviation of 1 or 2 and a larger one for the true class, such that it has a mean
probability of about 0.8. The student has four fifths of the teacher's logits and normal noise of a standard deviation of
0.5. The error is the norm of the difference of the gradients at the student's logits over the norm of the gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import about, parser, prepare, table, write
from torch import Tensor

from scalekd.api import load_student
from scalekd.config.recipe import load_recipe
from scalekd.data.batches import eval_batches
from scalekd.data.sources.open import open_source
from scalekd.distill.build import build
from scalekd.distill.top_logits import rebuilt, top_logits
from scalekd.methods.names import METHODS
from scalekd.models.stages import Features, Shapes

LAB = Path(__file__).parents[1] / "lab"
IMAGES = 2000
LOSSES: dict[str, tuple[str, dict[str, float]]] = {  # column: the loss and its options
    "kd": ("kd", {}),
    "kd, T 2": ("kd", {"temperature": 2.0}),
    "kd, T 4": ("kd", {"temperature": 4.0}),
    "dkd": ("dkd", {}),
    "dkd, T 4": ("dkd", {"temperature": 4.0}),
    "dist": ("dist", {}),
    "bkd": ("bkd", {}),
}


def of_demo(device: torch.device) -> tuple[Tensor, Tensor]:
    """The logits of the demo's teacher, `(N, 10)`, and the classes."""
    run = build(load_recipe("demo"), device)
    batch = next(eval_batches(run.val_images, IMAGES, 0, False))
    features = run.distiller.teacher_features(batch.images / 255)
    assert features is not None
    return features.logits, batch.targets


def of_laboratory() -> tuple[Tensor, Tensor]:
    """The logits of the laboratory's teacher, `(N, 100)`, for canvases of the embedded test images."""
    from data import ITEM, canvases  # lab/data.py

    source = open_source("fashion-mnist:test", "data.val")
    items = np.stack([np.asarray(source[i][0].resize((ITEM, ITEM))) for i in range(len(source))])
    images, classes = canvases(items, np.asarray(source.targets), IMAGES, np.random.default_rng(0))
    teacher, card = load_student(LAB / "teacher")
    pixels = torch.from_numpy(images)[:, None] / 255
    mean, std = (torch.tensor(card[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return teacher.eval()((pixels - mean) / std), torch.from_numpy(classes).long()


def drawn(deviation: float, classes: int = 1000) -> tuple[Tensor, Tensor]:
    """Drawn logits `(N, classes)` and the true classes."""
    random = torch.Generator().manual_seed(0)
    logits = deviation * torch.randn(IMAGES, classes, generator=random)
    true = torch.randint(classes, (IMAGES,), generator=random)
    others = torch.tensor(classes).log() + deviation**2 / 2  # the expected log-sum-exp
    margin = others + 2.5 + 2 * torch.randn(IMAGES, generator=random)
    logits[torch.arange(IMAGES), true] = margin
    return logits, true


def value_and_gradient(
    loss: str, options: dict[str, float], student: Tensor, teacher: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """A loss, and its gradient at the student's logits."""
    shapes = Shapes(model="drawn", maps=(), final=None, classes=student.shape[1])
    student = student.detach().requires_grad_()
    terms = METHODS[loss](shapes, shapes, **options)(Features(student), Features(teacher), targets)
    total = torch.stack(list(terms.values())).sum()
    return total.detach(), torch.autograd.grad(total, student)[0]


def measure(teacher: Tensor, targets: Tensor) -> dict[str, Any]:
    classes = teacher.shape[1]
    random = torch.Generator().manual_seed(1)
    student = 0.8 * teacher + 0.5 * torch.randn(teacher.shape, generator=random)
    probabilities = teacher.softmax(1)
    found: dict[str, Any] = {
        "classes": classes,
        "top-1 %": 100 * (teacher.argmax(1) == targets).float().mean().item(),
        "mean largest probability": probabilities.amax(1).mean().item(),
        "k": {},
    }
    for k in sorted({k for k in (5, 10, 20, 50, 100, 200, 500) if k < classes} | {classes}):
        errors, of_loss = {}, {}
        for column, (loss, options) in LOSSES.items():
            top = top_logits(teacher, k, options.get("temperature", 1.0))
            seen = rebuilt(top, classes, options.get("temperature", 1.0))
            value, true = value_and_gradient(loss, options, student, teacher, targets)
            other, changed = value_and_gradient(loss, options, student, seen, targets)
            of_loss[column] = ((other - value) / value).item()
            errors[column] = ((changed - true).norm() / true.norm()).item()
        top = top_logits(teacher, k)
        bytes_ = sum(part.nbytes for part in top) / len(teacher)
        rest = 0.0 if k == classes else top.rest.exp().mean().item()
        found["k"][str(k)] = {
            "bytes an image": bytes_,
            "probability of the rest": rest,
            "error of the gradient": errors,
            "error of the loss": of_loss,
        }
    return found


def main() -> None:
    args = parser(__doc__, rounds=1).parse_args()
    device = prepare(args)
    teachers = {
        "demo": of_demo(device),
        "laboratory": of_laboratory(),
        "drawn, deviation 1": drawn(1.0),
        "drawn, deviation 2": drawn(2.0),
    }
    found = about(device) | {"images": IMAGES, "teachers": {name: measure(*made) for name, made in teachers.items()}}
    lines = []
    for name, of_teacher in found["teachers"].items():
        rows = [
            [
                k,
                f"{at['bytes an image']:.0f}",
                f"{at['probability of the rest']:.4f}",
                f"{at['error of the loss']['kd']:+.1e}",
                *(f"{at['error of the gradient'][column]:.1e}" for column in LOSSES),
            ]
            for k, at in of_teacher["k"].items()
        ]
        lines += [
            f"{name}: {of_teacher['classes']} classes, top-1 {of_teacher['top-1 %']:.1f} %, mean largest probability "
            f"{of_teacher['mean largest probability']:.2f}",
            "",
            *table(["k", "bytes an image", "rest", "loss of kd", *LOSSES], rows),
            "",
        ]
    lines.append(
        "Relative errors of the loss of `kd`, and of the gradients of all losses at the student's logits. Rest: mean "
        "probability of the classes that are left out. Drawn logits: no trained teacher."
    )
    write(args.out, "top-k", found, lines)


if __name__ == "__main__":
    import sys

    sys.path.append(str(LAB))
    main()
