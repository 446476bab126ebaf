"""Hugging Face data sets: columns, splits, labels, unreadable images and a missing package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
from archives import CELLS, PNG, save
from source_makers import CLASSES, make_hf_saved, make_hf_splits, refused

from scalekd.data.images import BadImage
from scalekd.data.sources.open import open_source

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.mark.parametrize(
    "label, message", [(-1, "is -1, which is not one of the 3 classes"), (None, "is None"), (3, "is 3")]
)
def test_labels_out_of_range(tmp_path, label, message):
    rows = hf_table({"image": CELLS, "label": [0, label]})
    folder = tmp_path / "hf"
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    described = json.dumps({"info": {"features": hf_features(datasets.ClassLabel(names=CLASSES))}})
    write_described(folder / "train.parquet", described)
    assert f"`label` of image 1 of hf:{folder} {message}" in refused(f"hf:{folder}")


def hf_table(columns: dict[str, list]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features)


def hf_features(label: datasets.ClassLabel) -> dict:
    return datasets.Features({"image": datasets.Image(), "label": label}).to_dict()


def write_described(path: Path, described: str) -> None:
    """Declares the integers in the file as classes, which `datasets` would reject for such values."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    parquet.write_table(table.replace_schema_metadata({"huggingface": described}), path)


def test_which_columns(tmp_path):
    number = datasets.Value("int64")
    two = {"image": datasets.Image(), "mask": datasets.Image(), "fine": number, "labels": number}
    text = save(tmp_path, {"image": CELLS, "mask": CELLS, "fine": [1, 0], "labels": [0, 0]}, two)
    assert "mask (Image), fine (int64), labels (int64). Name them: hf:" in refused(text)
    assert list(open_source(f"{text}::image,labels", "data.train").targets) == [0, 0]
    source = open_source(f"{text}::mask,fine", "data.train")
    assert (source.targets, source.classes, source.where(0)) == (
        [1, 0],
        ["0", "1"],
        f"a.png (image 0 of {text}::mask,fine)",
    )
    assert "has no column `nothing`; it has image" in refused(f"{text}::image,nothing")


def test_splits_of_a_hugging_face_folder(image_folder, tmp_path):
    text = make_hf_splits(image_folder / "train", tmp_path)
    assert "has the splits train, test; choose one, for example hf:" in refused(text.removesuffix(":train"))
    assert "has no split `tset`. Did you mean `test`?" in refused(text.replace(":train", ":tset"))
    saved = make_hf_saved(image_folder / "train", tmp_path)
    assert "It has no splits; omit the split." in refused(f"{saved}:train")
    assert "no folder" in refused(f"hf:{tmp_path}/nowhere")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.parquet").write_text("no parquet")
    assert "datasets cannot read" in refused(f"hf:{tmp_path / 'text'}")


def test_an_image_of_a_hugging_face_folder_that_cannot_be_read(tmp_path):
    for name, data in (("ant", PNG[:40]), ("bee", b""), ("cat", PNG)):
        (tmp_path / "hf" / "train" / name).mkdir(parents=True)
        (tmp_path / "hf" / "train" / name / "0.png").write_bytes(data)
    source = open_source(f"hf:{tmp_path / 'hf'}", "data.train")
    (tmp_path / "hf" / "train" / "cat" / "notes.txt").write_text("an empty folder would be an outage")
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
    assert "needs the package datasets; run pip install 'scalekd[hf]'" in refused(f"hf:{tmp_path}")
