"""Each kind of source gives the images and classes of the folder that it was made from, and refuses what is not whole."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from archives import CELLS, PICTURE, PNG, add, save, shard, write_tar
from PIL import Image
from torch.utils.data import DataLoader

from scalekd.cli.app import parse
from scalekd.cli.options import recipe_overrides
from scalekd.common.errors import UserError
from scalekd.data.batches import train_batches, training_images
from scalekd.data.images import BadImage
from scalekd.data.options import Augment, Data
from scalekd.data.samplers import TrainSampler
from scalekd.data.sources.open import open_source
from scalekd.data.split import open_split

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing may be tried, also where the tests' HF_HUB_OFFLINE is not set."""
    connect, tried = socket.socket.connect, []

    def refuse(*args: object, **options: object) -> None:
        tried.append(args)
        raise OSError("a source went to the network")

    def only_local(self: socket.socket, address: object) -> None:  # data loader workers have Unix sockets
        connect(self, address) if self.family == socket.AF_UNIX else refuse()

    monkeypatch.setattr(socket.socket, "connect", only_local)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield
    assert not tried


def files_of(folder: Path) -> list[tuple[str, bytes]]:
    """(class, content) in the order of the folder source."""
    return [(p.parent.name, p.read_bytes()) for name in CLASSES for p in sorted((folder / name).iterdir())]


def labelled(folder: Path, label: Callable[[str], object], first: int = 0) -> dict[str, bytes]:
    members = {}
    for i, (name, data) in enumerate(files_of(folder), first):
        members |= {f"s/{i:04}.png": data, f"s/{i:04}.cls": str(label(name)).encode(), f"s/{i:04}.json": b"{}"}
    return members


def make_tar(folder: Path, to: Path) -> str:
    """As `tar` makes it, with folders; one name longer than a header has room for; with macOS's hidden files."""
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


@pytest.fixture(params=MAKERS, ids=lambda maker: maker.__name__.removeprefix("make_"))
def made(request, image_folder: Path, tmp_path: Path) -> tuple[str, Path]:
    """A source, and the folder that it was made from."""
    (tmp_path / "made").mkdir()
    folder = image_folder / "train"
    return request.param(folder, tmp_path / "made"), folder


def pixels(source) -> list:
    return [(np.array(image).tolist(), target) for image, target in (source[i] for i in range(len(source)))]


# ---------------------------------------------------------------- the same images, in any order, by anyone


def test_images_and_targets_are_those_of_the_folder(made):
    text, folder = made
    source, original = open_source(text, "data.train"), open_source(str(folder), "data.train")
    assert list(source.targets) == list(original.targets)
    assert pixels(source) == pixels(original)
    named = list(source.classes) == CLASSES
    assert datasets.config.HF_HUB_OFFLINE or not text.startswith("hf:")
    assert named or (list(source.classes) == ["0", "1", "2"] and text.startswith("wds:"))


def test_a_pickled_source_is_the_same(made):
    source = open_source(made[0], "data.train")
    copy = pickle.loads(pickle.dumps(source))
    assert pixels(copy) == pixels(source) and copy.where(3) == source.where(3)


def test_two_workers_read_the_same(made):
    source = open_source(made[0], "data.train")
    loader = DataLoader(Arrays(source), batch_size=None, num_workers=2)
    assert [a.tolist() for a in loader] == [image for image, _ in pixels(source)]


class Arrays:
    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.source[i][0]))


def test_a_run_goes_on_exactly_in_the_middle_of_an_epoch(made):
    data = Data(train=made[0], image_size=32, val_fraction=0.2)
    images = training_images(open_split(data), data, Augment(), (0.5,) * 3, (0.2,) * 3, seed=1)

    def batches(start: int, workers: int) -> torch.Tensor:
        sampler = TrainSampler(len(images), 4, seed=1, total_steps=9, start_step=start)
        return torch.cat([b.images for b in train_batches(images, sampler, workers, pin=False)])

    assert torch.equal(batches(6, 2), batches(0, 0)[24:])


