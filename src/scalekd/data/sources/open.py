"""Opens an image source by name: a folder, archive, shards, table of labels, Hugging Face or torchvision data set, IDX files.

Every source is map-style and is never unpacked: any worker can read any image at any time, so a run resumes exactly
with all of them. docs/how-to/data.md describes the forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from scalekd.common.errors import UserError, first_line
from scalekd.common.text import shortened

from .folders import Folder, any_image, class_folders
from .hf import HuggingFace
from .hf import parts as hf_parts
from .idx import Idx, fashion_mnist
from .names import are_splits, split_of
from .shards import Shards
from .source import Source
from .table.source import Table, files_in, table_parts
from .table.text import is_table
from .tars import Tar
from .torchvision import TorchVision
from .unlabelled import Loose, WithoutLabels, loose_files, loose_members

# torchvision's data sets with validation images
WITH_VAL = ("DTD", "FGVCAircraft", "Flowers102", "ImageNet", "PCAM", "RenderedSST2")


def open_source(text: str, key: str, classes: Sequence[str] | None = None) -> Source:
    """Opens the value of `data.train` or `data.val`. Raises `UserError` that starts with `key`, the recipe key.

    classes: of the training images or of a student. A table of labels then has these classes, and other labels in it are
    errors; other sources have the classes that they find.

    - `/a/folder` or `folder:/a/folder`: one sub-folder of images per class;
    - `tar:/a/photos.tar`: class folders in one archive;
    - `wds:/a/train-{000..012}.tar` or `wds:/a/train-*.tar`: WebDataset shards;
    - `hf:/a/folder`, `hf:/a/folder:train`, `hf:/a/folder:train:image,label`: a Hugging Face data set on disk;
    - `torchvision:CIFAR100:train:/a/folder`: a torchvision data set already on disk, split and root;
    - `labels.csv`, `labels.tsv`, `labels.parquet`, `coco:labels.json`: a table of paths and labels, with options as in
      `labels.csv:path=file,label=tags`;
    - `idx:/a/folder/train`: the pair `train-images-idx3-ubyte[.gz]`, `train-labels-idx1-ubyte[.gz]`;
    - `fashion-mnist:train`, `fashion-mnist:test`: the part that ships with scalekd (10,000 + 10,000 images).
    """
    return _guarded(partial(_open_labelled, classes=classes), text, key)


def open_unlabelled(text: str, key: str) -> Source:
    """Opens the value of `data.unlabelled`, in the same forms; the target of every image is `UNLABELLED`.

    A folder, an archive and shards need no class folders and no labels: all images in them are used, at any depth.
    The other forms are opened as by `open_source`, and their labels are ignored. Raises `UserError`.
    """
    return _guarded(_open_unlabelled, text, key)


def _guarded(opener: Callable[[str, str], Source], text: str, key: str) -> Source:
    if not text:  # as from an unset shell variable; an empty path would mean the working folder
        raise UserError(f"{key}: it is empty; set it to a folder or a source")
    try:
        return opener(text, key)
    except (OSError, ValueError, RuntimeError) as error:  # no permission, or an invalid path: ~nobody, a name too long
        raise UserError(f"{key}: cannot open {shortened(text)}: {shortened(first_line(error))}") from None


def _open_unlabelled(text: str, key: str) -> Source:
    kind, _, rest = text.partition(":")
    _reject_stream(text, key)
    if is_table(text):
        files, names = files_in(text, key)
        return Loose(files, names)
    if kind in ("tar", "wds"):
        return loose_members(rest, key, shards=kind == "wds")
    if kind in ("fashion-mnist", "idx", "hf", "torchvision"):
        return WithoutLabels(_open_labelled(text, key))
    return loose_files(rest if kind == "folder" else text, key)


def _reject_stream(text: str, key: str) -> None:
    if re.match(r"(\w+:)?(pipe:|\w{2,}://)", text):
        raise UserError(
            f"{key}: {text} is a stream, which cannot be resumed exactly; copy it to disk and name the files"
        )


def _open_labelled(text: str, key: str, classes: Sequence[str] | None = None) -> Source:
    kind, _, rest = text.partition(":")
    _reject_stream(text, key)
    if is_table(text):
        return Table(text, key, classes)
    if kind == "fashion-mnist":
        return fashion_mnist(rest, key)
    if kind == "idx":
        return Idx(rest, None, key)
    if kind == "tar":
        return Tar(rest, key)
    if kind == "wds":
        return Shards(rest, key)
    if kind == "hf":
        return HuggingFace(rest, key)
    if kind == "torchvision":
        return TorchVision(rest, key)
    return Folder(rest if kind == "folder" else text, key)


def pair_of(text: str, test: bool = False) -> tuple[str, str | None] | None:
    """The training and validation sources for a name without a split, or None if it does not stand for splits.

    The second is None if there are no validation images, so that a part of the first is held out.

    test: whether test images may serve for validation if there are no others. A run chooses its best checkpoint by its
        validation images, so it must not; a probe or a fitted head chooses nothing by them.
    """
    parts = parts_of(text)
    if "train" not in parts:
        return None
    return parts["train"], parts.get("val") or (parts.get("test") if test else None)


def evaluated_part(text: str) -> str:
    """The source to evaluate on for a name without a split: its validation or test images; else `text` itself."""
    parts = parts_of(text)
    return parts.get("val") or parts.get("test") or text


def parts_of(text: str) -> dict[str, str]:
    """The sources of the splits `train`, `val` and `test` for a name without a split; empty if it stands for none."""
    try:
        return _parts(text)
    except (OSError, ValueError, RuntimeError, UserError):  # `open_source` raises an error that says why
        return {}


def _parts(text: str) -> dict[str, str]:
    kind, _, rest = text.partition(":")
    if not text:
        return {}
    if is_table(text):
        return table_parts(text)
    if text == "fashion-mnist":
        return {"train": "fashion-mnist:train", "test": "fashion-mnist:test"}
    if kind == "torchvision":
        name, _, folder = rest.partition(":")
        if folder and folder.partition(":")[0] not in ("train", "test", "val"):
            second = "val" if name in WITH_VAL else "test"
            return {split: f"torchvision:{name}:{split}:{folder}" for split in ("train", second)}
        return {}
    if kind == "hf":
        return hf_parts(rest)
    root = Path(rest if kind == "folder" else text).expanduser()
    if kind in ("tar", "wds", "idx", "fashion-mnist") or not root.is_dir():
        return {}
    names = class_folders(root)
    if len(are_splits(names, [name for name in names if any_image(root / name)])) < len(
        [n for n in names if split_of(n)]
    ):
        return {}  # a class that is called train
    # of several names of one split the last counts: the first by name, and any other before `eval`
    evals = [name for name in names if "eval" in name.lower()]
    named = [*evals, *(name for name in reversed(names) if name not in evals)]
    return {split: str(root / name) for name in named if (split := split_of(name))}
