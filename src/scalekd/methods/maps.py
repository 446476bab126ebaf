"""What the methods on stage maps share: a stage's map, and the check of the option `stages`."""

from __future__ import annotations

from typing import Any

from ..stages import Features, Shapes


def stage_map(model: Shapes | Features, stage: int) -> Any:
    """The map of stage 1 to 4, or its shape. Stage 4 is the one after the model's final norm."""
    return model.final if stage == 4 else model.maps[stage - 1]


def check_stages(method: str, stages: tuple[int, ...]) -> None:
    """Raises ValueError unless `stages` names some of the stages 1 to 4, each once."""
    if not stages or len(set(stages)) != len(stages) or not set(stages) <= {1, 2, 3, 4}:
        raise ValueError(f"{method}: stages is {list(stages)}; name each of the stages 1 to 4 once at most")
