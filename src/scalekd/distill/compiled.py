"""`train.compile`: the step of a distillation through torch.compile. docs/explanation/performance.md says what it gives.

What is compiled are functions, held beside the modules: parameters, `state_dict` keys and hooks are those of the plain step,
and what evaluates or exports the student calls it as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from .distiller import Compiled, Distiller


def compile_step(distiller: Distiller, images: int, **options: Any) -> None:
    """From here on `distiller` takes batches of `images` images through torch.compile, which compiles at the first one.

    A batch of another size, one that bad images were left out of, takes the plain step: the same values, but for rounding.
    A teacher whose classifier a method calls (srrl) is not compiled. Random numbers are drawn as the plain step draws them.
    options: of torch.compile.
    """
    if not options.keys() & {"backend", "mode", "options"}:
        options["options"] = {"fallback_random": True}
    teachers = {
        name: torch.compile(teacher.see, dynamic=False, **options)
        for name, teacher in distiller.teachers.items()
        if not teacher.needs_classifier
    }
    distiller.compiled = Compiled(images, torch.compile(distiller.terms, dynamic=False, **options), teachers)
