"""Opens an image source by name: a folder, archive, shards, Hugging Face or torchvision data set, or IDX files.

Every source is map-style and is never unpacked: any worker can read any image at any time, so a run resumes exactly
with all of them. docs/how-to/data.md describes the forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from scalekd.common.errors import UserError, first_line
from scalekd.common.text import shortened

from .folders import Folder
from .hf import HuggingFace
from .hf import pair as hf_pair
from .idx import Idx, fashion_mnist
from .shards import Shards
from .source import Source
from .tars import Tar
from .torchvision import TorchVision
from .unlabelled import WithoutLabels, loose_files, loose_members


def open_source(text: str, key: str) -> Source:
    """Opens the value of `data.train` or `data.val`. Raises `UserError` that starts with `key`, the recipe key.

    - `/a/folder` or `folder:/a/folder`: one sub-folder of images per class;
    - `tar:/a/photos.tar`: class folders in one archive;
    - `wds:/a/train-{000..012}.tar` or `wds:/a/train-*.tar`: WebDataset shards;
    - `hf:/a/folder`, `hf:/a/folder:train`, `hf:/a/folder:train:image,label`: a Hugging Face data set on disk;
    - `torchvision:CIFAR100:train:/a/folder`: a torchvision data set already on disk, split and root;
    - `idx:/a/folder/train`: the pair `train-images-idx3-ubyte[.gz]`, `train-labels-idx1-ubyte[.gz]`;
    - `fashion-mnist:train`, `fashion-mnist:test`: the part that ships with scalekd (10,000 + 10,000 images).
    """
    return _guarded(_open_labelled, text, key)


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


def _open_labelled(text: str, key: str) -> Source:
    kind, _, rest = text.partition(":")
    _reject_stream(text, key)
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


def pair_of(text: str) -> tuple[str, str] | None:
    """The training and validation sources for a name without a split, or None if it does not stand for two."""
    try:
        return _pair(text)
    except (OSError, ValueError, RuntimeError):  # `open_source` raises an error that says why
        return None


def _pair(text: str) -> tuple[str, str] | None:
    kind, _, rest = text.partition(":")
    if not text:
        return None
    if text == "fashion-mnist":
        return "fashion-mnist:train", "fashion-mnist:test"
    if kind == "torchvision":
        name, _, folder = rest.partition(":")
        if folder and folder.partition(":")[0] not in ("train", "test", "val"):
            return f"torchvision:{name}:train:{folder}", f"torchvision:{name}:test:{folder}"
    if kind == "hf":
        return hf_pair(rest)
    root = Path(text)
    val = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), None)
    return (str(root / "train"), str(val)) if val and (root / "train").is_dir() else None
