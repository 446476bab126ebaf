"""`train.compile`: runs the distillation step through torch.compile (timings in docs/explanation/performance-tables.md).

It compiles functions, not modules. Parameters, `state_dict` keys and hooks stay as they are, and evaluation and export
call the student uncompiled.
"""

from __future__ import annotations

from typing import Any

import torch

from .distiller import Compiled, Distiller


def compile_step(distiller: Distiller, images: int, cuda_graphs: bool = False, **options: Any) -> None:
    """Makes `distiller` compile its step for batches of `images` images, at the first of them.

    A batch of another size, because bad images were skipped, is not compiled; its values are the same up to rounding.
    Neither is a teacher whose classifier or its input a method reads (srrl, fm). Random numbers are the same as without compiling.

    cuda_graphs: record the kernels as CUDA graphs (`train.cuda_graphs`). options: arguments of torch.compile.
    """
    if not options.keys() & {"backend", "mode", "options"}:
        options["options"] = {"fallback_random": True, "triton.cudagraphs": cuda_graphs}
    teachers = {
        name: torch.compile(teacher.see, dynamic=False, **options)
        for name, teacher in distiller.teachers.items()
        if not (teacher.needs_classifier or teacher.needs_pooled)
    }
    terms = torch.compile(distiller.terms, dynamic=False, **options)
    distiller.compiled = Compiled(images, terms, teachers, cuda_graphs)
