"""Every kind of source has the images of the folder it was made from; incomplete or unsafe archives are errors."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from archives import PNG, add, shard, write_tar
from source_makers import (
    CLASSES,
    MAKERS,
    make_hf_parquet,
    make_hf_splits,
    make_shards,
    make_tar,
    refused,
)
from torch.utils.data import DataLoader

from scalekd.cli.app import parse
from scalekd.cli.options import recipe_overrides
from scalekd.common.errors import UserError
from scalekd.data import reading
from scalekd.data.batches import train_batches, training_images
from scalekd.data.images import BadImage
from scalekd.data.options import Augment, Data
from scalekd.data.samplers import TrainSampler
from scalekd.data.sources.open import open_source, pair_of
from scalekd.data.split import open_split

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(params=MAKERS, ids=lambda maker: maker.__name__.removeprefix("make_"))
def made(request, image_folder: Path, tmp_path: Path) -> tuple[str, Path]:
    """A source and the folder it was made from."""
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


def test_an_archive_that_became_shorter(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WAITS", ())
    source = open_source(make_tar(image_folder / "train", tmp_path), "data.train")
    (tmp_path / "photos.tar").write_bytes((tmp_path / "photos.tar").read_bytes()[:5000])
    with pytest.raises(BadImage, match="shorter than when it was opened"):
        source[len(source) - 1]
    (tmp_path / "photos.tar").unlink()
    with pytest.raises(reading.Outage, match="No such file"):  # of all its images, so no image is bad
        source[0]


TRICKS: list[tuple[str, dict[str, object], str]] = [
    ("../../evil.png", {}, "a path that leads outside the archive"),
    ("cat/../../evil.png", {}, "a path that leads outside the archive"),
    ("/tmp/evil.png", {}, "a path that leads outside the archive"),
    ("cat\\..\\evil.png", {}, "a path that leads outside the archive"),
    ("cat/link.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link or a device"),
    ("cat/hard.png", {"type": tarfile.LNKTYPE, "linkname": "../evil"}, "a link or a device"),
    ("cat/pipe.png", {"type": tarfile.FIFOTYPE}, "a link or a device"),
    ("cat/disk.png", {"type": tarfile.BLKTYPE}, "a link or a device"),
    ("cat/holes.png", {"type": tarfile.GNUTYPE_SPARSE}, "a sparse file"),
    ("cat/\x1b[31m\n.png", {"type": tarfile.SYMTYPE}, r"cat/\x1b[31m\n.png in"),
]


@pytest.mark.parametrize("kind", ["tar", "wds"])
@pytest.mark.parametrize("name, header, message", TRICKS, ids=[repr(t[0]) for t in TRICKS])
def test_path_tricks_are_refused_and_write_nothing(tmp_path, kind, name, header, message):
    inside = tmp_path / "a" / "b"
    write_tar(inside / "t.tar", {})
    with tarfile.open(inside / "t.tar", "w") as tar:
        add(tar, "cat/0.png", PNG)
        add(tar, name, b"" if header else PNG, **header)
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(f"{kind}:{inside / 't.tar'}")
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
    message = refused(f"tar:{path}")
    last = f"cat/{cut // 1024 - 1}.png" if cut >= 1024 else "its beginning"
    assert f"after {last}; create or copy it again" in message


def test_a_damaged_header_and_joined_archives(tmp_path):
    path = write_tar(tmp_path / "t.tar", {f"cat/{i}.png": PNG for i in range(3)})
    whole = path.read_bytes()
    path.write_bytes(whole[:1030] + b"x" + whole[1031:])
    assert "has a damaged header after cat/0.png" in refused(f"tar:{path}")
    path.write_bytes(whole + whole)
    assert "has data after its end mark" in refused(f"tar:{path}")


@pytest.mark.parametrize("mode, name", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_archives(tmp_path, mode, name):
    with tarfile.open(tmp_path / "t.tar", mode) as tar:
        add(tar, "cat/0.png", PNG)
    assert f"is compressed ({name})" in refused(f"tar:{tmp_path / 't.tar'}")
    assert "decompress it" in refused(f"wds:{tmp_path / 't.tar'}")


@pytest.mark.parametrize(
    "members, message",
    [
        ({}, "has no images"),
        ({"cat/notes.txt": b""}, "has no images"),
        ({"0.png": PNG}, "0.png in"),
        ({"x/cat/0.png": PNG, "y/cat/0.png": PNG}, "class cat in two folders, x/cat and y/cat"),
        ({"train/cat/0.png": PNG, "val/cat/0.png": PNG}, "mixes the splits train and val: train/cat, val/cat"),
        ({"cat/0.png": PNG, "./cat/0.png": PNG}, "t.tar twice; create the archive again"),
    ],
)
def test_tars_without_clear_classes(tmp_path, members, message):
    assert message in refused(f"tar:{write_tar(tmp_path / 't.tar', members)}")


def test_an_empty_class_folder_in_a_tar(image_folder, tmp_path):
    (image_folder / "train" / "dog\n").mkdir()
    assert r"class folders without images: photos/dog\n. Fill" in refused(make_tar(image_folder / "train", tmp_path))


def test_files_that_are_no_archives(tmp_path):
    (tmp_path / "text.tar").write_text("no archive, but longer than a header is " * 20)
    assert "is damaged or cut off" in refused(f"tar:{tmp_path / 'text.tar'}")
    message = refused(f"tar:{tmp_path / 'txt.tar'}")
    assert "No such file" in message and "Did you mean `text.tar`?" in message
    assert "write tar:" in refused(str(tmp_path / "text.tar"))


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"a": b"0", "b": b"-1"}, "label '-1' of b.png in"),
        ({"a": b"-1", "b": b"0"}, "label '-1' of a.png in"),
        ({"a": b"0", "b": b"0.5"}, "label '0.5' of b.png in"),
        ({"a": b"ant", "b": b"3"}, "label '3' of b.png in"),
        ({"a": b"0", "b": b""}, "label '' of b.png in"),
        ({"a": b"0", "b": b"99999999"}, "label '99999999' of b.png in"),
        ({"a": b"0", "b": b"\xff"}, "label of b in"),
        ({"a": b"0", "b": b"x" * 2000}, "has 2000 bytes, too many for a class"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, message):
    assert message in refused(shard(tmp_path, labels))


def test_classes_txt_names_the_labels_and_bounds_them(tmp_path):
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    source = open_source(shard(tmp_path, {"a": b"2", "b": b"bee\n"}), "data.train")
    assert (source.classes, source.targets) == (CLASSES, [2, 1])
    assert "label '3' of b.png in" in refused(shard(tmp_path, {"a": b"2", "b": b"3"}))
    assert "not one of the 3 classes" in refused(shard(tmp_path, {"a": b"dog"}))
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
    assert "is a stream, which cannot be resumed exactly; copy it to disk" in refused(text)


def test_numbered_classes_of_training_and_validation(tmp_path):
    full, part = (shard(tmp_path, {str(i): b"%d" % i for i in range(n)}, f"{n}.tar") for n in (4, 3))
    assert len(open_split(Data(train=full, val=part)).classes) == 4  # validation lacks the highest
    with pytest.raises(UserError, match=r"3 classes and data.val 4; not in both: 3\."):
        open_split(Data(train=part, val=full))
    with pytest.raises(UserError, match="labels up to 4, but no image of class 1 and 2 others"):
        open_split(Data(train=shard(tmp_path, {"a": b"0", "b": b"4"}), val=full))


# ---------------------------------------------------------------- --data and --val


def words(*options: object) -> list[str]:
    return recipe_overrides(parse(["train", "demo", *map(str, options)]))


def test_one_name_for_both_splits(image_folder, tmp_path):
    assert words("--data", "fashion-mnist") == ['data.train="fashion-mnist:train"', "data.val=null"]
    cifar = 'data.train="torchvision:CIFAR100:train:/data"'
    assert words("--data", "torchvision:CIFAR100:/data") == [cifar, "data.val=null"]  # test chooses no checkpoint
    assert pair_of("torchvision:CIFAR100:/data", test=True)[1] == "torchvision:CIFAR100:test:/data"
    assert words("--data", "torchvision:DTD:/data")[1] == 'data.val="torchvision:DTD:val:/data"'
    splits = make_hf_splits(image_folder / "train", tmp_path).removesuffix(":train")
    assert words("--data", splits) == [f'data.train="{splits}:train"', "data.val=null"]
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
    output = cli("evaluate", tmp_path / "run", "--data", val, "--json").out
    assert json.loads(output)["images"] == 13
    shards = make_shards(image_folder / "val", tmp_path)
    result = cli("evaluate", tmp_path / "run", "--data", shards)
    assert (
        result.code == 2 and "`--data` has other classes than the student: it has 0, 1, 2 and lacks ant" in result.err
    )
