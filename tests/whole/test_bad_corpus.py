"""A corpus of bad inputs, end to end: each is told in a few lines, none ends in a trace, and none is trained on."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
import yaml
from archives import CELLS, PNG, add, save, shard, write_tar
from bad_files import Payload, contents, write_idx
from PIL import Image
from safetensors.torch import load_file, save_file
from small_images import write_images
from whole_runs import TINY

from scalekd.cli.app import main
from scalekd.train import checkpoint


class Place(NamedTuple):
    """What a case may spoil: everything in it is made anew for each."""

    folder: Path  # empty
    images: Path  # train/ and val/
    recipe: Path
    run: Path  # a finished run with its student


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, tiny.yaml and the run/ that was made of them, whose recipe names that very folder."""
    folder = tmp_path_factory.mktemp("finished")
    for part, number in (("train", 8), ("val", 4)):
        write_images(folder / "images" / part, per_class=number)
    recipe = TINY | {"losses": {"ce": {}}, "teacher": None, "train": TINY["train"] | {"epochs": 1}, "track": []}
    recipe["data"] = TINY["data"] | {part: str(folder / "images" / part) for part in ("train", "val")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "--no-preflight"]) == 0
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch) -> Place:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(finished, tmp_path / "copy")
    copy, empty = tmp_path / "copy", tmp_path / "bad"
    empty.mkdir()
    text = (copy / "tiny.yaml").read_text().replace(str(finished), str(copy))
    (copy / "tiny.yaml").write_text(text)
    return Place(empty, copy / "images", copy / "tiny.yaml", copy / "run")


# What a case gives is the rest of `scalekd train RECIPE --out run`, or a whole command line.
Make = Callable[[Place], list[object]]


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
    def make(place: Place) -> list[object]:
        (place.images / "train" / "bee" / "2.png").write_bytes(data)
        return ["train.batch_size=24"]  # one batch has all images

    return make


