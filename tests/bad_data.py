"""Bad images, folders, archives and data sets: cases of `test_bad_corpus.py`.

A case is (name, function that makes it in a workspace, part of the expected error).
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from archives import CELLS, PNG, add, save, shard, write_tar
from bad_files import write_idx
from PIL import Image
from small_images import write_images


class Workspace(NamedTuple):
    """Files that a case may damage; every case gets a fresh copy."""

    folder: Path  # empty
    images: Path  # train/ and val/
    recipe: Path
    run: Path  # a finished run with its student


# Returns the arguments after `scalekd train RECIPE --out run`, or a whole command line.
Make = Callable[[Workspace], list[object]]


# ---------------------------------------------------------------- images


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
JPEG = encoded(NOISE, "JPEG")
BOMB = encoded(Image.new("1", (20_000, 20_000)), "PNG")  # 50 kB
FLOATS = encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
BELOW_ZERO = encoded(Image.fromarray(np.full((8, 8), -5, np.int32)), "TIFF")


def image(data: bytes) -> Make:
    def make(workspace: Workspace) -> list[object]:
        (workspace.images / "train" / "bee" / "2.png").write_bytes(data)
        return ["train.batch_size=24"]  # one batch has all images

    return make


IMAGES = [
    ("truncated JPEG", image(JPEG[: len(JPEG) // 2]), "bee/2.png: image file is truncated"),
    ("truncated PNG", image(encoded(NOISE, "PNG")[:500]), "bee/2.png: "),
    ("no bytes", image(b""), "bee/2.png: it is empty (0 bytes)"),
    ("text called .png", image(b"not an image"), "bee/2.png: Pillow does not recognise it as an image"),
    ("zeros", image(bytes(5000)), "bee/2.png: Pillow does not recognise it as an image"),
    ("header of a JPEG alone", image(JPEG[:4]), "bee/2.png: Pillow does not recognise it as an image"),
    ("PNG with a changed byte", image(PNG[:60] + b"\xff" + PNG[61:]), "bee/2.png: "),
    ("floating-point TIFF", image(FLOATS), "bee/2.png: its pixels are floating-point numbers"),
    ("TIFF with pixels below 0", image(BELOW_ZERO), "bee/2.png: its pixels are not within 0 to 65535"),
    ("decompression bomb", image(BOMB), "bee/2.png: Image size (400000000 pixels) exceeds limit of 178956970"),
]


# ---------------------------------------------------------------- folders


def source(text: str) -> list[object]:
    return ["data.val=null", f"data.train={json.dumps(text)}"]


def spoiled(change: Callable[[Path], object]) -> Make:
    """The folder of images after `change(images)`."""

    def make(workspace: Workspace) -> list[object]:
        change(workspace.images)
        return []

    return make


def class_without_images(images: Path) -> None:
    (images / "train" / "dog").mkdir()
    (images / "train" / "dog" / "notes.txt").write_text("no image")


def flat(workspace: Workspace) -> list[object]:
    (workspace.folder / "0.png").write_bytes(PNG)
    return source(str(workspace.folder))


def few(workspace: Workspace) -> list[object]:
    write_images(workspace.folder / "few", per_class=1)
    return [*source(str(workspace.folder / "few")), "train.batch_size=2"]


FOLDERS = [
    ("missing folder", lambda p: source(f"{p.images}/trian"), "data.train: no folder"),
    ("validation folder missing", lambda p: [f"data.val={p.folder}/val"], "data.val: no folder"),
    ("file in place of a folder", lambda p: source(str(p.recipe)), "data.train: no folder"),
    ("no class folders", flat, "has no class folders; it must have one sub-folder of images per class"),
    ("class without images", spoiled(class_without_images), "class folders without images: dog. Fill or remove them"),
    ("other classes in validation", spoiled(lambda i: (i / "val/cat").rename(i / "val/cow")), "not in both: cat, cow."),
    ("class missing in validation", spoiled(lambda i: shutil.rmtree(i / "val/cat")), "not in both: cat. Give both"),
    ("too few to hold some out", few, "has 3 images, too few to hold out 3 for validation; set data.val"),
    ("home of nobody", lambda p: source("~nobody-of-that-name/x"), "data.train: cannot open ~nobody-of-that-name/x: "),
    ("name that no disk takes", lambda p: source("x" * 5000), "data.train: "),
    ("NUL in a path", lambda p: source("tar:a\0b"), r"data.train: cannot open tar:a\x00b: embedded null byte"),
    ("no name at all", lambda p: source(""), "data.train: it is empty; set it to a folder or a source"),
    ("stream", lambda p: source("https://host/a.tar"), "is a stream, which cannot be resumed exactly"),
]


# ---------------------------------------------------------------- archives and shards


# decoders ignore what follows an image; no two are equal
DIFFERENT = {f"{c}/{i}.png": PNG + f"{c}{i}".encode() for c in "ab" for i in range(9)}


def tar(change: Callable[[bytes], bytes] = lambda raw: raw, **members: bytes) -> Make:
    """An archive of `members`, by default of two valid classes, with its bytes changed."""

    def make(workspace: Workspace) -> list[object]:
        path = write_tar(workspace.folder / "t.tar", members or DIFFERENT)
        path.write_bytes(change(path.read_bytes()))
        return source(f"tar:{path}")

    return make


def member(name: str, **header: object) -> Make:
    """An archive with a valid member, followed by an unsafe one."""

    def make(workspace: Workspace) -> list[object]:
        with tarfile.open(workspace.folder / "t.tar", "w") as file:
            add(file, "a/0.png", PNG)
            add(file, name, b"", **header)
        return source(f"tar:{workspace.folder / 't.tar'}")

    return make


def gzipped(workspace: Workspace) -> list[object]:
    with tarfile.open(workspace.folder / "t.tar", "w:gz") as file:
        add(file, "a/0.png", PNG)
    return source(f"tar:{workspace.folder / 't.tar'}")


def header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


LONG_NAMES = (header(tarfile.GNUTYPE_LONGNAME, 4) + b"cat/".ljust(512, b"\0")) * 5000
EXABYTES = header(tarfile.GNUTYPE_LONGNAME, 2**62)


def shards(names: str | bytes = "", **labels: bytes) -> Make:
    """A shard with these labels, next to a class map."""

    def make(workspace: Workspace) -> list[object]:
        if names:
            (workspace.folder / "classes.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
        return source(shard(workspace.folder, labels))

    return make


def shard_of(**members: bytes) -> Make:
    files = {name.replace("_", "."): data for name, data in members.items()}
    return lambda workspace: source(f"wds:{write_tar(workspace.folder / 's.tar', files)}")


def wds(name: str) -> Make:
    return lambda workspace: source(f"wds:{workspace.folder}/{name}")


OUTSIDE = "is a path that leads outside the archive; nothing was read"
LINK = "is a link or a device; nothing was read"
ARCHIVES = [
    ("tar cut in a header", tar(lambda raw: raw[:1100]), "after a/0.png; create or copy it again"),
    ("tar cut between members", tar(lambda raw: raw[:2048]), "is cut off after a/1.png; create or copy it again"),
    ("tar with a damaged header", tar(lambda raw: raw[:1030] + b"x" + raw[1031:]), "has a damaged header after a/0.png"),
    ("two tars in one", tar(lambda raw: raw * 2), "has data after its end mark"),
    ("tar of text", tar(lambda raw: b"no archive " * 200), "is damaged or cut off"),
    ("tar of no bytes", tar(lambda raw: b""), "t.tar is "),
    ("tar without members", tar(lambda raw: bytes(10240)), "has no images"),
    ("tar without images", tar(**{"a/notes.txt": b""}), "has no images"),
    ("tar with an image in no folder", tar(**{"0.png": PNG}), "0.png in"),
    ("tar with a class twice", tar(**{"x/a/0.png": PNG, "y/a/0.png": PNG}), "has the class a in two folders, x/a and y/a"),
    ("tar with a name twice", tar(**{"a/0.png": PNG, "./a/0.png": PNG}), "t.tar twice; create the archive again"),
    ("tar that is gzipped", gzipped, "is compressed (gzip), so single images cannot be read"),
    ("tar with a path upwards", member("../../evil.png"), OUTSIDE),
    ("tar with an absolute path", member("/tmp/evil.png"), OUTSIDE),
    ("tar with a symlink", member("a/1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), LINK),
    ("tar with a hard link", member("a/1.png", type=tarfile.LNKTYPE, linkname="../x"), LINK),
    ("tar with a device", member("a/1.png", type=tarfile.BLKTYPE), LINK),
    ("tar of headers of names without end", tar(lambda raw: LONG_NAMES + raw), "is damaged or cut off"),
    ("tar with a name of exabytes", tar(lambda raw: EXABYTES + raw), "is damaged or cut off"),
    ("image in a tar that is no image", tar(**{f"{c}/{i}.png": b"text" for c in "ab" for i in range(15)}), ".png in "),
    ("missing tar", lambda p: source(f"tar:{p.folder}/t.tar"), "cannot open"),
    ("image without a label", shard_of(a_png=PNG, a_cls=b"0", b_png=PNG), "sample b in"),
    ("label without an image", shard_of(a_png=PNG, a_cls=b"0", b_cls=b"1"), "sample b in"),
    ("two images of one key", shard_of(a_png=PNG, a_jpg=PNG, a_cls=b"0"), "a.png and a.jpg in"),
    ("label that is not a number", shards(a=b"0", b=b"one"), "label 'one' of b.png in"),
    ("label below 0", shards(a=b"0", b=b"-1"), "label '-1' of b.png in"),
    ("label that is empty", shards(a=b"0", b=b""), "label '' of b.png in"),
    ("label that is not text", shards(a=b"0", b=b"\xff\xfe"), "the label of b in"),
    ("label that is far too long", shards(a=b"0", b=b"9" * 5000), "has 5000 bytes, too many for a class"),
    ("label with a gap before it", shards(a=b"0", b=b"7"), "has labels up to 7, but no image of class 1 and 5 others"),
    ("label beyond the class map", shards("ant\nbee\n", a=b"0", b=b"2"), "label '2' of b.png in"),
    ("label that the class map lacks", shards("ant\nbee\n", a=b"ant", b=b"cow"), "is not one of the 2 classes"),
    ("class map with a name twice", shards("ant\nant\n", a=b"0"), "has a name twice; it must have one class per line"),
    ("class map without names", shards("\n\n", a=b"0"), "has no names; it must have one class per line"),
    ("class map that is not text", shards(b"\xff\xfe\x00", a=b"0"), "is not UTF-8 text; it must have one class per line"),
    ("missing shard", wds("s-{0..3}.tar"), "4 of 4 shards of"),
    ("pattern of no shard", wds("s-*.tar"), "no file matches"),
    ("range that runs backwards", wds("s-{3..0}.tar"), "{3..0} in"),
    ("range of billions", wds("s-{0..99999999999}.tar"), "stands for more than 100,000 shards"),
    ("range of ranges of billions", wds("{0..99999}{0..99999}.tar"), "stands for more than 100,000 shards"),
]  # fmt: skip


# ---------------------------------------------------------------- Hugging Face, IDX, torchvision

NUMBER, CLASS = datasets.Value("int64"), datasets.ClassLabel(names=["a", "b"])


def hf(columns: dict[str, list], features: dict[str, Any], more: str = "") -> Make:
    return lambda workspace: source(save(workspace.folder, columns, features) + more)


GOOD = (
    {"image": [{"bytes": PNG + bytes([i]), "path": None} for i in range(30)], "label": [0, 1] * 15},
    {"image": datasets.Image(), "label": CLASS},
)


def hf_file(name: str, change: Callable[[bytes], bytes]) -> Make:
    """A valid data set with the bytes of one file changed."""

    def make(workspace: Workspace) -> list[object]:
        text = save(workspace.folder, *GOOD)
        file = workspace.folder / "hf" / name
        file.write_bytes(change(file.read_bytes()))
        return source(text)

    return make


def hf_splits(text: str) -> Make:
    def make(workspace: Workspace) -> list[object]:
        (workspace.folder / "dataset_dict.json").write_text(text)
        return ["--data", f"hf:{workspace.folder}"]

    return make


def broken_parquet(workspace: Workspace) -> list[object]:
    (workspace.folder / "train.parquet").write_bytes(b"PAR1" + bytes(100))
    return source(f"hf:{workspace.folder}")


def idx(images: int, labels: int, cut: int = 0) -> Make:
    def make(workspace: Workspace) -> list[object]:
        write_idx(workspace.folder / "x", images, labels, cut)
        return source(f"idx:{workspace.folder / 'x'}")

    return make


def idx_file(change: Callable[[bytes], bytes], name: str = "x-images-idx3-ubyte") -> Make:
    def make(workspace: Workspace) -> list[object]:
        given = idx(30, 30)(workspace)
        file = workspace.folder / name
        file.write_bytes(change(file.read_bytes()))
        return given

    return make


def sizes(*shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)


def mnist(images: bytes, labels: bytes = sizes(30) + bytes(i % 3 for i in range(30))) -> Make:
    """torchvision checks that the files of MNIST exist, but not their content."""

    def make(workspace: Workspace) -> list[object]:
        folder = workspace.folder / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for part in ("train", "t10k"):
            (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        return source(f"torchvision:MNIST:train:{workspace.folder}")

    return make


def torchvision(text: str) -> Make:
    return lambda workspace: source(f"torchvision:{text.replace('ROOT', str(workspace.folder))}")


SETS = [
    ("HF without an image column", hf({"label": [0, 1]}, {"label": CLASS}), "the image and label columns of hf:"),
    ("HF without a label column", hf({"image": CELLS}, {"image": datasets.Image()}), "the image and label columns of hf:"),
    ("HF with two image columns", hf({"image": CELLS, "mask": CELLS, "label": [0, 1]}, GOOD[1] | {"mask": datasets.Image()}),
     "the image and label columns of hf:"),
    ("HF without labels (-1)", hf({"image": CELLS, "label": [0, -1]}, GOOD[1] | {"label": NUMBER}), "`label` of image 1 of hf:"),
    ("HF with a missing label", hf({"image": CELLS, "label": [0, None]}, GOOD[1]), "is None, which is not one of the 2 classes"),
    ("HF without rows", hf({"image": [], "label": []}, GOOD[1]), "data.train: "),
    ("HF split that is not there", hf(*GOOD, more=":test"), "has no split `test`"),
    ("HF folder missing", lambda p: source(f"hf:{p.folder}/x"), "hf: only reads data sets that are already on disk"),
    ("HF folder without a set", lambda p: source(f"hf:{p.folder}"), "datasets cannot read"),
    ("HF Arrow file cut off", hf_file("data-00000-of-00001.arrow", lambda raw: raw[: len(raw) // 2]), "datasets cannot read"),
    ("HF description not JSON", hf_file("dataset_info.json", lambda raw: raw[:20]), "datasets cannot read"),
    ("HF splits not a list", hf_splits('{"splits": 3}'), "its splits are not a list of names"),
    ("HF splits outside", hf_splits('{"splits": ["../x", "train"]}'), "its splits are not a list of names"),
    ("HF parquet without its end", broken_parquet, "datasets cannot read"),
    ("IDX with fewer labels", idx(9, 8), "has 9 images and 8 labels"),
    ("IDX cut in the pixels", idx(9, 9, cut=5), "is not a complete IDX file"),
    ("IDX cut in the header", idx(9, 9, cut=16 * 9 + 10), "is not a complete IDX file"),
    ("IDX without images", idx(0, 0), "has no images"),
    ("IDX of another kind", idx_file(lambda raw: sizes(30) + bytes(30)), "it starts with the bytes 00000801, which do not mean 3-dim"),
    ("IDX without pixels", idx_file(lambda raw: sizes(30, 0, 0)), "images without pixels"),
    ("IDX that announces exabytes", idx_file(lambda raw: sizes(30, 2**31, 2**31)), "is not a complete IDX file"),
    ("IDX labels cut off in gzip", idx_file(lambda raw: raw[:-9], "x-labels-idx1-ubyte.gz"), "is not a complete IDX file"),
    ("IDX labels missing", lambda p: (idx(9, 9)(p), (p.folder / "x-labels-idx1-ubyte.gz").unlink())[0], "labels-idx1-ubyte.gz exists"),
    ("Fashion-MNIST's unknown split", lambda p: source("fashion-mnist:valid"), "choose fashion-mnist:train or fashion-mnist:test"),
    ("torchvision's unknown name", torchvision("CIFAR11:train:ROOT"), "no data set `CIFAR11`. Did you mean `CIFAR10`"),
    ("torchvision without a root", torchvision("CIFAR10:train"), "write torchvision:CIFAR10:train:/folder"),
    ("torchvision's unknown split", torchvision("CIFAR10:training:ROOT"), "write torchvision:CIFAR10:train:/folder"),
    ("torchvision's split that it lacks", torchvision("CIFAR10:val:ROOT"), "CIFAR10 has train and test, but no val"),
    ("torchvision's missing files", torchvision("CIFAR10:train:ROOT"), "torchvision cannot open CIFAR10 (train) under"),
    ("torchvision's other sets", torchvision("Kinetics:train:ROOT"), "torchvision cannot open Kinetics (train) under"),
    ("torchvision's base class", torchvision("VisionDataset:train:ROOT"), "torchvision cannot open VisionDataset"),
    ("torchvision's function", torchvision("wrap_dataset_for_transforms_v2:train:ROOT"), "torchvision has no data set"),
    ("MNIST of text", mnist(b"text" * 10), "torchvision cannot open MNIST (train) under"),
    ("MNIST of no bytes", mnist(b""), "torchvision cannot open MNIST (train) under"),
    ("MNIST cut off", mnist(sizes(30, 28, 28) + bytes(100)), "torchvision cannot open MNIST (train) under"),
]  # fmt: skip
