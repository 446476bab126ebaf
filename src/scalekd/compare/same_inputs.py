"""Whether finished runs that a comparison counts had the images and teachers that its other runs have now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError
from scalekd.common.files import is_file
from scalekd.data.batches import listed
from scalekd.data.fingerprint import fingerprint
from scalekd.data.split import open_split
from scalekd.models.weights.match import sha256_of
from scalekd.train.fingerprints import FILE, data_changes, teacher_changes

from .ladder import Job
from .results import Record


def check_finished(records: dict[Job, Record], out: Path) -> None:
    """Raises `UserError` if images or a teacher's weights changed since one of the finished runs in `records`.

    The runs in the table would then not be comparable. Runs whose folders were removed are not looked at.
    """
    looked: set[str] = set()  # a run for each folder, data and teacher
    now: dict[str, dict[str, Any]] = {}  # by the recipe section data
    for job, record in records.items():
        folder = Path(record.get("run") or out / "runs" / job.folder)
        data, teachers = job.config.data.model_dump_json(), repr(job.config.all_teachers)
        key = repr((record.get("from"), data, teachers))
        if key in looked or not is_file(folder / FILE):
            continue
        looked.add(key)
        if data not in now:
            now[data] = _data_now(job)
        changes = data_changes(folder, now[data]) + teacher_changes(folder, _teachers_now(job))
        if changes:
            what = "images" if any(change.startswith("data.") for change in changes) else "teacher"
            raise UserError(
                f"the {what} changed since {folder} was finished: {'; '.join(changes)}.\nRestore what changed, or start a "
                "new comparison in another folder with `out`" + ", without `known`" * bool(record.get("from"))
            )


def _data_now(job: Job) -> dict[str, Any]:
    split = open_split(job.config.data)
    return {
        "train": fingerprint(listed(split.train, split.train_indices)),
        "val": fingerprint(listed(split.val, split.val_indices)),
    }


def _teachers_now(job: Job) -> dict[str, str]:
    """The checksums of the teachers whose weights are files, by their keys in the recipe."""
    files = {
        job.config.key_of(name): Path(spec.weights) for name, spec in job.config.all_teachers.items() if spec.weights
    }
    return {key: sha256_of(file) for key, file in files.items() if is_file(file)}
