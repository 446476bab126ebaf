"""Splits, hidden files, links, copies: what a source takes and leaves out, and what the commands say about it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from archives import PNG, write_tar
from PIL import Image
from source_makers import refused
from whole_runs import changed

from scalekd.common.errors import UserError
from scalekd.data import overlap
from scalekd.data.description import lines_of
from scalekd.data.images import EXTENSIONS, BadImage, decode, decode_size, decode_values
from scalekd.data.options import Augment, Data
from scalekd.data.sources.names import split_of
from scalekd.data.sources.open import open_source, open_unlabelled, pair_of
from scalekd.data.split import class_difference, open_split
from scalekd.data.transforms import eval_transform


def opened(folder: Path, **more: object) -> dict:
    """The description of a split."""
    return dict(open_split(Data.model_validate({"train": str(folder)} | more)).described)


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "name",
    ["train", "Training", "VALID", "val", "validation", "dev", "test", "testing", "Eval", "train_images", "val2017"],
)
def test_a_folder_named_as_a_split_is_no_class(image_folder, name):
    assert split_of(name)
    (image_folder / "val").rename(image_folder / "other")
    (image_folder / "train").rename(image_folder / name)
    message = refused(str(image_folder))
    assert "has folders named as splits, not as classes" in message and f"{image_folder}/{name}" in message


def test_names_of_splits_and_of_classes():
    names = ["trainset", "images-val", "Test Data", "test_split", "imgs_train", "dev-set", "evaluation"]
    assert [split_of(name) for name in names] == ["train", "val", "test", "test", "train", "val", "val"]
    assert not any(
        map(split_of, ["bullet train", "test_tube", "train station", "trainer", "valley", "data", "img2017"])
    )


def test_eval_validates_if_there_is_no_val(image_folder):
    shutil.copytree(image_folder / "val", image_folder / "eval")
    assert pair_of(str(image_folder)) == (f"{image_folder}/train", f"{image_folder}/val")
    shutil.rmtree(image_folder / "val")
    assert pair_of(str(image_folder)) == (f"{image_folder}/train", f"{image_folder}/eval")


def test_valid_is_found_and_test_never_chooses(image_folder):
    (image_folder / "val").rename(image_folder / "valid")
    shutil.copytree(image_folder / "valid", image_folder / "test")
    assert pair_of(str(image_folder)) == (f"{image_folder}/train", f"{image_folder}/valid")
    shutil.rmtree(image_folder / "valid")
    assert pair_of(str(image_folder)) == (f"{image_folder}/train", None)
    assert pair_of(str(image_folder), test=True) == (f"{image_folder}/train", f"{image_folder}/test")
    assert "test images must not choose the checkpoint" in opened(image_folder / "train")["validation"]["chosen"]


def test_the_fix_of_a_folder_of_splits_works(image_folder):
    (image_folder / "val").rename(image_folder / "valid")
    fix = f"Set data.train to {image_folder}/train and data.val to {image_folder}/valid"
    assert fix in refused(str(image_folder))
    assert open_split(Data(train=f"{image_folder}/train", val=f"{image_folder}/valid")).labelled == 24


def test_one_folder_too_high_and_a_single_class(image_folder):
    with pytest.raises(UserError, match=r"has a single class, images: nothing can be learned.* such as .*/images$"):
        open_split(Data(train=str(image_folder.parent)))
    for name in ("ant", "bee"):
        shutil.rmtree(image_folder / "train" / name)
    with pytest.raises(UserError, match="single class, cat"):
        open_split(Data(train=str(image_folder / "train")))


def test_classes_that_mix_splits_are_refused(image_folder, tmp_path):
    for name in ("ant", "bee"):
        for part in ("train", "val"):
            (tmp_path / "by-class" / name).mkdir(parents=True, exist_ok=True)
            shutil.copytree(image_folder / part / name, tmp_path / "by-class" / name / part)
    assert "mixes the splits train and val: ant/train, ant/val" in refused(str(tmp_path / "by-class"))
    for name in ("train", "val"):
        write_tar(tmp_path / f"set-{name}-0.tar", {"0.png": PNG, "0.cls": b"0", "1.png": PNG, "1.cls": b"1"})
    assert "mixes the splits" in refused(f"wds:{tmp_path}/set-*.tar")
    write_tar(tmp_path / "a.tar", {"x/train/0.png": PNG, "x/valid/0.png": PNG})
    assert "mixes the splits train and val" in refused(f"tar:{tmp_path}/a.tar")
    write_tar(tmp_path / "b.tar", {"train/0.png": PNG, "cat/0.png": PNG})
    assert "has a class named train" in refused(f"tar:{tmp_path}/b.tar")


def test_a_class_may_be_called_train_among_others(image_folder):
    (image_folder / "train" / "ant").rename(image_folder / "train" / "train")  # a vehicle, as in CIFAR-100
    assert open_source(str(image_folder / "train"), "data.train").classes == ["bee", "cat", "train"]
    assert pair_of(str(image_folder / "train")) is None


# ---------------------------------------------------------------- what is left out


def test_hidden_and_system_paths_are_left_out_and_counted(image_folder, tmp_path):
    train = image_folder / "train"
    image = (train / "ant" / "0.png").read_bytes()
    for name in (".ipynb_checkpoints/0.png", "ant/@eaDir/0.png", "__MACOSX/ant/0.png", "ant/.hidden/0.png"):
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        (train / name).write_bytes(image)
    (train / "ant" / "notes.txt").write_text("text")
    source = open_source(str(train), "data.train")
    assert source.classes == ["ant", "bee", "cat"] and len(source) == 24
    assert source.left_out["hidden or system files"]["count"] == 4
    assert source.left_out["files without an image extension"] == {"count": 1, "example": "ant/notes.txt"}
    members = {f"{name}/{i}.png": PNG + bytes([i]) for name in ("a", "b", "__MACOSX", "a/@eaDir") for i in range(3)}
    tar = open_source(f"tar:{write_tar(tmp_path / 't.tar', members)}", "data.train")
    assert tar.classes == ["a", "b"] and tar.left_out["hidden or system files"]["count"] == 6
    labelled = {
        f"{f}{i}.{e}": PNG if e == "png" else b"1" for f in ("", ".x/") for i in range(3) for e in ("png", "cls")
    }
    shards = open_source(f"wds:{write_tar(tmp_path / 's.tar', labelled)}", "data.train")
    assert len(shards) == 3 and shards.left_out["hidden or system files"]["count"] == 6
    assert len(open_unlabelled(f"tar:{tmp_path / 't.tar'}", "data.unlabelled")) == 6


def test_keys_of_webdataset_end_at_the_first_dot(tmp_path):
    both = {"a.png": PNG, "a.cls": b"0", "a.mask.png": PNG, "b.png": PNG, "b.cls": b"1"}
    source = open_source(f"wds:{write_tar(tmp_path / 'a.tar', both)}", "data.train")
    ((reason, left),) = source.left_out.items()
    assert len(source) == 2 and "first dot" in reason and left == {"count": 1, "example": "a.mask.png"}
    dotted = both | {"b.1.png": PNG, "b.1.cls": b"0"}
    message = refused(f"wds:{write_tar(tmp_path / 'b.tar', dotted)}")
    assert "b.1.cls" in message and "keys without dots" in message


def test_linked_folders_are_read_once_and_cycles_end(image_folder):
    train = image_folder / "train"
    (train / "ant").rename(image_folder / "elsewhere")
    (train / "ant").mkdir()
    (train / "ant" / "more").symlink_to(image_folder / "elsewhere")
    (train / "bee" / "self").symlink_to(train / "bee")
    (train / "bee" / "up").symlink_to("..")
    source = open_source(str(train), "data.train")
    assert source.targets.count(0) == 8 and source.targets.count(2) == 8
    assert source.left_out["links to folders that were read already"]["count"] >= 1


# formats that Pillow hands to other programs, cannot decode to pixels by itself, or that are containers of other things
OTHERS = {".eps", ".ps", ".wmf", ".emf", ".mpg", ".mpeg", ".bufr", ".grib", ".h5", ".hdf", ".iim"}


def test_every_extension_that_the_decoder_reads_counts():
    Image.init()
    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert {".jfif", ".avif"} <= set(EXTENSIONS) and readable - OTHERS <= set(EXTENSIONS)


# ---------------------------------------------------------------- training images in validation


def test_the_same_files_are_refused(image_folder, tmp_path):
    train = str(image_folder / "train")
    (tmp_path / "link").symlink_to(image_folder / "train")
    for val in (train, str(tmp_path / "link")):
        with pytest.raises(UserError, match="24 of the validation images are also training images, such as "):
            open_split(Data(train=train, val=val))


def test_copies_are_left_out_of_validation_or_refused(image_folder, monkeypatch):
    train, val = image_folder / "train", image_folder / "val"
    data = Data(train=str(train), val=str(val))
    shutil.copy(train / "ant" / "3.png", val / "bee" / "0.png")
    split = open_split(data)
    assert len(split.val_indices) == 11 and split.labelled == 24
    assert any("1 duplicates of training images" in line for line in lines_of(split.described))
    for i in range(4):
        os.remove(val / "ant" / f"{i}.png")
        os.symlink(train / "ant" / f"{i}.png", val / "ant" / f"{i}.png")
    with pytest.raises(UserError, match=r"5 of 12 validation images are copies of training images: .*/val/ant/0.png"):
        open_split(data)
    assert len(open_split(data, strict=False).val_indices) == 12  # a report on a run that was trained so
    monkeypatch.setattr(overlap, "MOST_BYTES", 0)
    assert len(open_split(data).val_indices) == 12


def test_equal_damaged_files_are_no_copies(image_folder):
    for part in ("train", "val"):
        for i in range(4):
            (image_folder / part / "ant" / f"{i}.png").write_bytes(b"")
    assert len(open_split(Data(train=f"{image_folder}/train", val=f"{image_folder}/val")).val_indices) == 12


# ---------------------------------------------------------------- the description


def test_the_description_says_what_is_used(image_folder):
    os.remove(image_folder / "train" / "cat" / "0.png")
    found = opened(image_folder / "train", val=str(image_folder / "val"), limit=20)
    assert found["training"] == {
        "images": 20, "from": f"{image_folder}/train", "chosen": "20 by data.limit, seed 0", "left_out": {}
    }  # fmt: skip
    assert found["validation"]["images"] == 12 and found["validation"]["chosen"] == "data.val"
    assert found["classes"]["count"] == 3 and found["classes"]["first"] == ["ant", "bee", "cat"]
    assert found["classes"]["smallest"]["images"] + found["classes"]["largest"]["images"] <= 20
    assert lines_of(found)[2].startswith("3 classes: ant, bee, cat; smallest ")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("ant bee cow", "it has cow and lacks cat"),
        ("ant bee", "it lacks cat"),
        ("ant bee cat dog", "it has dog"),
        ("bee ant cat", "it has them in another order"),
        ("f e d c b a", "it has f, e, d, c and 2 more and lacks ant, bee, cat"),
    ],
)
def test_the_difference_of_classes(other, told):
    assert class_difference(["ant", "bee", "cat"], other.split()) == told


def test_commands_print_and_keep_the_description(cli, light_recipe, image_folder, tmp_path):
    (image_folder / "train" / "ant" / "notes.txt").write_text("text")
    recipe = tmp_path / "light.yaml"
    recipe.write_text(json.dumps(changed(light_recipe, train={"epochs": 1})))
    shown = cli("train", recipe, "--out", tmp_path / "run", "--no-preflight")
    assert shown.code == 0, shown.err
    lines = (
        f"training: 24 images from {image_folder}/train",
        f"validation: 12 images from {image_folder}/val (data.val)",
        "3 classes: ant, bee, cat; 8 images each",
        "left out of training: 1 files without an image extension, such as ant/notes.txt",
    )
    assert all(line in shown.out for line in lines), shown.out
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())["data_description"]
    assert kept["training"]["left_out"]["files without an image extension"]["count"] == 1
    planned = cli("plan", recipe)
    assert all(line in planned.out for line in lines), planned.out
    told = json.loads(cli("plan", recipe, "--json").out)["runs"][0]["data_description"]
    assert told == kept
    evaluated = cli("evaluate", tmp_path / "run", "--data", image_folder / "val")
    assert f"validation: 12 images from {image_folder}/val" in evaluated.out
    found = json.loads(cli("evaluate", tmp_path / "run", "--data", image_folder / "val", "--json").out)
    assert found["data_description"]["classes"]["count"] == 3
    several = cli("evaluate", tmp_path / "run", "--data", image_folder)
    assert several.code == 2 and f"has several splits; name one of them, such as {image_folder}/val" in several.err


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
def test_a_data_set_saved_with_a_format_is_read(image_folder, tmp_path, kind):
    data = [(image_folder / "train" / name / "0.png").read_bytes() for name in ("ant", "bee")]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    cells = [{"bytes": image, "path": None} for image in data]
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features)
    rows.with_format(kind).save_to_disk(tmp_path / "hf")
    source = open_source(f"hf:{tmp_path / 'hf'}", "data.train")
    assert source.targets == [0, 1] and source[1][0].tobytes() == decode(data[1]).tobytes()
    assert source.sizes() == [len(image) for image in data]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", ["struct", "binary", "path"])
def test_parquet_of_plain_bytes_with_text_labels(image_folder, tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    files = [image_folder / "train" / name / "0.png" for name in ("bee", "ant")]
    data = [file.read_bytes() for file in files]
    cells = {"struct": [{"bytes": d, "path": "x.png"} for d in data], "binary": data, "path": [str(f) for f in files]}
    (tmp_path / "pq").mkdir()
    parquet.write_table(pyarrow.table({"image": cells[kind], "label": ["bee", "ant"]}), tmp_path / "pq/train.parquet")
    if kind == "path":  # text is an image column only if it is named
        assert "No column holds images" in refused(f"hf:{tmp_path}/pq")
    source = open_source(f"hf:{tmp_path}/pq" + ":train:image,label" * (kind == "path"), "data.train")
    assert source.classes == ["ant", "bee"] and source.targets == [1, 0]
    assert source[0][0].tobytes() == decode(data[0]).tobytes() and source.sizes() == [len(d) for d in data]


# ---------------------------------------------------------------- pixels


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_values_that_do_not_fit_their_type_are_refused():
    eight = np.full((4, 4), 200, np.uint16)
    for values in (eight, eight.astype(np.int32)):
        with pytest.raises(BadImage, match="none is above 200: it holds 8-bit values"):
            decode(encoded(Image.fromarray(values), "TIFF"))
    assert decode(encoded(Image.fromarray(eight * 0), "TIFF")).getextrema() == (0, 0)
    with pytest.raises(BadImage, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_sizes_and_images_are_turned_alike(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    data = encoded(Image.fromarray(values), "PNG", exif=exif)
    image = decode(data)
    assert np.array_equal(np.asarray(image), decode_values(data)) and decode_size(data) == image.size


def test_very_thin_images_are_cheap_and_others_unchanged():
    transform = eval_transform(Data(train="x", image_size=32), Augment())
    noise = np.random.default_rng(0).integers(0, 255, (7, 7 * 32, 3), dtype=np.uint8)
    ordinary = Image.fromarray(noise)
    plain = transform.transforms[-1]
    assert torch.equal(transform(ordinary), plain(ordinary))
    thin = Image.fromarray(np.tile(noise[:2], (1, 100, 1)))
    resized = []
    plain.transforms[0].register_forward_hook(lambda module, args, out: resized.append(out.size))
    assert transform(thin).shape == (3, 32, 32)
    assert max(resized[0]) <= 37 * 33
