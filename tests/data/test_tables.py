"""Tables of paths and labels: CSV, Parquet and COCO-style JSON as sources, and what is wrong with them."""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_images import write_images

from scalekd.common.errors import UserError
from scalekd.data.batches import Images, load_batch
from scalekd.data.options import Data
from scalekd.data.sources.inputs import open_inputs
from scalekd.data.sources.open import open_source, open_unlabelled, pair_of, parts_of
from scalekd.data.split import by_class, open_split

PATHS = [f"{name}/{i}.png" for name in ("ant", "bee", "cat") for i in range(4)]
NAMES = [path.partition("/")[0] for path in PATHS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, per_class=4)
    return tmp_path


def table(folder: Path, *lines: str, name: str = "labels.csv") -> str:
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def problem_of(text: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_source(text, "data.train", **options)
    assert str(caught.value).startswith("data.train: ")
    return str(caught.value)


def test_a_table_gives_the_images_and_classes_of_class_folders(folder):
    source = open_source(table(folder, "file,label", *(f"{p},{n}" for p, n in zip(PATHS, NAMES))), "data.train")
    known = open_source(str(folder), "data.train")
    assert list(source.classes) == known.classes and list(source.targets) == known.targets
    assert [source.identity(i) for i in range(12)] == [known.identity(i) for i in range(12)]
    assert source[5][0].tobytes() == known[5][0].tobytes()
    assert source.where(1) == f"ant/1.png (row 3 of {folder / 'labels.csv'})"


@pytest.mark.parametrize("kind", ["parquet", "tsv", "semicolons", "coco"])
def test_every_form_of_a_table_gives_the_same(folder, kind):
    plain = open_source(table(folder, "path,label", *(f"{p},{n}" for p, n in zip(PATHS, NAMES))), "data.train")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"path": PATHS, "label": NAMES}), folder / "labels.parquet")
        text = str(folder / "labels.parquet")
    elif kind == "coco":
        text = coco(folder, [[i // 4] for i in range(12)])
    else:
        char = "\t" if kind == "tsv" else ";"
        lines = (
            f"\ufeff{char.join(line)}" if not i else char.join(line)
            for i, line in enumerate([("path", "label"), *zip(PATHS, NAMES)])
        )
        text = table(folder, *lines, name="labels.tsv" if kind == "tsv" else "other.csv")
    source = open_source(text, "data.train")
    assert list(source.classes) == list(plain.classes) and list(source.targets) == list(plain.targets)
    assert source.files == plain.files


def coco(folder: Path, labels: list[list[int]], name: str = "labels.json") -> str:
    content = {
        "images": [{"id": 100 + i, "file_name": path} for i, path in enumerate(PATHS)],
        "annotations": [{"image_id": 100 + i, "category_id": c} for i, row in enumerate(labels) for c in row],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("ant", "bee", "cat"))][::-1],
    }
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


SETS = [(0,), (0, 2), (1,), (1, 2)] * 3
TEXTS = [["ant"], ["ant", "cat"], ["bee"], ["cat", "bee"]] * 3


@pytest.mark.parametrize("kind", ["separator", "long", "columns", "rest", "list", "parquet", "coco"])
def test_sets_of_labels_in_every_form(folder, kind):
    rows, options = [f"{p},{'|'.join(t)}" for p, t in zip(PATHS, TEXTS)], ":separator=pipe"
    if kind == "long":
        rows, options = [f"{p},{t}" for p, row in zip(PATHS, TEXTS) for t in row], ":labels=several"
    if kind == "list":
        rows, options = [f'{p},"{t}"' for p, t in zip(PATHS, TEXTS)], ""
    header = "path,label"
    if kind in ("columns", "rest"):
        header, options = "path,ant,bee,cat", ":label=ant+bee+cat" if kind == "columns" else ":label=rest"
        rows = [f"{p},{','.join(str(int(n in t)) for n in ('ant', 'bee', 'cat'))}" for p, t in zip(PATHS, TEXTS)]
    text = table(folder, header, *rows) + options
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"path": PATHS, "label": TEXTS}), folder / "labels.parquet")
        text = str(folder / "labels.parquet")
    if kind == "coco":
        text = coco(folder, [list(t) for t in SETS])
    source = open_source(text, "data.train")
    assert list(source.classes) == ["ant", "bee", "cat"] and list(source.targets) == SETS