IMAGES = [
    ("truncated JPEG", image(JPEG[: len(JPEG) // 2]), "bee/2.png: image file is truncated"),
    ("truncated PNG", image(encoded(NOISE, "PNG")[:500]), "bee/2.png: "),
    ("no bytes", image(b""), "bee/2.png: it is empty (0 bytes)"),
    ("text called .png", image(b"not an image"), "bee/2.png: it is not an image that Pillow knows"),
    ("zeros", image(bytes(5000)), "bee/2.png: it is not an image that Pillow knows"),
    ("header of a JPEG alone", image(JPEG[:4]), "bee/2.png: it is not an image that Pillow knows"),
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

    def make(place: Place) -> list[object]:
        change(place.images)
        return []

    return make


def class_without_images(images: Path) -> None:
    (images / "train" / "dog").mkdir()
    (images / "train" / "dog" / "notes.txt").write_text("no image")


def flat(place: Place) -> list[object]:
    (place.folder / "0.png").write_bytes(PNG)
    return source(str(place.folder))


def few(place: Place) -> list[object]:
    write_images(place.folder / "few", per_class=1)
    return [*source(str(place.folder / "few")), "train.batch_size=2"]


FOLDERS = [
    ("missing folder", lambda p: source(f"{p.images}/trian"), "data.train: no folder"),
    ("validation folder missing", lambda p: [f"data.val={p.folder}/val"], "data.val: no folder"),
    ("file in place of a folder", lambda p: source(str(p.recipe)), "data.train: no folder"),
    ("no class folders", flat, "has no class folders; it needs one sub-folder of images per class"),
    ("class without images", spoiled(class_without_images), "class folders without images: dog. Fill or remove them"),
    ("other classes in validation", spoiled(lambda i: (i / "val/cat").rename(i / "val/cow")), "not in both: cat, cow."),
    ("class missing in validation", spoiled(lambda i: shutil.rmtree(i / "val/cat")), "not in both: cat. Give both"),
    ("too few to hold some out", few, "has 3 images, too few to hold out 3 for validation; name a data.val"),
    ("home of nobody", lambda p: source("~nobody-of-that-name/x"), "data.train: cannot open ~nobody-of-that-name/x: "),
    ("name that no disk takes", lambda p: source("x" * 5000), "data.train: "),
    ("NUL in a path", lambda p: source("tar:a\0b"), r"data.train: cannot open tar:a\x00b: embedded null byte"),
    ("no name at all", lambda p: source(""), "data.train: it is empty; name a folder or a source"),
    ("stream", lambda p: source("https://host/a.tar"), "is a stream, which cannot be resumed exactly"),
]


# ---------------------------------------------------------------- archives and shards


def tar(change: Callable[[bytes], bytes] = lambda raw: raw, **members: bytes) -> Make:
    """An archive of `members`, or else of two good classes, its bytes changed."""

    def make(place: Place) -> list[object]:
        path = write_tar(place.folder / "t.tar", members or {f"{c}/{i}.png": PNG for c in "ab" for i in range(9)})
        path.write_bytes(change(path.read_bytes()))
        return source(f"tar:{path}")

    return make


def member(name: str, **header: object) -> Make:
    """An archive with one member that is a trick, after a good one."""

    def make(place: Place) -> list[object]:
        with tarfile.open(place.folder / "t.tar", "w") as file:
            add(file, "a/0.png", PNG)
            add(file, name, b"", **header)
        return source(f"tar:{place.folder / 't.tar'}")

    return make


def gzipped(place: Place) -> list[object]:
    with tarfile.open(place.folder / "t.tar", "w:gz") as file:
        add(file, "a/0.png", PNG)
    return source(f"tar:{place.folder / 't.tar'}")


def header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


LONG_NAMES = (header(tarfile.GNUTYPE_LONGNAME, 4) + b"cat/".ljust(512, b"\0")) * 5000
EXABYTES = header(tarfile.GNUTYPE_LONGNAME, 2**62)


def shards(names: str | bytes = "", **labels: bytes) -> Make:
    """A shard with these labels, and a class map beside it."""

    def make(place: Place) -> list[object]:
        if names:
            (place.folder / "classes.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
        return source(shard(place.folder, labels))

    return make


def shard_of(**members: bytes) -> Make:
    files = {name.replace("_", "."): data for name, data in members.items()}
    return lambda place: source(f"wds:{write_tar(place.folder / 's.tar', files)}")


def wds(name: str) -> Make:
    return lambda place: source(f"wds:{place.folder}/{name}")


OUTSIDE = "is a path that leads outside; nothing was read"
LINK = "is a link or a device; nothing was read"
ARCHIVES = [
    ("tar cut in a header", tar(lambda raw: raw[:1100]), "after a/0.png; make or copy it again"),
    ("tar cut between members", tar(lambda raw: raw[:2048]), "is cut off after a/1.png; make or copy it again"),
    ("tar with a damaged header", tar(lambda raw: raw[:1030] + b"x" + raw[1031:]), "has a damaged header after a/0.png"),
    ("two tars in one", tar(lambda raw: raw * 2), "goes on after its end mark"),
    ("tar of text", tar(lambda raw: b"no archive " * 200), "is damaged or cut off"),
    ("tar of no bytes", tar(lambda raw: b""), "t.tar is "),
    ("tar without members", tar(lambda raw: bytes(10240)), "holds no images"),
    ("tar without images", tar(**{"a/notes.txt": b""}), "holds no images"),
    ("tar with an image in no folder", tar(**{"0.png": PNG}), "0.png in"),
    ("tar with a class twice", tar(**{"x/a/0.png": PNG, "y/a/0.png": PNG}), "has the class a in two folders, x/a and y/a"),
    ("tar with a name twice", tar(**{"a/0.png": PNG, "./a/0.png": PNG}), "a/0.png is twice in"),
    ("tar that is gzipped", gzipped, "is compressed (gzip), so single images cannot be reached"),
    ("tar with a path upwards", member("../../evil.png"), OUTSIDE),
    ("tar with an absolute path", member("/tmp/evil.png"), OUTSIDE),
    ("tar with a symlink", member("a/1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), LINK),
    ("tar with a hard link", member("a/1.png", type=tarfile.LNKTYPE, linkname="../x"), LINK),
    ("tar with a device", member("a/1.png", type=tarfile.BLKTYPE), LINK),
    ("tar of headers of names without end", tar(lambda raw: LONG_NAMES + raw), "is damaged or cut off"),
    ("tar with a name of exabytes", tar(lambda raw: EXABYTES + raw), "is damaged or cut off"),
    ("image in a tar that is no image", tar(**{f"a/{i}.png": b"text" for i in range(30)}), "a/"),
    ("missing tar", lambda p: source(f"tar:{p.folder}/t.tar"), "cannot open"),
    ("image without a label", shard_of(a_png=PNG, a_cls=b"0", b_png=PNG), "sample b in"),
    ("label without an image", shard_of(a_png=PNG, a_cls=b"0", b_cls=b"1"), "sample b in"),
    ("two images of one key", shard_of(a_png=PNG, a_jpg=PNG, a_cls=b"0"), "a.png and a.jpg in"),
    ("label that is not a number", shards(a=b"0", b=b"one"), "label 'one' of b.png in"),
    ("label below 0", shards(a=b"0", b=b"-1"), "label '-1' of b.png in"),
    ("label that is empty", shards(a=b"0", b=b""), "label '' of b.png in"),
    ("label that is not text", shards(a=b"0", b=b"\xff\xfe"), "the label of b in"),
    ("label that is far too long", shards(a=b"0", b=b"9" * 5000), "has 5000 bytes, which is no class"),
    ("label with a gap before it", shards(a=b"0", b=b"7"), "has labels up to 7 and no image of class 1 and 5 others"),
    ("label beyond the class map", shards("ant\nbee\n", a=b"0", b=b"2"), "label '2' of b.png in"),
    ("label that the class map lacks", shards("ant\nbee\n", a=b"ant", b=b"cow"), "is none of the 2 classes"),
    ("class map with a name twice", shards("ant\nant\n", a=b"0"), "has a name twice; write one class per line"),
    ("class map without names", shards("\n\n", a=b"0"), "has no name; write one class per line"),
    ("class map that is not text", shards(b"\xff\xfe\x00", a=b"0"), "is not UTF-8 text; write one class per line"),
    ("missing shard", wds("s-{0..3}.tar"), "4 of 4 shards of"),
    ("pattern of no shard", wds("s-*.tar"), "no file matches"),
    ("range that runs backwards", wds("s-{3..0}.tar"), "{3..0} in"),
    ("range of billions", wds("s-{0..99999999999}.tar"), "stands for more than 100,000 shards"),
    ("range of ranges of billions", wds("{0..99999}{0..99999}.tar"), "stands for more than 100,000 shards"),
]  # fmt: skip


# ---------------------------------------------------------------- Hugging Face, IDX, torchvision

NUMBER, CLASS = datasets.Value("int64"), datasets.ClassLabel(names=["a", "b"])


def hf(columns: dict[str, list], features: dict[str, Any], more: str = "") -> Make:
    return lambda place: source(save(place.folder, columns, features) + more)


GOOD = ({"image": CELLS * 15, "label": [0, 1] * 15}, {"image": datasets.Image(), "label": CLASS})


def hf_file(name: str, change: Callable[[bytes], bytes]) -> Make:
    """A good set in which one file's bytes are changed."""

    def make(place: Place) -> list[object]:
        text = save(place.folder, *GOOD)
        file = place.folder / "hf" / name
        file.write_bytes(change(file.read_bytes()))
        return source(text)

    return make


def hf_splits(text: str) -> Make:
    def make(place: Place) -> list[object]:
        (place.folder / "dataset_dict.json").write_text(text)
        return ["--data", f"hf:{place.folder}"]

    return make


def broken_parquet(place: Place) -> list[object]:
    (place.folder / "train.parquet").write_bytes(b"PAR1" + bytes(100))
    return source(f"hf:{place.folder}")


def idx(images: int, labels: int, cut: int = 0) -> Make:
    def make(place: Place) -> list[object]:
        write_idx(place.folder / "x", images, labels, cut)
        return source(f"idx:{place.folder / 'x'}")

    return make


def idx_file(change: Callable[[bytes], bytes], name: str = "x-images-idx3-ubyte") -> Make:
    def make(place: Place) -> list[object]:
        given = idx(30, 30)(place)
        file = place.folder / name
        file.write_bytes(change(file.read_bytes()))
        return given

    return make


def sizes(*shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)


def mnist(images: bytes, labels: bytes = sizes(30) + bytes(i % 3 for i in range(30))) -> Make:
    """torchvision checks that MNIST's files are there, and not what is in them."""

    def make(place: Place) -> list[object]:
        folder = place.folder / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for part in ("train", "t10k"):
            (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        return source(f"torchvision:MNIST:train:{place.folder}")

    return make


def torchvision(text: str) -> Make:
    return lambda place: source(f"torchvision:{text.replace('ROOT', str(place.folder))}")


SETS = [
    ("HF without an image column", hf({"label": [0, 1]}, {"label": CLASS}), "which columns of hf:"),
    ("HF without a label column", hf({"image": CELLS}, {"image": datasets.Image()}), "which columns of hf:"),
    ("HF with two image columns", hf({"image": CELLS, "mask": CELLS, "label": [0, 1]}, GOOD[1] | {"mask": datasets.Image()}),
     "which columns of hf:"),
    ("HF without labels (-1)", hf({"image": CELLS, "label": [0, -1]}, GOOD[1] | {"label": NUMBER}), "`label` of image 1 of hf:"),
    ("HF with a missing label", hf({"image": CELLS, "label": [0, None]}, GOOD[1]), "is None, which is none of the 2 classes"),
    ("HF without rows", hf({"image": [], "label": []}, GOOD[1]), "data.train: "),
    ("HF split that is not there", hf(*GOOD, more=":test"), "has no split `test`"),
    ("HF folder missing", lambda p: source(f"hf:{p.folder}/x"), "hf: reads data sets that are on disk already"),
    ("HF folder without a set", lambda p: source(f"hf:{p.folder}"), "datasets cannot read"),
    ("HF Arrow file cut off", hf_file("data-00000-of-00001.arrow", lambda raw: raw[: len(raw) // 2]), "datasets cannot read"),
    ("HF description not JSON", hf_file("dataset_info.json", lambda raw: raw[:20]), "datasets cannot read"),
    ("HF splits not a list", hf_splits('{"splits": 3}'), "its splits are not a list of names"),
    ("HF splits outside", hf_splits('{"splits": ["../x", "train"]}'), "its splits are not a list of names"),
    ("HF parquet without its end", broken_parquet, "datasets cannot read"),
    ("IDX with fewer labels", idx(9, 8), "has 9 images and 8 labels"),
    ("IDX cut in the pixels", idx(9, 9, cut=5), "is not a whole IDX file"),
    ("IDX cut in the header", idx(9, 9, cut=16 * 9 + 10), "is not a whole IDX file"),
    ("IDX without images", idx(0, 0), "holds no images"),
    ("IDX of another kind", idx_file(lambda raw: sizes(30) + bytes(30)), "its first bytes are 00000801, not those of 3-dim"),
    ("IDX without pixels", idx_file(lambda raw: sizes(30, 0, 0)), "images without pixels"),
    ("IDX that announces exabytes", idx_file(lambda raw: sizes(30, 2**31, 2**31)), "is not a whole IDX file"),
    ("IDX labels cut off in gzip", idx_file(lambda raw: raw[:-9], "x-labels-idx1-ubyte.gz"), "is not a whole IDX file"),
    ("IDX labels missing", lambda p: (idx(9, 9)(p), (p.folder / "x-labels-idx1-ubyte.gz").unlink())[0], "labels-idx1-ubyte.gz is there"),
    ("Fashion-MNIST's unknown split", lambda p: source("fashion-mnist:valid"), "write fashion-mnist:train or fashion-mnist:test"),
    ("torchvision's unknown name", torchvision("CIFAR11:train:ROOT"), "no data set `CIFAR11`. Did you mean `CIFAR10`"),
    ("torchvision without a root", torchvision("CIFAR10:train"), "write torchvision:CIFAR10:train:/folder"),
    ("torchvision's unknown split", torchvision("CIFAR10:training:ROOT"), "write torchvision:CIFAR10:train:/folder"),
    ("torchvision's split that it lacks", torchvision("CIFAR10:val:ROOT"), "CIFAR10 has train and test, and no val"),
    ("torchvision's missing files", torchvision("CIFAR10:train:ROOT"), "torchvision cannot open CIFAR10 (train) under"),
    ("torchvision's other sets", torchvision("Kinetics:train:ROOT"), "torchvision cannot open Kinetics (train) under"),
    ("torchvision's base class", torchvision("VisionDataset:train:ROOT"), "torchvision cannot open VisionDataset"),
    ("torchvision's function", torchvision("wrap_dataset_for_transforms_v2:train:ROOT"), "torchvision has no data set"),
    ("MNIST of text", mnist(b"text" * 10), "torchvision cannot open MNIST (train) under"),
    ("MNIST of no bytes", mnist(b""), "torchvision cannot open MNIST (train) under"),
    ("MNIST cut off", mnist(sizes(30, 28, 28) + bytes(100)), "torchvision cannot open MNIST (train) under"),
]  # fmt: skip


# ---------------------------------------------------------------- recipes


def recipe(text: str | bytes) -> Make:
    """RECIPE in it is the good recipe."""

    def make(place: Place) -> list[object]:
        file = place.folder / "recipe.yaml"
        raw = text if isinstance(text, bytes) else text.encode()
        file.write_bytes(raw.replace(b"RECIPE", place.recipe.read_bytes()))
        return ["train", file, "--out", place.folder / "run"]

    return make


def given(*overrides: str) -> Make:
    return lambda place: list(overrides)


def laughs(first: str, more: str) -> str:
    """A few lines that stand for 2**40 values."""
    return "\n".join(
        ["RECIPE", first, *(more.replace("NEW", f"a{i}").replace("OLD", f"a{i - 1}") for i in range(1, 40))]
    )


NOT_YAML = "is not valid YAML: "
RECIPES = [
    ("broken YAML", recipe("RECIPE\na: [1"), NOT_YAML),
    ("tabs", recipe("RECIPE\na:\n\tb: 1"), NOT_YAML),
    ("tag of a Python object", recipe("name: !!python/object/apply:os.system ['true']"), "could not determine a constructor"),
    ("tag of a Python name", recipe("name: !!python/name:os.system"), "could not determine a constructor"),
    ("unknown tag", recipe("RECIPE\nseed: !x 1"), "could not determine a constructor"),
    ("billion laughs", recipe(laughs("a0: &a0 [x, x]", "NEW: &NEW [*OLD, *OLD]")), "it has more than 100,000 values"),
    ("billion laughs in merges", recipe(laughs("a0: &a0 {x: 1}", "NEW: &NEW {<<: [*OLD, *OLD]}")), "more than 100,000 values"),
    ("alias of what it is in", recipe("RECIPE\nx: &a {b: *a}"), "an alias stands for what it is in"),
    ("alias of nothing", recipe("RECIPE\nx: *a"), "found undefined alias"),
    ("nested too deeply", recipe("a: " + "[" * 2000), "it is nested too deeply"),
    ("key given twice", recipe("RECIPE\nname: again"), "`name` is given twice"),
    ("key with control characters", recipe('RECIPE\n"a\\e[2J": 1'), r"the key 'a\x1b[2J' has characters that cannot be shown"),
    ("two documents", recipe("RECIPE\n---\nRECIPE"), NOT_YAML),
    ("not a mapping", recipe("- a\n- b"), "is not a recipe: it must be a mapping"),
    ("no bytes at all", recipe(""), "is not a recipe: it must be a mapping"),
    ("binary file", recipe(PNG), "cannot be read as text"),
    ("not UTF-8", recipe("name: é".encode("latin-1")), "cannot be read as text"),
    ("folder as a recipe", lambda p: ["train", p.folder], "no recipe `"),
    ("missing recipe", lambda p: ["train", "dmo"], "no recipe `dmo`: neither a file nor a shipped one. Did you mean `demo`?"),
    ("recipe's text in place of its name", lambda p: ["train", p.recipe.read_text() * 20], "no recipe `"),
    ("unknown key", given("dta=1"), "dta: unknown. Did you mean `data`?"),
    ("unknown key inside", given("optim.rl=1"), "optim.rl: unknown. Valid: "),
    ("thousands of unknown keys", recipe("RECIPE\n" + "\n".join(f"k{i}: 1" for i in range(2000))), "and 1970 more"),
    ("value for a section", given("train=3"), "train: keys and values are needed"),
    ("list for a section", given("data=[1]"), "data: keys and values are needed"),
    ("text for a number", given("optim.lr=fast"), "optim.lr: Input should be a valid number"),
    ("true for a number", given("train.epochs=yes"), "train.epochs: true and false are no value for it"),
    ("true for an option", given("losses.ce.smoothing=true"), "losses.ce.smoothing: true and false are no value for it"),
    ("half an epoch", given("train.epochs=1.5"), "train.epochs: Input should be a valid integer"),
    ("no epochs", given("train.epochs=0"), "train.epochs: Input should be greater than 0"),
    ("NaN", given("optim.lr=.nan"), "optim.lr: Input should be a finite number"),
    ("infinity", given("augment.mixup=.inf"), "augment.mixup: Input should be a finite number"),
    ("NaN in an option", given("losses.ce.smoothing=.nan"), "losses.ce.smoothing: Input should be a finite number"),
    ("number of thousands of digits", given("seed=0x" + "f" * 5000), "a number has more than 64 bits"),
    ("the same as text", given(f"train.epochs='{'9' * 400}'"), "train.epochs: Input should be less than"),
    ("batch of quintillions", given(f"train.batch_size={10**18}"), "train.batch_size: Input should be less than"),
    ("padding of quintillions", given(f"augment.pad={10**18}"), "augment.pad: Input should be less than"),
    ("image of quintillions of pixels", given(f"data.image_size={10**18}"), "data.image_size: pixels, such as 224"),
    ("deviation of 0", given("student.std=[0, 0, 0]"), "student.std.0: Input should be greater than 0"),
    ("beta of 1", given("optim.betas=[1, 1]"), "optim.betas.0: Input should be less than 1"),
    ("surrogates", recipe('RECIPE\nseed: "\\ud800"'), "seed: "),
    ("model of a surrogate", given('student.model="\\ud800"'), r"timm has no model `\ud800`"),
    ("argument that is no name", given("student.kwargs.a b=1"), "'a b' is no name of an argument"),
    ("weights of nobody", given("student.weights=~nobody-of-that-name/x"), "student.weights: no file"),
    ("weights of a name too long", given("student.weights=" + "x" * 5000), "student.weights: no file"),
    ("override without a value", given("optim.lr"), "`optim.lr` is not an override: write key=value"),
]  # fmt: skip


# ---------------------------------------------------------------- checkpoints and students


def flipped(raw: bytes) -> bytes:
    """One bit changed, among the numbers."""
    at = len(raw) // 2
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def resumed(*names: str, change: Callable[[bytes], bytes]) -> Make:
    """A run that was killed before its end goes on, with the bytes of these checkpoints changed."""

    def make(place: Place) -> list[object]:
        (place.run / "summary.json").unlink()
        (place.run / "previous.pt").unlink(missing_ok=True)
        shutil.copy(place.run / "last.pt", place.folder / "whole.pt")
        for name in names:
            (place.run / name).write_bytes(change((place.folder / "whole.pt").read_bytes()))
        return ["train", place.run / "recipe.yaml", "--out", place.run, "--no-preflight"]

    return make


def state(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A checkpoint that is whole, with other content."""

    def of(raw: bytes) -> bytes:
        content = torch.load(io.BytesIO(raw), weights_only=True)
        content = change(content) or content
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    return of


def exported(which: str, change: Callable[[bytes], bytes]) -> Make:
    def make(place: Place) -> list[object]:
        file = place.run / f"{which}.pt"
        file.write_bytes(change(file.read_bytes()))
        return ["export", place.run, "--checkpoint", which]

    return make


def evaluated(place: Place) -> list[object]:
    return ["evaluate", place.run, "--data", place.images / "val"]


def card(**changes: object) -> Make:
    """The student with another card. None takes a line out."""

    def make(place: Place) -> list[object]:
        file = place.run / "student.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return evaluated(place)

    return make


def student_file(name: str, change: Callable[[bytes], bytes]) -> Make:
    def make(place: Place) -> list[object]:
        file = place.run / name
        file.write_bytes(change(file.read_bytes()))
        return evaluated(place)

    return make


def other_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], card_too: bool = True) -> Make:
    """The student with other weights, and a card that does not say which it was made with."""

    def make(place: Place) -> list[object]:
        file = place.run / "student.safetensors"
        save_file(change(load_file(file)), file)
        return card(sha256=None)(place) if card_too else evaluated(place)

    return make


def as_pth(place: Place) -> list[object]:
    torch.save({"x": Payload(place.folder / "trace")}, place.run / "student.pth")
    return ["evaluate", place.run / "student.pth", "--data", place.images / "val"]


def mistaken(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    return state(lambda s: change(s["deployed"]) and None)


NOT_WHOLE = "last.pt is not a whole checkpoint: "
OTHER_RUN = "last.pt is of another recipe's run (first difference: "
NOT_OF_RUN = "last.pt is not of this recipe's run: "
CARD = "student.json is not a valid student card: "
UNFIT = "student.safetensors does not fit its card"
CHECKPOINTS = [
    ("checkpoint cut off", resumed("last.pt", change=lambda raw: raw[:-1]), NOT_WHOLE),
    ("checkpoint of no bytes", resumed("last.pt", change=lambda raw: b""), NOT_WHOLE),
    ("checkpoint with one bit changed", resumed("last.pt", change=flipped), NOT_WHOLE),
    ("checkpoint of text", resumed("last.pt", change=lambda raw: b"text"), NOT_WHOLE),
    ("checkpoint of a pickle with code", resumed("last.pt", change=lambda raw: pickle.dumps(Payload(Path("trace")))), NOT_WHOLE),
    ("checkpoint with code", resumed("last.pt", change=state(lambda s: s | {"x": Payload(Path("trace"))})), NOT_WHOLE),
    ("checkpoints both damaged", resumed("last.pt", "previous.pt", change=flipped), "previous.pt is not a whole checkpoint"),
    ("checkpoint of another format", resumed("last.pt", change=state(lambda s: s | {"format": 0})), "last.pt is no checkpoint of this"),
    ("checkpoint that is a list", resumed("last.pt", change=state(lambda s: [1])), "last.pt is no checkpoint of this version"),
    ("checkpoint of another recipe", resumed("last.pt", change=state(lambda s: s | {"recipe": s["recipe"].replace("lr: 0.001", "lr: 0.5")})),
     OTHER_RUN + "`lr: 0.5` there, `lr: 0.001` now)"),
    ("checkpoint whose recipe is none", resumed("last.pt", change=state(lambda s: s | {"recipe": 3})), OTHER_RUN),
    ("checkpoint without weights", resumed("last.pt", change=state(lambda s: s.pop("student") and None)), NOT_OF_RUN),
    ("checkpoint beyond the end", resumed("last.pt", change=state(lambda s: s["progress"].update(step=999))), NOT_OF_RUN + "step 999 of 3"),
    ("checkpoint of step -1", resumed("last.pt", change=state(lambda s: s["progress"].update(step=-1))), NOT_OF_RUN + "step -1 of 3"),
    ("checkpoint whose step is text", resumed("last.pt", change=state(lambda s: s["progress"].update(step="x"))), NOT_OF_RUN),
    ("checkpoint whose history is none", resumed("last.pt", change=state(lambda s: s["progress"].update(history=3))), NOT_OF_RUN),
    ("export of a damaged checkpoint", exported("last", flipped), NOT_WHOLE),
    ("export of a checkpoint before any validation", exported("last", state(lambda s: s["progress"].update(history=[]))),
     "last.pt is not a checkpoint of"),
    ("export of an empty checkpoint", exported("best", state(lambda s: {"format": checkpoint.FORMAT})), "best.pt is not a checkpoint of"),
    ("export of another model's", exported("last", mistaken(lambda d: d.popitem())), "last.pt is not a checkpoint of"),
    ("card that is not JSON", student_file("student.json", lambda raw: b"name: no JSON"), CARD),
    ("card that is not text", student_file("student.json", lambda raw: b"\xff\xfe"), CARD),
    ("card that is a list", student_file("student.json", lambda raw: b"[]"), CARD),
    ("card nested without end", student_file("student.json", lambda raw: b"[" * 100_000), CARD),
    ("card without classes", card(classes=None), CARD + "classes: Field required"),
    ("card of other classes", card(classes=["ant", "bee", "cow"]), "--data has other classes than the student knows"),
    ("card of classes in another order", card(classes=["bee", "ant", "cat"]), "--data has other classes than the student knows"),
    ("card of classes that are numbers", card(classes=[1, 2, 3]), CARD + "classes.0: Input should be a valid string"),
    ("card without deviations", card(std=None), CARD + "std: Field required"),
    ("card with a deviation of 0", card(std=[0, 0, 0]), CARD + "std.0: Input should be greater than 0"),
    ("card with two means", card(mean=[0.5, 0.5]), CARD + "Value error, mean and std must each have one value or three"),
    ("card with an image of 0 pixels", card(image_size=[0, 0]), CARD + "image_size.0: Input should be greater than 0"),
    ("card with an unknown interpolation", card(interpolation="x"), CARD),
    ("card with a crop of nothing", card(crop_pct=1e-9), CARD),
    ("card of a model that timm lacks", card(model="resnet_of_mine"), CARD),
    ("card of arguments that fit nothing", card(kwargs={"block": 3}), UNFIT),
    ("weights of another model", card(model="test_vit", sha256=None), UNFIT),
    ("weights for more classes", other_weights(lambda w: w | {"fc.weight": torch.ones(9, w["fc.weight"].shape[1])}), UNFIT),
    ("weights of which one is missing", other_weights(lambda w: {k: v for k, v in w.items() if k != "fc.weight"}), UNFIT),
    ("weights that are not those of the card", other_weights(lambda w: {k: v + 1 for k, v in w.items()}, card_too=False),
     UNFIT),
    ("weights with one bit changed", student_file("student.safetensors", flipped), UNFIT),
    ("weights cut off", student_file("student.safetensors", lambda raw: raw[: len(raw) // 2]), UNFIT),
    ("student that is a .pth with code", as_pth, "no student.safetensors with its .json"),
    ("folder without a student", lambda p: ["evaluate", p.folder, "--data", p.images], "no student.safetensors"),
]  # fmt: skip

WRITTEN_AT_A_START = ("recipe.yaml", "provenance.json", "student.json", "log.jsonl")  # of a run that goes on
CASES: list[tuple[str, Make, str]] = [*IMAGES, *FOLDERS, *ARCHIVES, *SETS, *RECIPES, *CHECKPOINTS]


@pytest.mark.parametrize("make, told", [pytest.param(make, told, id=name) for name, make, told in CASES])
def test_is_told_and_not_trained_on(cli, place, tmp_path, monkeypatch, make, told):
    monkeypatch.chdir(place.folder)  # whatever would be written beside
    args = make(place)
    if not args or args[0] not in ("train", "export", "evaluate"):
        args = ["train", place.recipe, "--out", tmp_path / "run", *args]
    before = contents(tmp_path)
    result = cli(*args)
    assert result.code == 2, result
    assert result.err.startswith("scalekd: ") and told in result.err, result.err
    lines = result.err.splitlines()
    assert len(lines) <= (40 if " problem" in lines[0] else 3) and "Traceback" not in result.out + result.err
    after = contents(tmp_path)
    changed = {path for path in before if after.get(path) != before[path]}
    assert not {path for path in changed if args[0] != "train" or Path(path).name not in WRITTEN_AT_A_START}
    assert not any(Path(path).name in ("last.pt", "summary.json", "trace") for path in after.keys() - before.keys())


def test_the_good_ones_are_taken(cli, place, tmp_path):
    """What the cases spoil is otherwise in order, so it is the spoiling that is refused."""
    assert cli("train", place.recipe, "--out", tmp_path / "run").code == 0
    assert cli(*evaluated(place)).code == 0
    assert cli("export", place.run).code == 0
    for given in (tar()(place), shards("a\nb\n", **{f"{c}{i}": c.encode() for c in "ab" for i in range(9)})(place),
                  hf(*GOOD)(place), idx(30, 30)(place), mnist(sizes(30, 28, 28) + bytes(30 * 784))(place)):  # fmt: skip
        assert cli("train", place.recipe, "--dry-run", *given).code == 0, given
    assert cli(*resumed("last.pt", change=state(lambda s: s["progress"].update(step=2, history=[])))(place)).code == 0


def test_the_corpus_is_large_and_named_once():
    names = [name for name, _, _ in CASES]
    assert len(names) >= 60 and len(set(names)) == len(names)