def test_an_archive_that_became_shorter(image_folder, tmp_path):
    source = open_source(make_tar(image_folder / "train", tmp_path), "data.train")
    (tmp_path / "photos.tar").write_bytes((tmp_path / "photos.tar").read_bytes()[:5000])
    with pytest.raises(BadImage, match="shorter since it was opened"):
        source[len(source) - 1]
    (tmp_path / "photos.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source[0]


Image.new("RGB", (4, 4), (9, 9, 9)).save(PICTURE, "PNG")


def refused(text: str) -> str:
    with pytest.raises(UserError) as told:
        open_source(text, "data.train")
    message = str(told.value)
    assert message.startswith("data.train: ") and len(message.splitlines()) == 1 and message.isprintable(), message
    return message


TRICKS: list[tuple[str, dict[str, object], str]] = [
    ("../../evil.png", {}, "a path that leads outside"),
    ("cat/../../evil.png", {}, "a path that leads outside"),
    ("/tmp/evil.png", {}, "a path that leads outside"),
    ("cat\\..\\evil.png", {}, "a path that leads outside"),
    ("cat/link.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link or a device"),
    ("cat/hard.png", {"type": tarfile.LNKTYPE, "linkname": "../evil"}, "a link or a device"),
    ("cat/pipe.png", {"type": tarfile.FIFOTYPE}, "a link or a device"),
    ("cat/disk.png", {"type": tarfile.BLKTYPE}, "a link or a device"),
    ("cat/holes.png", {"type": tarfile.GNUTYPE_SPARSE}, "a sparse file"),
    ("cat/\x1b[31m\n.png", {"type": tarfile.SYMTYPE}, r"cat/\x1b[31m\n.png in"),
]


@pytest.mark.parametrize("kind", ["tar", "wds"])
@pytest.mark.parametrize("name, header, told", TRICKS, ids=[repr(t[0]) for t in TRICKS])
def test_path_tricks_are_refused_and_write_nothing(tmp_path, kind, name, header, told):
    inside = tmp_path / "a" / "b"
    write_tar(inside / "t.tar", {})
    with tarfile.open(inside / "t.tar", "w") as tar:
        add(tar, "cat/0.png", PNG)
        add(tar, name, b"" if header else PNG, **header)
    before = sorted(tmp_path.rglob("*"))
    assert told in refused(f"{kind}:{inside / 't.tar'}")
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_written_when_an_archive_is_read(image_folder, tmp_path, monkeypatch):
    text = make_tar(image_folder / "train", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    pixels(open_source(text, "data.train"))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "cut", [0, 100, 512, 512 + 100, 1024, 1024 + 512, 1024 + 700, 2048, 2048 + 900, 3072, 3072 + 99]
)
def test_a_truncated_tar_names_its_last_whole_member(tmp_path, cut):
    """Three members of a header and one block each, then the end mark."""
    path = write_tar(tmp_path / "t.tar", {f"cat/{i}.png": PNG for i in range(3)})
    assert len(PNG) < 512 and len(open_source(f"tar:{path}", "data.train")) == 3
    path.write_bytes(path.read_bytes()[:cut])
    told = refused(f"tar:{path}")
    last = f"cat/{cut // 1024 - 1}.png" if cut >= 1024 else "its beginning"
    assert f"after {last}; make or copy it again" in told


def test_a_damaged_header_and_joined_archives(tmp_path):
    path = write_tar(tmp_path / "t.tar", {f"cat/{i}.png": PNG for i in range(3)})
    whole = path.read_bytes()
    path.write_bytes(whole[:1030] + b"x" + whole[1031:])
    assert "has a damaged header after cat/0.png" in refused(f"tar:{path}")
    path.write_bytes(whole + whole)
    assert "goes on after its end mark" in refused(f"tar:{path}")


@pytest.mark.parametrize("mode, name", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_archives(tmp_path, mode, name):
    with tarfile.open(tmp_path / "t.tar", mode) as tar:
        add(tar, "cat/0.png", PNG)
    assert f"is compressed ({name})" in refused(f"tar:{tmp_path / 't.tar'}")
    assert "decompress it" in refused(f"wds:{tmp_path / 't.tar'}")


@pytest.mark.parametrize(
    "members, told",
    [
        ({}, "holds no images"),
        ({"cat/notes.txt": b""}, "holds no images"),
        ({"0.png": PNG}, "0.png in"),
        ({"train/cat/0.png": PNG, "val/cat/0.png": PNG}, "class cat in two folders, train/cat and val/cat"),
        ({"cat/0.png": PNG, "./cat/0.png": PNG}, "cat/0.png is twice in"),
    ],
)
def test_tars_without_clear_classes(tmp_path, members, told):
    assert told in refused(f"tar:{write_tar(tmp_path / 't.tar', members)}")


def test_an_empty_class_folder_in_a_tar(image_folder, tmp_path):
    (image_folder / "train" / "dog\n").mkdir()
    assert r"class folders without images: photos/dog\n. Fill" in refused(make_tar(image_folder / "train", tmp_path))


def test_files_that_are_no_archives(tmp_path):
    (tmp_path / "text.tar").write_text("no archive, but longer than a header is " * 20)
    assert "is damaged or cut off" in refused(f"tar:{tmp_path / 'text.tar'}")
    told = refused(f"tar:{tmp_path / 'txt.tar'}")
    assert "No such file" in told and "Did you mean `text.tar`?" in told
    assert "write tar:" in refused(str(tmp_path / "text.tar"))


@pytest.mark.parametrize(
    "labels, told",
    [
        ({"a": b"0", "b": b"-1"}, "label '-1' of b.png in"),
        ({"a": b"-1", "b": b"0"}, "label '-1' of a.png in"),
        ({"a": b"0", "b": b"0.5"}, "label '0.5' of b.png in"),
        ({"a": b"ant", "b": b"3"}, "label '3' of b.png in"),
        ({"a": b"0", "b": b""}, "label '' of b.png in"),
        ({"a": b"0", "b": b"99999999"}, "label '99999999' of b.png in"),
        ({"a": b"0", "b": b"\xff"}, "label of b in"),
        ({"a": b"0", "b": b"x" * 2000}, "has 2000 bytes, which is no class"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, told):
    assert told in refused(shard(tmp_path, labels))


def test_classes_txt_names_the_labels_and_bounds_them(tmp_path):
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    source = open_source(shard(tmp_path, {"a": b"2", "b": b"bee\n"}), "data.train")
    assert (source.classes, source.targets) == (CLASSES, [2, 1])
    assert "label '3' of b.png in" in refused(shard(tmp_path, {"a": b"2", "b": b"3"}))
    assert "none of the 3 classes" in refused(shard(tmp_path, {"a": b"dog"}))
    (tmp_path / "classes.txt").write_text("ant\nant\n")
    assert "has a name twice" in refused(shard(tmp_path, {"a": b"0"}))


def test_samples_that_are_not_whole(tmp_path):
    lone = {"a.png": PNG, "a.cls": b"0", "b.png": PNG}
    assert "sample b in" in refused(f"wds:{write_tar(tmp_path / 's.tar', lone)}")
    lone = {"a.png": PNG, "a.cls": b"0", "b.cls": b"1"}
    assert "has a label and no image" in refused(f"wds:{write_tar(tmp_path / 's.tar', lone)}")
    two = {"a.png": PNG, "a.jpg": PNG, "a.cls": b"0"}
    assert "a.png and a.jpg in" in refused(f"wds:{write_tar(tmp_path / 's.tar', two)}")
    masks = {"a.png": PNG, "a.mask.png": b"", "a.cls": b"0", "._b.png": b""}
    assert len(open_source(f"wds:{write_tar(tmp_path / 's.tar', masks)}", "data.train")) == 1


def test_ranges_and_patterns_of_shards(tmp_path):
    for number in ("08", "09", "10"):
        shard(tmp_path, {number: b"0"}, f"s-{number}.tar")
    for pattern, names in (("{08..10}", ["08", "09", "10"]), ("*", ["08", "09", "10"]), ("0{8..9}", ["08", "09"])):
        source = open_source(f"wds:{tmp_path}/s-{pattern}.tar", "data.train")
        assert source.names == [f"{name}.png" for name in names]
    assert "2 of 5 shards" in refused(f"wds:{tmp_path}/s-{{08..12}}.tar")
    assert "no file matches" in refused(f"wds:{tmp_path}/t-*.tar")
    assert "{08,10} in" in refused(f"wds:{tmp_path}/s-{{08,10}}.tar")


@pytest.mark.parametrize("text", ["https://a/b.tar", "wds:s3://a/{0..9}.tar", "wds:pipe:cat a.tar", "pipe:curl x"])
def test_streams_are_refused(text):
    assert "is a stream, which cannot be resumed exactly; copy it to a disk" in refused(text)


def test_numbered_classes_of_training_and_validation(tmp_path):
    full, part = (shard(tmp_path, {str(i): b"%d" % i for i in range(n)}, f"{n}.tar") for n in (4, 3))
    assert len(open_split(Data(train=full, val=part)).classes) == 4  # validation lacks the highest
    with pytest.raises(UserError, match=r"3 classes and data.val 4; not in both: 3\."):
        open_split(Data(train=part, val=full))
    with pytest.raises(UserError, match="labels up to 4 and no image of class 1 and 2 others"):
        open_split(Data(train=shard(tmp_path, {"a": b"0", "b": b"4"}), val=full))


@pytest.mark.parametrize("label, told", [(-1, "is -1, which is none of the 3 classes"), (None, "is None"), (3, "is 3")])
def test_labels_out_of_range(tmp_path, label, told):
    rows = hf_table({"image": CELLS, "label": [0, label]})
    folder = tmp_path / "hf"
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    described = json.dumps({"info": {"features": hf_features(datasets.ClassLabel(names=CLASSES))}})
    write_described(folder / "train.parquet", described)
    assert f"`label` of image 1 of hf:{folder} {told}" in refused(f"hf:{folder}")


def hf_table(columns: dict[str, list]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features)


def hf_features(label: datasets.ClassLabel) -> dict:
    return datasets.Features({"image": datasets.Image(), "label": label}).to_dict()


def write_described(path: Path, described: str) -> None:
    """Says in the file that its integers are classes, which `datasets` itself would not write for such values."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    parquet.write_table(table.replace_schema_metadata({"huggingface": described}), path)


def test_which_columns(tmp_path):
    number = datasets.Value("int64")
    two = {"image": datasets.Image(), "mask": datasets.Image(), "fine": number, "labels": number}
    text = save(tmp_path, {"image": CELLS, "mask": CELLS, "fine": [1, 0], "labels": [0, 0]}, two)
    assert "image (Image), mask (Image), fine (Value), labels (Value)" in refused(text)
    assert list(open_source(f"{text}::image,labels", "data.train").targets) == [0, 0]
    source = open_source(f"{text}::mask,fine", "data.train")
    assert (source.targets, source.classes, source.where(0)) == (
        [1, 0],
        ["0", "1"],
        f"a.png (image 0 of {text}::mask,fine)",
    )
    assert "Write" in refused(f"{text}::image,nothing")


def test_splits_of_a_hugging_face_folder(image_folder, tmp_path):
    text = make_hf_splits(image_folder / "train", tmp_path)
    assert "has the splits train, test; write hf:" in refused(text.removesuffix(":train"))
    assert "has no split `tset`. Did you mean `test`?" in refused(text.replace(":train", ":tset"))
    saved = make_hf_saved(image_folder / "train", tmp_path)
    assert "It holds one set without splits; leave the split out" in refused(f"{saved}:train")
    assert "no folder" in refused(f"hf:{tmp_path}/nowhere")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.parquet").write_text("no parquet")
    assert "datasets cannot read" in refused(f"hf:{tmp_path / 'text'}")


def test_an_image_of_a_hugging_face_folder_that_cannot_be_read(tmp_path):
    for name, data in (("ant", PNG[:40]), ("bee", b""), ("cat", PNG)):
        (tmp_path / "hf" / "train" / name).mkdir(parents=True)
        (tmp_path / "hf" / "train" / name / "0.png").write_bytes(data)
    source = open_source(f"hf:{tmp_path / 'hf'}", "data.train")
    (tmp_path / "hf" / "train" / "cat" / "0.png").unlink()
    for i, (name, reason) in enumerate([("ant", "Pillow|truncated|broken"), ("bee", "empty"), ("cat", "No such file")]):
        with pytest.raises(BadImage, match=reason):
            source[i]
        assert source.where(i).startswith(f"{tmp_path}/hf/train/{name}/0.png (image {i} of hf:")
    rows = {"image": [None, {"bytes": PNG[:40], "path": None}], "label": [0, 1]}
    source = open_source(save(tmp_path / "rows", rows, hf_table(rows).features), "data.train")
    with pytest.raises(BadImage, match="empty"):
        source[0]
    with pytest.raises(BadImage):
        source[1]
    assert source.where(0).startswith("image 0 of hf:")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets. pip install 'scalekd[hf]'" in refused(f"hf:{tmp_path}")


# ---------------------------------------------------------------- --data and --val


def words(*options: object) -> list[str]:
    return recipe_overrides(parse(["train", "demo", *map(str, options)]))


def test_one_name_for_both_splits(image_folder, tmp_path):
    assert words("--data", "fashion-mnist") == ['data.train="fashion-mnist:train"', 'data.val="fashion-mnist:test"']
    cifar = ["torchvision:CIFAR100:train:/data", "torchvision:CIFAR100:test:/data"]
    assert words("--data", "torchvision:CIFAR100:/data") == [f'data.train="{cifar[0]}"', f'data.val="{cifar[1]}"']
    splits = make_hf_splits(image_folder / "train", tmp_path).removesuffix(":train")
    assert words("--data", splits) == [f'data.train="{splits}:train"', f'data.val="{splits}:test"']
    (tmp_path / "parquet").mkdir()
    make_hf_parquet(image_folder / "train", tmp_path / "parquet")
    assert words("--data", f"hf:{tmp_path}/parquet")[1] == f'data.val="hf:{tmp_path}/parquet:validation"'


@pytest.mark.parametrize("text", ["tar:a.tar", "wds:a-{0..9}.tar", "torchvision:CIFAR100:train:/data", "hf:/nowhere"])
def test_a_source_of_its_own_holds_some_out(text):
    assert words("--data", text) == [f'data.train="{text}"', "data.val=null"]
    assert words("--data", text, "--val", "tar:b.tar")[-1] == 'data.val="tar:b.tar"'


def test_a_run_on_archives(cli, recipe_file, image_folder, tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    train, val = (make_tar(image_folder / name, tmp_path / name) for name in ("train", "val"))
    given = ["--data", train, "--val", val, "train.epochs=1", "losses={ce: {}, kd: {}}"]
    assert cli("train", recipe_file, "--out", tmp_path / "run", *given).code == 0
    told = cli("evaluate", tmp_path / "run", "--data", val, "--json").out
    assert json.loads(told)["images"] == 13
    shards = make_shards(image_folder / "val", tmp_path)
    result = cli("evaluate", tmp_path / "run", "--data", shards)
    assert result.code == 2 and "`--data` has other classes than the student: 0, 1, 2" in result.err
