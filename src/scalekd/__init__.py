"""Distil strong pre-trained vision transformers into the small models people deploy."""

from __future__ import annotations

from scalekd.common import early_signals

if early_signals.runs_as_command():
    early_signals.answer_at_once()  # before anything else: the imports take a while

import importlib
from typing import TYPE_CHECKING, Any

# Some functions have the name of a package. Importing the packages first keeps a later import of one of their modules
# from putting the package in the function's place.
for _package in ("compare", "cost", "methods", "report", "train"):
    importlib.import_module(f"scalekd.{_package}")

from scalekd.api import (  # noqa: E402
    advise,
    compare,
    cost,
    embed,
    evaluate,
    evaluate_retrieval,
    export,
    fit_head,
    load_student,
    methods,
    plan,
    predict,
    probe,
    push,
    quantize,
    recipes,
    report,
    train,
)
from scalekd.common.errors import UserError  # noqa: E402
from scalekd.common.results import Result  # noqa: E402
from scalekd.common.stop import Stopped  # noqa: E402
from scalekd.common.version import __version__  # noqa: E402

if TYPE_CHECKING:
    from scalekd.distill.distiller import Distiller

__all__ = [
    "Distiller",
    "Result",
    "Stopped",
    "UserError",
    "__version__",
    "advise",
    "compare",
    "cost",
    "embed",
    "evaluate",
    "evaluate_retrieval",
    "export",
    "fit_head",
    "load_student",
    "methods",
    "plan",
    "predict",
    "probe",
    "push",
    "quantize",
    "recipes",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "Distiller":  # imports torch, which takes seconds
        from scalekd.distill.distiller import Distiller

        return Distiller
    raise AttributeError(f"module 'scalekd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
