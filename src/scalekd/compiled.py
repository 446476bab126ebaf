"""`train.compile`: the step of a distillation through torch.compile. docs/performance.md says what it gives.

What is compiled are functions, held beside the modules: parameters, `state_dict` keys and hooks are those of the plain step,
and what evaluates or exports the student calls it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distiller import Distiller
from .errors import UserError, first_line
from .shortages import OUT_OF_MEMORY
from .stages import Features


class Compiled(NamedTuple):
    """What `Distiller.forward` calls in place of its own functions."""

    images: int  # of a batch; others go through the plain functions: none is worth a minute of compiling
    terms: Callable[..., dict[str, Tensor]]  # the student's pass and the methods
    teachers: Mapping[str, Callable[[Tensor], Features]]


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


@contextmanager
def failures_told() -> Iterator[None]:
    """Turns what torch.compile cannot do into a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # seconds, and here already if it was raised

        if not isinstance(error, TorchDynamoException) or OUT_OF_MEMORY.search(str(error)):
            raise
        reason = getattr(error, "inner_exception", error)  # what the compiler's back end said
        raise UserError(
            f"train.compile: torch.compile cannot do this step here: {first_line(reason)}\n"
            "Set train.compile=false. On a CPU it needs a C++ compiler (g++), on a GPU Triton and a GPU that Triton serves."
        ) from None
