"""Pre-flight checks of the teacher beside a detector's or segmenter's backbone."""

from __future__ import annotations

from scalekd.models.weights.trained import Loaded
from scalekd.transfer.config import LoopTeacher
from scalekd.transfer.teacher import TeacherTerm

from .model import Check, from_source, licence_check, unseen_pixels, untrained_teacher


def teacher_checks(spec: LoopTeacher, loaded: Loaded, teacher: TeacherTerm) -> list[Check]:
    """Its weights and their licence, the pixels it ignores, and what of it is learnt."""
    random = loaded.source == "random"
    weights = (
        untrained_teacher("teacher weights", "teacher")
        if random
        else from_source("teacher", "teacher", loaded, skippable=False)
    )
    channels, height, width = teacher.target
    text = (
        f"images resized to {teacher.size[0]}x{teacher.size[1]} give {height}x{width} positions of {channels} channels; "
        f"projector {spec.projector}, loss weight {spec.weight:g}"
    )
    pixels = unseen_pixels("teacher", "teacher", teacher.view.model, teacher.size)
    return [weights, *licence_check("teacher", loaded), *pixels, Check("teacher", "ok", text)]
