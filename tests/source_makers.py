"""Makes data sources of every kind from a folder of images."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from archives import add, write_tar

from scalekd.common.errors import UserError
from scalekd.data.sources.open import open_source

CLASSES = ["ant", "bee", "cat"]


def files_of(folder: Path) -> list[tuple[str, bytes]]:
    """(class, content) in the order of the folder source."""
    return [(p.parent.name, p.read_bytes()) for name in CLASSES for p in sorted((folder / name).iterdir())]


def labelled(folder: Path, label: Callable[[str], object], first: int = 0) -> dict[str, bytes]:
    members = {}
    for i, (name, data) in enumerate(files_of(folder), first):
        members |= {f"s/{i:04}.png": data, f"s/{i:04}.cls": str(label(name)).encode(), f"s/{i:04}.json": b"{}"}
    return members


def make_tar(folder: Path, to: Path) -> str:
    """An archive as by `tar`: with folders, a name too long for one header, and a hidden file of macOS."""
    with tarfile.open(to / "photos.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder, "./photos")
        add(tar, f"photos/bee/{'long' * 60}.png", (folder / "bee" / "0.png").read_bytes())
        add(tar, "photos/bee/._0.png", b"of macOS")
        add(tar, "photos/notes.txt", b"text")
    shutil.copy(folder / "bee" / "0.png", folder / "bee" / f"{'long' * 60}.png")
    return f"tar:{to / 'photos.tar'}"


def make_shards(folder: Path, to: Path, label: Callable[[str], object] = CLASSES.index) -> str:
    members = list(labelled(folder, label).items())
    for number, first in enumerate(range(0, len(members), 15)):
        write_tar(to / f"s-{number:02}.tar", dict(members[first : first + 15]), format=tarfile.PAX_FORMAT)
    return f"wds:{to}/s-{{00..{number:02}}}.tar"


def make_named_shards(folder: Path, to: Path) -> str:
    return make_shards(folder, to, str).replace("{00..04}", "*")


def hf_rows(folder: Path, **more: list) -> datasets.Dataset:
    files = files_of(folder)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    rows = {"image": [{"bytes": data, "path": None} for _, data in files], "label": [name for name, _ in files]}
    features |= {name: datasets.Value("int64") for name in more}
    return datasets.Dataset.from_dict(rows | more, features=datasets.Features(features))


def make_hf_saved(folder: Path, to: Path) -> str:
    hf_rows(folder).save_to_disk(to / "saved")
    return f"hf:{to}/saved"


def make_hf_splits(folder: Path, to: Path) -> str:
    rows = hf_rows(folder)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(to / "splits")
    return f"hf:{to}/splits:train"


def make_hf_parquet(folder: Path, to: Path) -> str:
    rows = hf_rows(folder, fine=list(range(24)))
    (to / "data").mkdir()
    for k in range(2):
        rows.shard(2, k, contiguous=True).to_parquet(to / "data" / f"train-0000{k}-of-00002.parquet")
    rows.select([1, 2]).to_parquet(to / "data" / "validation-00000-of-00001.parquet")
    return f"hf:{to}:train"


def make_hf_imagefolder(folder: Path, to: Path) -> str:
    shutil.copytree(folder, to / "train")
    return f"hf:{to}"


MAKERS = [make_tar, make_shards, make_named_shards,
          make_hf_saved, make_hf_splits, make_hf_parquet, make_hf_imagefolder]  # fmt: skip


def refused(text: str) -> str:
    """The error for a source that cannot be opened, checked for its form."""
    with pytest.raises(UserError) as error:
        open_source(text, "data.train")
    message = str(error.value)
    assert message.startswith("data.train: ") and len(message.splitlines()) == 1 and message.isprintable(), message
    return message
