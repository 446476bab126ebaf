"""Boxes, masks and both formats of the scenes, against what the pictures themselves show."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalekd.common.errors import UserError
from scalekd.transfer.synthetic_scenes import Options, main, make_scenes, run_lengths, tight_box

EMBEDDED = ("fashion-mnist:train", "fashion-mnist:test")
OPTIONS = Options(size=64, items=(3, 6), background="textured", rgb=True)


def unpacked(rle: dict) -> np.ndarray:
    """COCO's definition, run by run."""
    height, width = rle["size"]
    flat, value = [], 0
    for count in rle["counts"]:
        flat += [value] * count
        value = 1 - value
    return np.array(flat).reshape(width, height).T


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "rgb"
    make_scenes(out, *EMBEDDED, train=24, val=6, options=OPTIONS)
    return out


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def by_image(coco: dict) -> list[tuple[dict, list[dict]]]:
    return [(image, [a for a in coco["annotations"] if a["image_id"] == image["id"]]) for image in coco["images"]]


@pytest.mark.parametrize("part, long", [("train", "training"), ("val", "validation")])
def test_boxes_are_tight_and_the_formats_agree_pixel_by_pixel(scenes, part, long):
    coco = json.loads((scenes / f"instances_{part}.json").read_text())
    assert len(coco["annotations"]) > 2 * len(coco["images"])
    for image, marked in by_image(coco):
        masks = [unpacked(a["segmentation"]) for a in marked]
        values = np.zeros((64, 64), np.uint8)
        for a, mask in zip(marked, masks):
            ys, xs = np.nonzero(mask)
            assert a["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            assert a["area"] == mask.sum() and a["iscrowd"] == 0
            values[mask == 1] = a["category_id"]
        assert np.sum(masks, axis=0).max() == 1  # nothing belongs to two items: what is covered is not in a mask
        file = image["file_name"].removeprefix(f"{long}/")
        assert np.array_equal(pixels(scenes / "annotations" / long / file), values)
        assert pixels(scenes / "images" / image["file_name"]).shape == (image["height"], image["width"], 3)
    ids = [a["id"] for a in coco["annotations"]]
    assert len(set(ids)) == len(ids)
    names = (scenes / "classes.txt").read_text().splitlines()
    assert [c["name"] for c in coco["categories"]] == names and [c["id"] for c in coco["categories"]] == [*range(1, 11)]


def test_items_overlap_in_three_sizes_and_none_is_hidden(scenes):
    coco = json.loads((scenes / "instances_train.json").read_text())
    sizes = np.array([max(a["bbox"][2:]) for a in coco["annotations"]])
    assert (sizes <= 14).any() and ((sizes > 14) & (sizes <= 28)).any() and (sizes > 28).any() and sizes.max() <= 56
    pairs = 0
    for _, marked in by_image(coco):
        boxes = [np.array([*a["bbox"][:2], *np.add(a["bbox"][:2], a["bbox"][2:])]) for a in marked]
        pairs += sum(
            bool((np.minimum(p[2:], q[2:]) > np.maximum(p[:2], q[:2])).all())
            for i, p in enumerate(boxes)
            for q in boxes[:i]
        )
    assert pairs > 10
    assert min(a["area"] for a in coco["annotations"]) > 4


def test_what_is_seen_is_the_item_itself(tmp_path):
    # one item a scene, unscaled, grey: under the mask stand the source's own pixels
    make_scenes(tmp_path / "one", *EMBEDDED, train=3, val=1, options=Options(size=40, items=(1, 1), scales=(1.0,)))
    from scalekd.data.sources.open import open_source

    source = open_source(EMBEDDED[0], "x")
    for image, (a,) in by_image(json.loads((tmp_path / "one" / "instances_train.json").read_text())):
        scene, mask = pixels(tmp_path / "one" / "images" / image["file_name"]), unpacked(a["segmentation"])
        item, target = source[a["item"]]
        assert a["category_id"] == target + 1
        x, y, w, h = a["bbox"]
        seen, own = scene[y : y + h, x : x + w], np.asarray(item)
        part = mask[y : y + h, x : x + w] == 1
        places = [(i, j) for i in range(29 - h) for j in range(29 - w)]
        assert any(np.array_equal(own[i : i + h, j : j + w][part], seen[part]) for i, j in places)
        assert len(np.unique(scene[mask == 0])) == 1  # a plain background


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(scenes, tmp_path):
    make_scenes(tmp_path / "again", *EMBEDDED, train=24, val=6, options=OPTIONS)
    files = sorted(p.relative_to(scenes) for p in scenes.rglob("*") if p.is_file())
    assert len(files) == 2 * 30 + 5
    assert all((scenes / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    make_scenes(tmp_path / "other", *EMBEDDED, train=1, val=1, options=Options(64, (3, 6), seed=1))
    image = Path("images/training/000000.png")
    assert (scenes / image).read_bytes() != (tmp_path / "other" / image).read_bytes()


def write_idx(prefix: Path, images: np.ndarray, labels: np.ndarray) -> str:
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        with gzip.open(f"{prefix}-{kind}-ubyte.gz", "wb") as file:
            file.write(header + array.astype(np.uint8).tobytes())
    return f"idx:{prefix}"


def test_items_of_one_part_are_never_in_the_other(tmp_path):
    labels = np.arange(4) % 2
    shade = {"train": 100, "val": 250}  # every item of a part has its shade
    sources = []
    for part, value in shade.items():
        images = np.zeros((4, 12, 12), np.uint8)
        images[:, 2:10, 3:9] = value
        images[:, 0, 0] = 200  # a speck, which is no part of the item
        sources.append(write_idx(tmp_path / part, images, labels))
    options = Options(size=32, items=(2, 3), scales=(1.0,))
    out = tmp_path / "out"
    make_scenes(out, *sources, train=4, val=4, options=options)
    for part, long in (("train", "training"), ("val", "validation")):
        for i in range(4):
            name = f"{long}/{i:06}.png"
            scene, mask = pixels(out / "images" / name), pixels(out / "annotations" / name)
            assert set(scene[mask > 0]) == {shade[part]}
        coco = json.loads((out / f"instances_{part}.json").read_text())
        assert all(a["bbox"][2:] == [6, 8] for a in coco["annotations"] if a["area"] == 48)
        assert any(a["area"] == 48 for a in coco["annotations"])
    with pytest.raises(UserError, match="choose another source"):
        make_scenes(tmp_path / "same", sources[0], sources[0], 1, 1, options)


def test_run_lengths_start_with_what_is_not_set():
    mask = np.array([[True, False, True], [True, False, False]])
    assert run_lengths(mask) == {"size": [2, 3], "counts": [0, 2, 2, 1, 1]}
    assert tight_box(mask) == [0, 0, 3, 2]
    assert run_lengths(~mask)["counts"] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    "options, told",
    [
        (Options(items=(3, 2)), "fewest before most"),
        (Options(scales=(0.0,)), "above 0"),
        (Options(background="stripes"), "plain or textured"),
    ],
)
def test_options_that_cannot_be_are_told(tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        make_scenes(tmp_path / "x", *EMBEDDED, train=1, val=1, options=options)


def test_the_command(tmp_path, capsys):
    line = [str(tmp_path / "set"), "--train", "2", "--val", "1", "--size", "32"]
    assert main(line) == 0
    assert "items on 2 scenes" in capsys.readouterr().out
    assert main(line) == 2  # the folder is not empty: nothing is mixed with older scenes
    assert "exists already" in capsys.readouterr().err
