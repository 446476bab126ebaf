"""The figure that a comparison compares: top-1, or mAP for images with sets of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scalekd.common.errors import UserError
from scalekd.data.split import Split, open_split
from scalekd.distill.build import label_faults

from .ladder import Job

NAMES = {"top1": "top-1", "map": "mAP"}  # by their keys in records and in the cells of a summary


def figure_in(values: Mapping[str, Any]) -> str:
    """The key of the figure in a run's summary, a record or a cell of a comparison's summary."""
    return "top1" if "top1" in values else "map"


def figure_text(values: Mapping[str, Any]) -> str:
    """The figure of a record: `top-1 55.10 %`."""
    key = figure_in(values)
    return f"{NAMES[key]} {values[key]:.2f} %"


def open_data(planned: Sequence[Job]) -> Split:
    """The data of the first run. Raises `UserError` if the runs cannot share one figure, or their losses do not suit the labels.

    Each pair of sources is opened once: other keys of the section do not change the kind of the labels.
    """
    splits: dict[tuple[str | None, str | None], Split] = {}
    first: dict[bool, Job] = {}  # whether the images have sets of labels -> the first such run
    problems: dict[str, str] = {}  # problem -> the first run that has it
    for job in planned:
        data = job.config.data
        if (data.train, data.val) not in splits:
            splits[data.train, data.val] = open_split(data)
        split = splits[data.train, data.val]
        first.setdefault(split.multi_label, job)
        for problem in label_faults(job.config, split):
            problems.setdefault(f"  - {problem}", f"{job.student}, {job.method}: 1 problem")
    if len(first) > 1:
        several, one = (f"{first[kind].student}, {first[kind].method}" for kind in (True, False))
        raise UserError(
            f"the images of {several} have sets of labels, those of {one} one label each. Their figures are mAP and top-1, "
            "which cannot be compared; make two ladders"
        )
    if problems:
        hint = "\nFor sets of labels there is the ladder own-labels-ladder" if True in first else ""
        raise UserError("\n".join(f"{run}\n{problem}" for problem, run in problems.items()) + hint)
    return next(iter(splits.values()))


def refuse_other_figures(records: Mapping[Job, Mapping[str, Any]], several: bool) -> None:
    """Raises `UserError` if a finished run has another figure than the runs to come, because the labels changed.

    several: whether the images have sets of labels.
    """
    key = "map" if several else "top1"
    if odd := [job for job, record in records.items() if figure_in(record) != key]:
        raise UserError(
            f"the labels changed since {odd[0]} was finished: its figure is {NAMES[figure_in(records[odd[0]])]}, and now it "
            f"would be {NAMES[key]}; start a new comparison in another folder with `out`"
        )