def test_a_batch_of_sets_is_multi_hot(folder):
    source = open_source(
        table(folder, "path,label", *(f"{p},{'|'.join(t)}" for p, t in zip(PATHS, TEXTS))) + ":separator=pipe", "d"
    )
    from torchvision.transforms.functional import pil_to_tensor

    batch = load_batch(Images(source, range(12), pil_to_tensor, None), [(0, 1), (0, 2)])
    assert batch.targets.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_names_indices_and_files_of_classes(folder):
    numbers = table(folder, "path,label", *(f"{p},{n}" for p, n in zip(PATHS, [0, 2, 1, 2] * 3)))
    assert list(open_source(numbers, "d").classes) == ["0", "1", "2"]
    (folder / "names.txt").write_text("wasp\nant\nbee\n")
    named = open_source(f"{numbers}:classes=names.txt", "d")
    assert list(named.classes) == ["wasp", "ant", "bee"] and list(named.targets) == [0, 2, 1, 2] * 3
    text = table(folder, "path,label", *(f"{p},{n}" for p, n in zip(PATHS, ["ant", "bee"] * 6)), name="other.csv")
    assert list(open_source(f"{text}:classes=names.txt", "d").targets) == [1, 2] * 6
    third = table(folder, "path,label", *(f"{p},{n}" for p, n in zip(PATHS, NAMES)), name="third.csv")
    told = problem_of(third, classes=["ants", "bee"])
    assert "labels that are none of the 2 classes (8): row 2 (`ant` Did you mean `ants`?)" in told


