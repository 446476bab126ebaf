"""The teacher's outputs of a run on disk: the first run computes them, others that show it the same pixels read them.

Runs with one seed, data set and augmentation show the teacher the same micro-batches, whatever the student and the
method: every random choice follows from (seed, epoch, index). What is read has the bits of what would be computed.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalekd.common.errors import UserError
from scalekd.common.files import cannot_write
from scalekd.common.seeds import seed_from
from scalekd.config.recipe import Config
from scalekd.models.stages import Features
from scalekd.models.weights.trained import Loaded

from .distiller import Distiller

SUFFIX = ".outputs"
SUMS = 8  # bytes before a record: checksums of the pixels and of the record; 0: not written yet


@dataclass(frozen=True)
class Kept:
    """A tensor of a record."""

    name: str  # of the field of `Features`
    place: int  # in that field, if it holds several
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # the order of additions may follow them, so they are kept too

    @property
    def bytes(self) -> int:
        return (self.dtype.itemsize * torch.Size(self.shape).numel() + 7) // 8 * 8  # padded, so that all are aligned


class TeacherOutputs:
    """Records of one length in a file of `records`, one for each micro-batch of a run.

    A record counts only with the checksums of the pixels that it was made of and of its own bytes: after a crash, or
    for other pixels, the teacher is asked again. Several processes may write and read at once; they write the same.
    """

    def __init__(self, folder: Path, name: str, distiller: Distiller, records: int):
        self.path, self.distiller, self.records = folder / f"{name}{SUFFIX}", distiller, records
        self.kept: list[Kept] | None = None
        self.computed = self.read = 0

    def features(self, place: int, pixels: Tensor) -> Features | None:
        """What the teacher gives for micro-batch `place` of the run, whose pixels are (B, C, H, W) in [0, 1]."""
        of_pixels = zlib.crc32(_bytes(pixels)) or 1
        if self.kept is None:
            features = self._computed(pixels)
            if features is not None:
                self._open(features)
                self._write(place, of_pixels, features)
            return features
        start = place * self.size
        sums, record = self.file[start : start + SUMS], bytearray(self.file[start + SUMS : start + self.size])
        if sums == _sums(of_pixels, record):
            self.read += 1
            return self._features(record, pixels.device)
        features = self._computed(pixels)
        if features is not None and [kept for kept, _ in _tensors(features)] == self.kept and not any(sums):
            self._write(place, of_pixels, features)
        return features

    def _computed(self, pixels: Tensor) -> Features | None:
        self.computed += 1
        return self.distiller.teacher_features(pixels)

    def _open(self, features: Features) -> None:
        self.kept = [kept for kept, _ in _tensors(features)]
        self.size = SUMS + sum(kept.bytes for kept in self.kept)
        self.path = self.path.with_name(f"{self.path.stem}-{seed_from(repr(self.kept)):016x}{self.path.suffix}")
        whole = self.records * self.size
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            there = self.path.stat().st_blocks * 512 if self.path.exists() else 0
            if whole - there > free:
                raise UserError(
                    f"the teacher's outputs of this run take {whole / 1e9:,.1f} GB and {self.path.parent} has "
                    f"{free / 1e9:,.1f} GB free; leave --teacher-outputs out, or give another folder"
                )
            # all of its blocks now: a disk that is full later would end a process that writes to the map by SIGBUS
            number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(number, 0, whole)
                else:  # macOS
                    os.ftruncate(number, max(whole, os.fstat(number).st_size))
                self.file = mmap.mmap(number, whole)
            finally:
                os.close(number)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def _write(self, place: int, of_pixels: int, features: Features) -> None:
        record = b"".join(bytes(_bytes(tensor)).ljust(kept.bytes, b"\0") for kept, tensor in _tensors(features))
        start = place * self.size
        self.file[start + SUMS : start + self.size] = record
        self.file[start : start + SUMS] = _sums(of_pixels, record)  # last: from now on it counts

    def _features(self, record: bytearray, device: torch.device) -> Features:
        view = self.distiller.teacher_view
        assert view is not None and self.kept is not None
        found: dict[str, Any] = {"maps": [], "prefix": []}
        start = 0
        for kept in self.kept:
            flat = torch.frombuffer(record, dtype=kept.dtype, count=torch.Size(kept.shape).numel(), offset=start)
            start += kept.bytes
            tensor = torch.empty_strided(kept.shape, kept.strides, dtype=kept.dtype, device=device)
            tensor.copy_(flat.view(kept.shape))
            if kept.name in ("maps", "prefix"):
                values = found[kept.name]
                values += [None] * (kept.place - len(values)) + [tensor]
            else:
                found[kept.name] = tensor
        maps, prefix = found.pop("maps"), found.pop("prefix")
        features = Features(maps=tuple(maps), prefix=tuple(prefix + [None] * (len(maps) - len(prefix))), **found)
        if features.pooled is not None:
            features.classify = view.model.get_classifier()  # type: ignore[operator]
        return view.resumable(features) if maps and view.shapes.can_resume else features


def outputs_name(config: Config, distiller: Distiller, teacher: Loaded) -> str:
    """A file name that differs where the teacher, what it is shown or how it computes differs."""
    assert config.teacher is not None
    told = {
        "teacher": config.teacher.model_dump(mode="json"),
        "weights": [teacher.source, teacher.sha256, teacher.head],
        "data": config.data.model_dump(mode="json", exclude={"val", "workers", "on_bad_image", "max_bad"}),
        "augment": config.augment.model_dump(mode="json"),
        "student": [distiller.student_mean.tolist(), distiller.student_std.tolist()],  # fill what erasing leaves
        "seed": config.seed,
        "batch": [config.train.batch_size, config.train.accumulate, config.train.precision, config.train.channels_last],
        "torch": torch.__version__,
    }
    return f"seed-{config.seed}-{seed_from(json.dumps(told, sort_keys=True)):016x}"


def _tensors(features: Features) -> list[tuple[Kept, Tensor]]:
    found = []
    for field in fields(features):
        value = getattr(features, field.name)
        for place, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(tensor, Tensor):
                kept = Kept(field.name, place, tensor.dtype, tuple(tensor.shape), tensor.stride())
                found.append((kept, tensor))
    return found


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _sums(of_pixels: int, record: bytes | bytearray) -> bytes:
    return of_pixels.to_bytes(4, "little") + (zlib.crc32(record) or 1).to_bytes(4, "little")
