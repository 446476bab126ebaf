"""Hugging Face data sets on disk: written by `save_to_disk`, parquet files or an imagefolder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.text import printable
from scalekd.data.images import BadImage, decode, read_file
from scalekd.data.reading import Outage, steadily

from .folders import real

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
        rows = _open(folder, split, key)
        self.image, label = _columns(rows, columns, self.text, key)
        self.classes, self.targets = _labels(rows, label, self.text, key)
        from datasets import Image as ImageFeature

        self.rows = rows.select_columns([self.image]).cast_column(self.image, ImageFeature(decode=False))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        cell = self._cell(i)
        data = cell.get("bytes")
        if data is None and cell.get("path"):
            data = read_file(cell["path"])
        return decode(data or b""), self.targets[i]

    def _cell(self, i: int) -> dict[str, Any]:
        try:
            return steadily(lambda: self.rows[i][self.image] or {}, str(self.origin[0]), alone=False)
        except (MemoryError, Outage):
            raise
        except Exception as error:  # for a damaged Arrow file pyarrow may raise nearly anything
            raise BadImage(f"datasets cannot read it: {first_line(error)}") from None

    def where(self, i: int) -> str:
        try:
            path = self._cell(i).get("path")
        except BadImage:
            path = None
        return printable(f"{path} (image {i} of {self.text})" if path else f"image {i} of {self.text}")

    def identity(self, i: int) -> tuple[str, str, int]:
        return *self.origin, i


def pair(text: str) -> tuple[str, str] | None:
    """The training and validation sources in a folder named without a split.

    They are the splits `train` and `validation`, `val` or `test`; None if one is missing.
    """
    if ":" in text or not Path(text).expanduser().is_dir():
        return None
    splits = _splits(Path(text).expanduser(), "data.train")
    val = next((name for name in ("validation", "val", "test") if name in splits), None)
    return (f"hf:{text}:train", f"hf:{text}:{val}") if "train" in splits and val else None


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


def _columns(rows: Any, names: str, text: str, key: str) -> tuple[str, str]:
    """The image column and the label column: those in `names` (IMAGE,LABEL), else the only ones of their types."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = rows.features
    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [name for name in LABELS if "int" in getattr(features.get(name), "dtype", "")]
    if names:
        image, _, label = names.partition(",")
        images, labels = [n for n in images if n == image], [n for n in features if n == label]
    if len(images) == 1 and len(labels) == 1:
        return images[0], labels[0]
    listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    raise UserError(
        f"{key}: the image and label columns of {text} are unclear. It has {printable(listed)}. "
        f"Write {':'.join(text.split(':')[:2])}:SPLIT:IMAGE,LABEL"
    )


def _labels(rows: Any, column: str, text: str, key: str) -> tuple[list[str], list[int]]:
    """The class names and the class of every row."""
    names = getattr(rows.features[column], "names", None)
    try:
        targets = list(rows.select_columns([column])[:][column])
    except Exception as error:
        raise _unreadable(text, error, key) from None
    limit = len(names) if names else 1_000_000
    wrong = next((i for i, t in enumerate(targets) if not isinstance(t, int) or not 0 <= t < limit), None)
    if wrong is not None:
        valid = f"one of the {len(names)} classes" if names else "a class number from 0"
        raise UserError(
            f"{key}: `{column}` of image {wrong} of {text} is {printable(repr(targets[wrong]))}, which is not {valid}"
        )
    if not targets:
        raise UserError(f"{key}: {text} has no images")
    return list(names or (str(i) for i in range(max(targets) + 1))), targets
