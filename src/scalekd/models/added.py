"""Adds scalekd's models to timm: import this module wherever a model is created or looked up by name."""

from __future__ import annotations

from . import mixer, transformers_vision, wide_last  # noqa: F401 - register their models
