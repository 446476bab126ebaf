"""Readable errors for failures of torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from scalekd.common.errors import UserError, first_line
from scalekd.common.shortages import OUT_OF_MEMORY


@contextmanager
def explain_compile_failure() -> Iterator[None]:
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
