"""Hugging Face data sets on disk: written by `save_to_disk`, parquet files or an imagefolder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.text import printable
from scalekd.data.images import BadImage, decode, read_file
from scalekd.data.reading import Outage, steadily

from .content import real, sizes_of, stamp
from .names import LeftOut, refuse_splits, split_of

LABELS = ("label", "labels", "class", "target", "fine_label")


class HuggingFace:
    """`FOLDER[:SPLIT[:IMAGE,LABEL]]`. Rows stay in memory-mapped Arrow files.

    `datasets` may neither use the network nor decode images.
    """

    def __init__(self, text: str, key: str):
        folder, _, rest = text.partition(":")
        split, _, columns = rest.partition(":")
        self.text = f"hf:{text}"
        self.origin = real(folder), split
        datasets = _datasets(key)
        rows = _open(folder, split, key).with_format(None)  # one saved with a format would return tensors
        self.image, label = columns_of(rows, columns, f"hf:{folder}:{split}", key)
        self.classes, self.targets = labels_of(rows, label, self.text, key)
        refuse_splits(self.classes, self.text, key)
        self.left_out: LeftOut = {}
        rows = rows.select_columns([self.image])
        if isinstance(rows.features[self.image], datasets.Image):
            rows = rows.cast_column(self.image, datasets.Image(decode=False))
        self.rows = rows

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return decode(self.content(i)), self.targets[i]

    def content(self, i: int) -> bytes:
        cell = self._cell(i)
        data = cell.get("bytes")
        if data is None and cell.get("path"):
            data = read_file(cell["path"])
        return data or b""

    def _cell(self, i: int) -> dict[str, Any]:
        try:
            cell = steadily(lambda: self.rows[i][self.image], str(self.origin[0]), alone=False)
        except (MemoryError, Outage):
            raise
        except Exception as error:  # for a damaged Arrow file pyarrow may raise nearly anything
            raise BadImage(f"datasets cannot read it: {first_line(error)}") from None
        if isinstance(cell, bytes):
            return {"bytes": cell}
        return {"path": cell} if isinstance(cell, str) else cell or {}

    def sizes(self) -> list[int] | None:
        """From the offsets in the Arrow files, which are read, but not the images."""
        sizes: list[int] = []
        rows = self.rows.with_format("arrow")
        try:
            for first in range(0, len(self), 1000):
                column = rows[first : first + 1000][self.image].combine_chunks()
                sizes += [_size(*cell) for cell in zip(*_lengths_and_paths(column))]
        except Exception:  # the image that cannot be read is named when it is read
            return None
        return sizes

    def stamps(self) -> Iterator[str]:
        yield str(self.rows._fingerprint)
        for file in self.rows.cache_files:
            yield stamp(file["filename"])
        rows = self.rows.with_format("arrow")
        for first in range(0, len(self), 1000):
            lengths, paths = _lengths_and_paths(rows[first : first + 1000][self.image].combine_chunks())
            yield from (stamp(path) for length, path in zip(lengths, paths) if length is None and path)

    def where(self, i: int) -> str:
        try:
            path = self._cell(i).get("path")
        except BadImage:
            path = None
        return printable(f"{path} (image {i} of {self.text})" if path else f"image {i} of {self.text}")

    def identity(self, i: int) -> tuple[str, str, int]:
        return *self.origin, i


def _lengths_and_paths(column: Any) -> tuple[Any, Any]:
    """The number of bytes in each cell of an Arrow column of images, and its path; None if it has none."""
    import pyarrow
    import pyarrow.compute

    nothing: list[None] = [None] * len(column)
    if not pyarrow.types.is_struct(column.type):
        text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        lengths = nothing if text else pyarrow.compute.binary_length(column).to_pylist()
        return lengths, column.to_pylist() if text else nothing
    fields = [field.name for field in column.type]
    paths = column.field("path").to_pylist() if "path" in fields else nothing
    return pyarrow.compute.binary_length(column.field("bytes")).to_pylist(), paths


def _size(length: int | None, path: str | None) -> int:
    return sizes_of([path])[0] if length is None and path else length or 0


def parts(text: str) -> dict[str, str]:
    """The sources of the splits `train`, `val` and `test` in a folder named without a split."""
    if ":" in text or not Path(text).expanduser().is_dir():
        return {}
    named = {split_of(name): name for name in reversed(_splits(Path(text).expanduser(), "data.train"))}
    return {split: f"hf:{text}:{name}" for split, name in named.items() if split}


def _datasets(key: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{key}: hf: needs the package datasets; run pip install 'scalekd[hf]'") from None
    datasets.config.HF_HUB_OFFLINE = True  # affects `datasets` only; timm may still download weights
    return datasets


def _splits(root: Path, key: str) -> list[str]:
    """The names of the splits in a folder; empty if `save_to_disk` wrote a single set."""
    datasets = _datasets(key)
    if (root / "state.json").is_file():
        return []
    try:
        if (root / "dataset_dict.json").is_file():
            splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
            if not isinstance(splits, list) or any("/" in name for name in splits):
                raise ValueError("its splits are not a list of names")
            return splits
        return datasets.get_dataset_split_names(str(root.resolve()))
    except Exception as error:  # of many types, from pyarrow, fsspec and datasets
        raise _unreadable(root, error, key) from None


def _open(folder: str, split: str, key: str) -> Any:
    """The rows of a split, or of the only one."""
    datasets = _datasets(key)
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{key}: no folder {folder}; hf: only reads data sets that are already on disk")
    splits = _splits(root, key)
    if split and split not in splits:
        hint = nearest(split, splits) if splits else " It has no splits; omit the split."
        raise UserError(f"{key}: {folder} has no split `{split}`.{hint}")
    if not split and len(splits) > 1:
        raise UserError(
            f"{key}: {folder} has the splits {', '.join(splits)}; choose one, for example hf:{folder}:{splits[0]}"
        )
    split = split or (splits[0] if splits else "")
    try:
        if (root / "state.json").is_file():
            return datasets.load_from_disk(str(root))
        if (root / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(root / split))
        return datasets.load_dataset(str(root.resolve()), split=split)
    except Exception as error:
        raise _unreadable(root, error, key) from None


def _unreadable(root: Path | str, error: Exception, key: str) -> UserError:
    return UserError(f"{key}: datasets cannot read {root}: {printable(first_line(error))}")


def columns_of(rows: Any, names: str, text: str, key: str) -> tuple[str, str]:
    """The image column and the label column: those in `names` (IMAGE,LABEL), else the only ones of their types.

    text: the source up to its split, to which the fix adds columns.
    """
    features = rows.features
    kinds = {name: _kind(name, feature) for name, feature in features.items()}
    if names:
        image, _, label = names.partition(",")
        _check_named(image, label, kinds, features, text, key)
        return image, label
    images = [name for name, kind in kinds.items() if kind == "image"]
    images = images or [name for name, kind in kinds.items() if kind == "bytes"]
    labels = [name for name, kind in kinds.items() if kind == "class"]
    labels = labels or [name for name in LABELS if kinds.get(name) in ("number", "text")]
    if len(images) == 1 and len(labels) == 1:
        return images[0], labels[0]
    raise UserError(
        f"{key}: the image and label columns of {text.rstrip(':')} are unclear. It has {_listed(features)}. "
        + _remedy(images, labels, kinds, text)
    )


def _kind(name: str, feature: Any) -> str:
    """What a column may hold: image, bytes (of an image), class, number, text, or "" for anything else."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    if isinstance(feature, ImageFeature):
        return "image"
    if isinstance(feature, ClassLabel):
        return "class"
    if isinstance(feature, dict):
        return "bytes" if "binary" in getattr(feature.get("bytes"), "dtype", "") else ""
    dtype = getattr(feature, "dtype", "")
    if not isinstance(dtype, str):
        return ""
    return next(
        (kind for word, kind in (("int", "number"), ("binary", "bytes"), ("string", "text")) if word in dtype), ""
    )


