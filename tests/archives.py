"""Small archives and shards for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import datasets
from PIL import Image


def add(tar: tarfile.TarFile, name: str, data: bytes, **header: object) -> None:
    """Adds a member; `header` sets attributes of its TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in header.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: dict[str, bytes], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            add(tar, name, data)
    return path


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


PNG = _png()  # a small, valid image


# ---------------------------------------------------------------- shards


def shard(tmp_path: Path, labels: dict[str, bytes], name: str = "s.tar") -> str:
    """A shard with an image for each label; returns the name of the source."""
    images = {key: PNG + f"{name} {key}".encode() for key in labels}  # decoders ignore what follows; no two are equal
    members = {k: v for key, label in labels.items() for k, v in ((f"{key}.png", images[key]), (f"{key}.cls", label))}
    return f"wds:{write_tar(tmp_path / name, members)}"


# ---------------------------------------------------------------- Hugging Face


def save(tmp_path: Path, columns: dict[str, list], features: dict[str, object]) -> str:
    """A Hugging Face data set on disk; returns the name of the source."""
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.save_to_disk(tmp_path / "hf")
    return f"hf:{tmp_path / 'hf'}"


CELLS = [{"bytes": PNG, "path": "a.png"}, {"bytes": PNG, "path": None}]


def png_of(value: int) -> bytes:
    """A PNG file of 4x4 pixels of that grey value."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(file, "png")
    return file.getvalue()
