"""Distil strong pre-trained vision transformers into the small models people deploy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scalekd.common.version import __version__

if TYPE_CHECKING:
    from scalekd.common.errors import UserError
    from scalekd.distill.distiller import Distiller

__all__ = ["Distiller", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `scalekd --help` should not
    if name == "Distiller":
        from scalekd.distill.distiller import Distiller

        return Distiller
    if name == "UserError":
        from scalekd.common.errors import UserError

        return UserError
    raise AttributeError(f"module 'scalekd' has no attribute '{name}'")