def _listed(features: Any) -> str:
    return printable(", ".join(f"{name} ({_type(feature)})" for name, feature in features.items()))


def _type(feature: Any) -> str:
    return feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__


def _remedy(images: list[str], labels: list[str], kinds: dict[str, str], text: str) -> str:
    """How to name the columns, or why no name would help."""
    labels = labels or [name for name, kind in kinds.items() if kind in ("number", "text")]
    if not images or not labels:
        what = "images (of type Image, or their encoded bytes)" if not images else "labels (classes, numbers or text)"
        return f"No column holds {what}; add one to the data set"
    return printable(f"Name them: {text}:{images[0]},{labels[0]}")


def _check_named(image: str, label: str, kinds: dict[str, str], features: Any, text: str, key: str) -> None:
    """Raises `UserError` for a named column that is missing or of a wrong type."""
    for name, what, right in (
        (image, "images", ("image", "bytes", "text")),
        (label, "labels", ("class", "number", "text")),
    ):
        if name not in kinds:
            raise UserError(f"{key}: {text} has no column `{printable(name)}`; it has {_listed(features)}")
        if kinds[name] not in right:
            raise UserError(
                f"{key}: column `{printable(name)}` of {text} cannot hold {what}: it has {_listed(features)}. "
                "Name another column, or convert this one"
            )


def labels_of(rows: Any, column: str, text: str, key: str) -> tuple[list[str], list[int]]:
    """The class names and the class of every row. Text labels are class names, in alphabetical order."""
    names = getattr(rows.features[column], "names", None)
    try:
        targets = list(rows.select_columns([column])[:][column])
    except Exception as error:
        raise _unreadable(text, error, key) from None
    if not targets:
        raise UserError(f"{key}: {text} has no images")
    if not names and _kind(column, rows.features[column]) == "text":
        names = sorted({target for target in targets if target})
        number = {name: i for i, name in enumerate(names)}
        targets = [number.get(target, target) for target in targets]
    limit = len(names) if names else 1_000_000
    wrong = next((i for i, t in enumerate(targets) if not isinstance(t, int) or not 0 <= t < limit), None)
    if wrong is not None:
        valid = f"one of the {len(names)} classes" if names else "a class number from 0"
        raise UserError(
            f"{key}: `{column}` of image {wrong} of {text} is {printable(repr(targets[wrong]))}, which is not {valid}"
        )
    return list(names or (str(i) for i in range(max(targets) + 1))), targets
