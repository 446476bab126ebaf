"""Readable errors for failures of torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from scalekd.common.errors import UserError, first_line
from scalekd.common.out_of_memory import OUT_OF_MEMORY


@contextmanager
def explain_compile_failure() -> Iterator[None]:
    """Turns a failure of torch.compile into a `UserError`; passes on all other errors."""
    try:
        yield
    except RuntimeError as error:
        # importing it takes seconds; if this error is torch.compile's, it is imported already
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException) or OUT_OF_MEMORY.search(str(error)):
            raise
        reason = getattr(error, "inner_exception", error)  # the error of the compiler's back end
        raise UserError(
            f"train.compile: torch.compile failed on this step: {first_line(reason)}\n"
            "Set train.compile=false. On a CPU, torch.compile needs a C++ compiler (g++); on a GPU, a Triton that supports it."
        ) from None
