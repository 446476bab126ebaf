"""Distil strong pre-trained vision transformers into the small models people deploy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

__all__ = ["Distiller", "UserError", "__version__"]

if TYPE_CHECKING:
    from .distiller import Distiller
    from .errors import UserError


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `scalekd --help` should not
    if name == "Distiller":
        from .distiller import Distiller

        return Distiller
    if name == "UserError":
        from .errors import UserError

        return UserError
    raise AttributeError(f"module 'scalekd' has no attribute '{name}'")
