"""Licences of pre-trained weights, as timm names them, and what they mean for a student."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

UNKNOWN = "unknown"
USUAL = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")  # which allow commercial use, with the notice kept
# timm's names with `nc` or `noncommercial` in them, and Apple's licence of models for research only
NON_COMMERCIAL = re.compile(r"(?<![a-z])(nc|non-?commercial|apple-amlr)(?![a-z])")


def licence_of(cfg: Mapping[str, Any] | None) -> str:
    """The licence in a `pretrained_cfg` of timm; `unknown` if it has none."""
    name = (cfg or {}).get("license")
    return name.lower() if isinstance(name, str) and name else UNKNOWN


def derived(licences: Iterable[str]) -> str:
    """The licence of weights that scalekd made from weights with these licences."""
    known = sorted(set(licences) - {UNKNOWN})
    return f"{UNKNOWN}, made from {' and '.join(known)}" if known else UNKNOWN


def licences_in(card: Mapping[str, Any]) -> dict[str, str]:
    """Role -> licence of the pre-trained weights that a run started with, from the provenance of a card or a run."""
    made = card.get("provenance")
    weights = made.get("weights") if isinstance(made, dict) else None
    roles = weights.items() if isinstance(weights, dict) else ()
    return {
        str(role): str(entry["licence"]) for role, entry in roles if isinstance(entry, dict) and entry.get("licence")
    }


def is_non_commercial(licence: str) -> bool:
    return NON_COMMERCIAL.search(licence) is not None


def explained(licence: str) -> str:
    """The licence, with a word on what it is: `cc-by-nc-4.0 (non-commercial)`, `dinov3-license (its own terms)`."""
    if is_non_commercial(licence):
        return f"{licence} (non-commercial)"
    return licence if licence in USUAL or licence.startswith(UNKNOWN) else f"{licence} (its own terms)"