def test_columns_root_suffix_and_absolute_paths(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tables")
    lines = [f"{i},{p.removesuffix('.png')},{n}" for i, (p, n) in enumerate(zip(PATHS, NAMES))]
    text = table(elsewhere, "path,photo,kind", *lines)
    source = open_source(f"{text}:path=photo,label=kind,suffix=.png,root={folder}", "d")
    assert source.files == [str(folder / path) for path in PATHS]
    absolute = table(elsewhere, "path,label", *(f"{folder / p},{n}" for p, n in zip(PATHS, NAMES)), name="absolute.csv")
    assert open_source(absolute, "d").files == source.files


def test_a_column_of_splits(folder):
    lines = [f"{p},{n},{'valid' if i % 4 == 3 else 'train'}" for i, (p, n) in enumerate(zip(PATHS, NAMES))]
    text = table(folder, "path,label,split", *lines)
    train, val = pair_of(text) or ("", "")
    assert len(open_source(train, "d")) == 9 and len(open_source(val or "", "d")) == 3
    assert open_source(f"{text}:split=val", "d").files == open_source(val or "", "d").files
    assert "has rows of several splits: train, valid. Name one" in problem_of(text)
    assert "no rows of the split `test`" in problem_of(f"{text}:split=test")
    split = open_split(Data(train=train, val=val))
    assert (len(split.train_indices), len(split.val_indices)) == (9, 3)
    assert "images in two splits (1): row 14 (ant/0.png: valid, and train in row 2)" in problem_of(
        table(folder, "path,label,split", *lines, "ant/0.png,ant,valid", name="b.csv") + ":split=train"
    )


def test_validation_has_the_classes_of_training(folder):
    train = table(folder, "path,label", *(f"{p},{n}" for p, n in zip(PATHS[:9], NAMES)))
    val = table(folder, "path,label", "cat/1.png,cat", "cat/2.png,bee", name="val.csv")
    assert open_split(Data(train=train, val=val)).val.targets == [2, 1]
    table(folder, "path,label", "cat/1.png,cat", "cat/2.png,wasp", "cat/3.png,dog", name="val.csv")
    with pytest.raises(
        UserError, match=r"data.val: .*\n  labels that are none of the 3 classes \(2\): row 3 .*, row 4"
    ):
        open_split(Data(train=train, val=val))
    table(folder, "path,label", "ant/1.png,ant", "bee/2.png,bee", name="val.csv")
    with pytest.raises(UserError, match=r"2 of the validation .* ant/1.png \(row 3 of .*bee/2.png \(row 8 of"):
        open_split(Data(train=train, val=val))
    table(folder, "path,label", "cat/1.png,ant|bee", name="val.csv")
    with pytest.raises(UserError, match=r"data.val has several labels per image and data.train one"):
        open_split(Data(train=train, val=f"{val}:separator=pipe"))


def test_all_problems_are_told_together_with_their_rows(folder):
    text = table(
        folder, "path,label", "ant/0.png,ant", ",ant", "ant/0.png,bee", "ant/9.png,bee", "ant/1.png,", "bee/1.png,bee,cat",
        "./ant/0.png,bee", *(f"no/{i}.png,bee" for i in range(20)),
    )  # fmt: skip
    problem = problem_of(text)
    assert "rows with another number of columns than the header's 2 (1): row 7 (3)" in problem
    assert "rows without a path (1): row 3" in problem
    assert (
        "labels=several joins the rows of an image (2)" in problem
        and "row 4 (ant/0.png, first in row 2), row 8 (./ant/0.png" in problem
    )
    assert "another folder (21): row 5 (ant/9.png), row 9 (no/0.png)" in problem
    assert problem.count("no/") == 9 and "and 11 others" in problem
    assert "images without a label (1): row 6 (ant/1.png)" in problem


def parquet(folder: Path, **columns: list) -> str:
    count = len(next(iter(columns.values())))
    pyarrow.parquet.write_table(pyarrow.table({"path": PATHS[:count]} | columns), folder / "labels.parquet")
    return str(folder / "labels.parquet")


def test_numbers_that_name_other_classes_are_no_indices(folder):
    """`1` is the name of class 0: with `0` as a typing error, `2` and `3` both became class 2."""
    (folder / "names.txt").write_text("1\n2\n3\n")
    text = table(folder, "path,label", *(f"{p},{n}" for p, n in zip(PATHS, (1, 2, 3, 0))))
    assert "labels that are none of the 3 classes (1): row 5 (`0`)" in problem_of(f"{text}:classes=names.txt")
    table(folder, "path,label", *(f"{p},{n}" for p, n in zip(PATHS, (1, 2, 3, 3))))
    assert list(open_source(f"{text}:classes=names.txt", "d").targets) == [0, 1, 2, 2]
    ten = sorted(map(str, range(1, 11)))  # the folders of a data set: 1, 10, 2, ...
    table(folder, "path,label", *(f"{p},{n}" for p, n in zip(PATHS, range(10))))
    assert "none of the 10 classes (1): row 2 (`0`" in problem_of(text, classes=ten)
    table(folder, "path,label", *(f"{p},{n:02}" for p, n in zip(PATHS, range(12))))
    assert list(open_source(text, "d").targets) == list(range(12))


@pytest.mark.parametrize("kind", ["list", "parquet", "columns", "coco"])
def test_one_label_in_every_form_of_a_set(folder, kind):
    one, two = [["ant"], ["bee"], ["ant"]], [["ant"], ["bee", "ant"], ["ant"]]

    def text(rows: list[list[str]]) -> str:
        if kind == "parquet":
            return parquet(folder, label=rows)
        if kind == "coco":
            return coco(folder, [[("ant", "bee", "cat").index(name) for name in row] for row in rows] + [[0]] * 9)
        if kind == "list":
            return table(folder, "path,label", *(f'{p},"{row}"' for p, row in zip(PATHS, rows)))
        lines = [f"{p},{int('ant' in row)},{int('bee' in row)}" for p, row in zip(PATHS, rows)]
        return table(folder, "path,ant,bee", *lines) + ":label=rest"

    option = ",labels=one" if kind == "columns" else ":labels=one"
    assert list(open_source(text(one) + option, "d").targets)[:3] == [0, 1, 0]
    assert "images with several labels, and `labels=one` is set (1)" in problem_of(text(two) + option)


def test_options_that_a_table_cannot_use(folder):
    lists = parquet(folder, label=[["ant"], ["bee"]])
    assert "has lists of labels, which `separator` does not apply to" in problem_of(f"{lists}:separator=pipe")
    columns = table(folder, "path,ant,bee", "ant/0.png,1,0", "bee/0.png,0,1")
    assert "has a column for each class, which `separator`" in problem_of(f"{columns}:label=rest,separator=pipe")
    single = table(folder, "path,label", "ant/0.png,ant", "bee/0.png,bee")
    assert "`empty=keep` is for sets of labels" in problem_of(f"{single}:empty=keep")


def test_rows_of_an_image_are_joined_although_a_cell_has_several_labels(folder):
    text = table(folder, "path,label", "ant/0.png,ant|bee", "bee/0.png,bee", "ant/0.png,cat") + ":separator=pipe"
    assert list(open_source(f"{text},labels=several", "d").targets) == [(0, 1, 2), (1,)]
    assert "labels=several joins the rows of an image (1): row 4" in problem_of(text)


def test_lists_without_a_name_or_with_something_else(folder):
    source = open_source(parquet(folder, label=[["ant", None], ["bee", ""], ["ant"]]), "d")
    assert list(source.classes) == ["ant", "bee"] and list(source.targets) == [(0,), (1,), (0,)]
    source = open_source(table(folder, "path,label", "ant/0.png,\"['ant', None]\"", "bee/0.png,[7]"), "d")
    assert list(source.classes) == ["7", "ant"] and list(source.targets) == [(1,), (0,)]
    days = [[date(2020, 1, 2)], [date(2020, 1, 3)]]
    assert "rows whose label is no list of names (2): row 1 ([datetime.date(2020, 1, 2)])" in problem_of(
        parquet(folder, label=days)
    )


def test_a_column_of_splits_of_another_type(folder):
    text = parquet(folder, label=["ant", "bee"], when=[[1], [2]])
    assert parts_of(f"{text}:splits=when") == {}
    assert "has rows of several splits: ['1'], ['2']" in problem_of(f"{text}:splits=when")


def test_empty_sets_are_kept_if_asked_for(folder):
    text = table(folder, "path,label", "ant/0.png,ant|bee", "ant/1.png,", "ant/2.png,bee") + ":separator=pipe"
    assert "row 3 (ant/1.png)" in problem_of(text) and "empty=keep" in problem_of(text)
    assert list(open_source(f"{text},empty=keep", "d").targets) == [(0, 1), (), (1,)]


def test_sets_without_a_separator_are_noticed(folder):
    lines = ["path,label", "ant/0.png,ant", "ant/1.png,ant;bee", "ant/2.png,bee", 'ant/3.png,"bee, or ant"']
    problem = problem_of(table(folder, *lines))
    assert "write separator=semicolon if they are sets (1): row 3" in problem and "row 3" in problem
    assert "row 3 (ant;bee)" in problem_of(table(folder, *lines) + ":separator=pipe")


@pytest.mark.parametrize(
    "lines, options, told",
    [
        (["photo,label", "a,b"], "", "has no column that is named as a path: photo, label. Name the column: csv:"),
        (["path,image,label", "a,b,c"], "", "may hold the path in several columns: path, image"),
        (["path,label", "a,b"], ":label=lable", "has no column `lable` (label). Did you mean `label`?"),
        (["path,label", "a,b"], ":lable=label", "no option `lable` of a csv file. Did you mean `label`"),
        (["path,label", "a,b"], ":labels=some,label=", "labels=some: write one or several\ndata.train"),
        (["path,label", "a,b"], ":root=/no/such", "root: no folder /no/such"),
        (["path,label", "a,b"], ":separator=pipe,labels=one", "contradict"),
        (["path,path", "a,b"], "", "two columns named `path`"),
        (["path,label"], "", "has no rows below its header"),
        (['path,label', '"a,b'], "", "is not a table"),
        (["path,label", "ant/0.png,2", "ant/1.png,7"], ":classes=names.txt", "cannot read"),
    ],
)  # fmt: skip
def test_wrong_columns_and_options(folder, lines, options, told):
    assert told in problem_of(table(folder, *lines) + options)


def test_missing_and_unreadable_tables(folder):
    table(folder, "path,label", "ant/0.png,ant")
    assert "Did you mean `labels.csv`" in problem_of(str(folder / "label.csv"))
    (folder / "labels.csv").write_bytes(b"path,label\nant/0.png,\xff\xfe\n")
    assert "is not UTF-8" in problem_of(str(folder / "labels.csv"))
    (folder / "labels.parquet").write_text("no")
    assert "is not a Parquet file" in problem_of(str(folder / "labels.parquet"))
    (folder / "labels.json").write_text("{}")
    assert "has no list `images`" in problem_of(str(folder / "labels.json"))


def test_coco_entries_that_do_not_fit(folder):
    text = coco(folder, [[i // 4] for i in range(11)] + [[]])
    content = json.loads(Path(text).read_text())
    content["annotations"] += [{"image_id": 5, "category_id": 0}, {"image_id": 100, "category_id": 9}]
    Path(text).write_text(json.dumps(content))
    problem = problem_of(text)
    assert "annotation 12 (image_id 5), annotation 13 (category_id 9)" in problem
    assert "images without a label (1): image 12 (cat/3.png)" in problem


def test_coco_entries_without_ids_and_with_equal_ones(folder):
    def told(**lists: list) -> str:
        content = {
            "images": [{"id": 1, "file_name": "ant/0.png"}, {"id": 2, "file_name": "bee/0.png"}],
            "annotations": [{"image_id": 1, "category_id": 0}, {"image_id": 2, "category_id": 1}],
            "categories": [{"id": 0, "name": "ant"}, {"id": 1, "name": "bee"}],
        }
        (folder / "labels.json").write_text(json.dumps(content | lists))
        return problem_of(str(folder / "labels.json"))

    assert (
        "entries in `annotations` without a number or a text as image_id and category_id: {'category_id': 1}"
        in told(annotations=[{"category_id": 1}])
    )
    assert "entries in `categories` without a number or a text as id: {'name': 'bee'}" in told(
        categories=[{"id": 0, "name": "ant"}, {"name": "bee"}]
    )
    assert (
        "categories with an id that another category has (2): category 1 (id 0: ant), category 2 (id 0: bee)"
        in told(categories=[{"id": 0, "name": "ant"}, {"id": 0, "name": "bee"}])
    )
    assert "categories without a name of their own (1): category 1 (id 0)" in told(
        categories=[{"id": 0, "name": ["ant"]}, {"id": 1, "name": "bee"}]
    )
    (folder / "labels.json").write_text(json.dumps({"images": [{"file_name": p} for p in PATHS]}))
    assert len(open_unlabelled(str(folder / "labels.json"), "data.unlabelled")) == len(PATHS)


def test_a_table_without_its_labels(folder):
    text = table(folder, "path,label", "ant/0.png,ant", "ant/0.png,bee", "ant/1.png,bee")
    for source in (open_unlabelled(text, "data.unlabelled"), open_inputs([text])):
        assert [source.where(i) for i in range(len(source))] == ["ant/0.png", "ant/1.png"] and source.targets == [
            -1,
            -1,
        ]


def test_the_held_out_images_have_all_classes_however_rare(folder):
    sets = [(0,)] * 90 + [(0, 1)] * 8 + [(0, 1, 2)] * 2
    order = by_class(sets, 0)
    assert sorted(order) == list(range(100))
    first = [sets[i] for i in order[:6]]
    assert {label for row in first for label in row} == {0, 1, 2}
    assert sum(row == (0, 1, 2) for row in first) == 2  # both, since every class has its turn


def test_parquet_without_pyarrow_names_the_install_line(folder, monkeypatch):
    (folder / "labels.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'scalekd[hf]'" in problem_of(str(folder / "labels.parquet"))
