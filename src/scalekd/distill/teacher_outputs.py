"""Stores the teacher's outputs of a run on disk, for other runs that give the teacher the same images.

Runs with the same seed, data set and augmentation give the teacher the same micro-batches, for any student and method,
because every random choice follows from (seed, epoch, index). The stored outputs are bit for bit the computed ones.
With `teacher.top_k` the file has the largest logits only, and computed outputs are reduced to these too.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalekd.common.errors import UserError
from scalekd.common.files import cannot_write
from scalekd.common.seeds import seed_from
from scalekd.config.losses import reads_teacher
from scalekd.config.recipe import Config
from scalekd.methods.names import METHODS
from scalekd.models.stages import Features
from scalekd.models.weights.trained import Loaded

from .distiller import Distiller

SUFFIX = ".outputs"
SUMS = 8  # bytes before a record: checksums of the pixels and of the record; 0 if not written yet


@dataclass(frozen=True)
class Kept:
    """A tensor of a record."""

    name: str  # the field of `Features`
    place: int  # index in that field, if it has several tensors
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # stored too: sums over the tensor may add in memory order

    @property
    def bytes(self) -> int:
        return (self.dtype.itemsize * torch.Size(self.shape).numel() + 7) // 8 * 8  # padded to align the next tensor


class TeacherOutputs:
    """A file with one record of fixed length for each of the `records` micro-batches of a run.

    A record is valid only if the checksums of its pixels and of its bytes match. Otherwise, after a crash or for other
    pixels, the outputs are computed again. Several processes may use the file at the same time; they write equal bytes.

    Args:
        folder: where the file is; created if missing.
        name: start of the file name, see `outputs_name`.
        distiller: computes outputs that are not stored. It has one teacher.
        records: number of micro-batches in the run.
        losses: the methods of all runs that use the file; their needs are stored together, or the file would be another.
    """

    def __init__(self, folder: Path, name: str, distiller: Distiller, records: int, losses: Iterable[str] = ()):
        self.path, self.distiller, self.records = folder / f"{name}{SUFFIX}", distiller, records
        teacher = distiller.only_teacher()
        if (
            teacher is not None and not teacher.view.refusal and teacher.top_k is None
        ):  # with it, others have other files
            for method in (METHODS[loss] for loss in losses if reads_teacher(loss)):
                teacher.needs_maps |= getattr(method, "needs_maps", True)
                teacher.needs_pooled |= getattr(method, "needs_pooled", False)
                teacher.needs_classifier |= getattr(method, "needs_classifier", False)
        self.kept: list[Kept] | None = None
        self.computed = self.read = 0

    def features(self, place: int, pixels: Tensor) -> Features | None:
        """The teacher's features for micro-batch `place` of the run, with pixels `(B, C, H, W)` in [0, 1].

        Raises `UserError` if the file does not fit on the disk or cannot be written.
        """
        pixels_sum = zlib.crc32(_bytes(pixels)) or 1
        if self.kept is None:
            features = self._computed(pixels)
            if features is not None:
                self._open(features)
                self._write(place, pixels_sum, features)
            return features
        start = place * self.size
        sums, record = self.file[start : start + SUMS], bytearray(self.file[start + SUMS : start + self.size])
        if sums == _sums(pixels_sum, record):
            self.read += 1
            return self._features(record, pixels.device)
        features = self._computed(pixels)
        if features is not None and [kept for kept, _ in _tensors(features)] == self.kept and not any(sums):
            self._write(place, pixels_sum, features)
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
            allocated = self.path.stat().st_blocks * 512 if self.path.exists() else 0
            if whole - allocated > free:
                raise UserError(
                    f"the teacher's outputs of this run need {whole / 1e9:,.1f} GB and {self.path.parent} has "
                    f"{free / 1e9:,.1f} GB free; choose another folder with `teacher_outputs`, or leave it out"
                )
            # allocate all blocks now: if the disk filled up later, writing to the map would end the process by SIGBUS
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, whole)
                else:  # macOS
                    os.ftruncate(descriptor, max(whole, os.fstat(descriptor).st_size))
                self.file = mmap.mmap(descriptor, whole)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def _write(self, place: int, pixels_sum: int, features: Features) -> None:
        record = b"".join(bytes(_bytes(tensor)).ljust(kept.bytes, b"\0") for kept, tensor in _tensors(features))
        start = place * self.size
        self.file[start + SUMS : start + self.size] = record
        self.file[start : start + SUMS] = _sums(pixels_sum, record)  # last: these make the record valid

    def _features(self, record: bytearray, device: torch.device) -> Features:
        teacher = self.distiller.only_teacher()
        assert teacher is not None and self.kept is not None
        view = teacher.view
        values: dict[str, Any] = {"maps": [], "prefix": [], "top": []}
        start = 0
        for kept in self.kept:
            tensor = torch.empty_strided(kept.shape, kept.strides, dtype=kept.dtype, device=device)
            if count := tensor.numel():  # `frombuffer` refuses to read nothing
                tensor.copy_(torch.frombuffer(record, dtype=kept.dtype, count=count, offset=start).view(kept.shape))
            start += kept.bytes
            if kept.name in ("maps", "prefix", "top"):
                tensors = values[kept.name]
                tensors += [None] * (kept.place - len(tensors)) + [tensor]
            else:
                values[kept.name] = tensor
        maps, prefix, top = values.pop("maps"), values.pop("prefix"), tuple(values.pop("top"))
        if teacher.top_k is not None:
            values |= {"top": top, "logits": teacher.top_k.rebuilt(top)}
        features = Features(maps=tuple(maps), prefix=tuple(prefix + [None] * (len(maps) - len(prefix))), **values)
        if features.pooled is not None:
            features.classify = view.classifier()
        return view.resumable(features) if maps and view.shapes.can_resume else features


def outputs_name(config: Config, distiller: Distiller, teacher: Loaded, device: torch.device) -> str:
    """A file name that depends on everything that changes the teacher's outputs: weights, images, precision, device, torch."""
    assert config.teacher is not None
    only = distiller.only_teacher()
    depends_on = {
        "teacher": config.teacher.model_dump(mode="json"),
        "weights": [teacher.source, teacher.sha256, teacher.head],
        "data": config.data.model_dump(mode="json", exclude={"val", "workers", "on_bad_image", "max_bad"}),
        "augment": config.augment.model_dump(mode="json"),
        "student": [
            distiller.student_mean.tolist(),
            distiller.student_std.tolist(),
        ],  # random erasing fills areas with noise in these statistics
        "seed": config.seed,
        "batch": [config.train.batch_size, config.train.accumulate],
        "arithmetic": [device.type, config.train.precision, config.train.channels_last, config.train.tf32],
        "torch": torch.__version__,
        "temperature": only.top_k.temperature if only and only.top_k else None,
    }
    return f"seed-{config.seed}-{seed_from(json.dumps(depends_on, sort_keys=True)):016x}"


def _tensors(features: Features) -> list[tuple[Kept, Tensor]]:
    """The tensors of `features`, each with its description. Logits that can be rebuilt are not among them."""
    tensors = []
    for field in fields(features):
        if field.name == "logits" and features.top:
            continue
        value = getattr(features, field.name)
        for place, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(tensor, Tensor):
                kept = Kept(field.name, place, tensor.dtype, tuple(tensor.shape), tensor.stride())
                tensors.append((kept, tensor))
    return tensors


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _sums(pixels_sum: int, record: bytes | bytearray) -> bytes:
    return pixels_sum.to_bytes(4, "little") + (zlib.crc32(record) or 1).to_bytes(4, "little")
