"""COCO annotations: how each problem in them is handled, and decoding of masks."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import GOOD, POLYGON, annotation, opened
from PIL import Image

from scalekd.common.errors import UserError
from scalekd.transfer.detection.box_checks import CONTRADICTING
from scalekd.transfer.detection.coco import Coco, open_coco
from scalekd.transfer.detection.instances import Instance
from scalekd.transfer.detection.masks import mask_of, mask_tools, rle_counts


def with_annotation(folder: Path, **changed: Any) -> Coco:
    """The good ones and one more, of image 3."""
    return opened(folder, annotations=[*GOOD["annotations"], annotation(9, **({"image": 3} | changed))])


# ---------------------------------------------------------------- valid annotations


def test_good_annotations_are_read_and_counted(folder):
    coco = opened(folder)
    assert coco.classes == ["bag", "tie"] and coco.category_ids == [7, 90]
    assert [p.id for p in coco.pictures] == [1, 2, 3] and coco.with_objects() == [0, 1]
    assert coco.pictures[1].instances == [Instance(2, (2, 2, 10, 8), POLYGON, False, 80.0)]
    assert coco.summary() == ["3 images; 1 of them without objects; 2 objects; 2 classes; 0 crowd regions"]


def test_classes_without_objects_stay_and_are_counted(folder):
    coco = opened(folder, categories=[*GOOD["categories"], {"id": 8, "name": "cap"}])
    assert coco.classes == ["bag", "cap", "tie"]
    assert "3 classes, 1 of them without objects" in coco.summary()[0]


def test_text_ids_of_images(folder):
    images = [i | {"id": f"x{i['id']}"} for i in GOOD["images"]]
    coco = opened(folder, images=images, annotations=[annotation(1, image="x2")])
    assert [len(p.instances) for p in coco.pictures] == [0, 1, 0]


# ---------------------------------------------------------------- annotations that are skipped or corrected


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"bbox": (50, 2, 5, 5)}, "boxes entirely outside their image, skipped"),
        ({"bbox": (-9, 2, 9, 5)}, "boxes entirely outside their image, skipped"),
        ({"bbox": (2, 2, 0, 5)}, "boxes without area, skipped"),
        ({"bbox": (2, 2, 5, -1)}, "boxes without area, skipped"),
        ({"bbox": (39.95, 2, 5, 5)}, "boxes with a side below 0.1 pixels within their image, skipped"),
        ({"bbox": (2, 2, 5)}, "annotations without a box of four numbers, skipped"),
        ({"bbox": None}, "annotations without a box of four numbers, skipped"),
        ({"bbox": (2, 2, float("nan"), 5)}, "annotations without a box of four numbers, skipped"),
        ({"bbox": (2, 2, 10**400, 5)}, "annotations without a box of four numbers, skipped"),
        ({"category": 8}, "annotations with an unknown category id (known: 7, 90, ...), skipped"),
        ({"category": [7]}, "annotations with an unknown category id (known: 7, 90, ...), skipped"),
        ({"image": 4}, "annotations with an unknown image id, skipped"),
        ({"image": None}, "annotations with an unknown image id, skipped"),
        ({"segmentation": []}, "annotations whose polygons are empty or malformed, skipped"),
        ({"segmentation": [[1, 1, 5, 5]]}, "annotations whose polygons are empty or malformed, skipped"),
        ({"segmentation": [[1, 1, 5, 5, 5, 1, 3]]}, "annotations whose polygons are empty or malformed, skipped"),
        ({"segmentation": [[1, 1, 5, 5, 1e12, 1]]}, "annotations whose polygons are empty or malformed, skipped"),
        ({"segmentation": None}, "annotations without a segmentation, skipped"),
        (
            {"segmentation": {"size": [20, 40], "counts": [1, 2]}},
            "annotations whose RLE does not cover their image exactly, skipped",
        ),
        (
            {"segmentation": {"size": [20, 40], "counts": "~~~"}},
            "annotations whose RLE does not cover their image exactly, skipped",
        ),
        (
            {"segmentation": {"size": [40, 20], "counts": [700, 100]}},
            "annotations whose RLE has another size than their image, skipped",
        ),
        ({"segmentation": {"size": [20, 40], "counts": [800]}}, "annotations whose RLE is empty, skipped"),
        ({"iscrowd": 2}, "annotations whose iscrowd is neither 0 nor 1, skipped"),
    ],
)
def test_unusable_annotations_are_skipped(folder, changed, problem):
    coco = with_annotation(folder, **changed)
    assert [len(p.instances) for p in coco.pictures] == [1, 1, 0]
    assert list(coco.problems) == [problem]
    assert coco.summary()[1].startswith(f"{problem}: 1 (annotation 9")


def test_boxes_partly_outside_are_clipped(folder):
    coco = with_annotation(folder, bbox=(-5, 12, 20, 30), segmentation=[[-5, 12, 15, 12, 15, 42, -5, 42]])
    assert coco.pictures[2].instances[0].box == (0, 12, 15, 8)
    assert coco.summary()[1] == "boxes partly outside their image, clipped: 1 (annotation 9)"
    whole = [[0, 0, 40, 0, 40, 20, 0, 20]]
    rounded = with_annotation(folder, bbox=(-0.3, 0, 40.6, 20), segmentation=whole)
    assert rounded.pictures[2].instances[0].box == (0, 0, 40, 20) and not rounded.problems


def test_of_several_polygons_the_good_ones_are_kept(folder):
    coco = with_annotation(folder, segmentation=[[1, 1, 2], *POLYGON])
    assert coco.pictures[2].instances[0].mask == POLYGON
    assert list(coco.problems) == ["annotations with some malformed polygons, the others kept"]


def test_ids_that_occur_twice(folder):
    coco = opened(folder, annotations=[annotation(1), annotation(1), annotation(1, category=90)])
    assert [x.label for x in coco.pictures[0].instances] == [1, 2]
    assert coco.summary()[1:] == [
        "duplicate annotations, counted once: 1 (annotation 1)",
        "annotation ids used for several objects, all kept: 1 (annotation 1)",
    ]
    coco = opened(folder, images=[*GOOD["images"], GOOD["images"][0]])
    assert len(coco.pictures) == 3 and coco.summary()[1] == "duplicate images, counted once: 1 (1.png)"
    with pytest.raises(UserError, match=r"image id 1 is used for 1.png and 2.png; use two ids"):
        opened(folder, images=[*GOOD["images"], GOOD["images"][1] | {"id": 1}])
    with pytest.raises(UserError, match=r"category id 7 is used for 'bag' and 'hat'"):
        opened(folder, categories=[*GOOD["categories"], {"id": 7, "name": "hat"}])
    with pytest.raises(UserError, match=r"two categories are called 'bag': ids \[7, 8\]"):
        opened(folder, categories=[*GOOD["categories"], {"id": 8, "name": "bag"}])


def test_a_problem_is_one_line(folder):
    many = [annotation(i, bbox=(99, 2, 5, 5)) for i in range(10, 14)]
    coco = opened(folder, annotations=[*(annotation(i) for i in range(9)), *many])
    assert coco.summary()[1] == (
        "boxes entirely outside their image, skipped: 4 (annotation 10, annotation 11, annotation 12, ...)"
    )
    with pytest.raises(UserError, match=r"4 of 6 annotations cannot be used; repair the file.\nboxes entirely outside"):
        opened(folder, annotations=[annotation(1), annotation(2), *many])


# A mask of 20x30 pixels at (15, 0) of a 40x20 image, as polygon and as runs down the columns
SQUARE: list[Any] = [[[15, 0, 35, 0, 35, 20, 15, 20]], {"size": [20, 40], "counts": [300, 400, 100]}]


@pytest.mark.parametrize("mask", SQUARE, ids=["polygon", "runs"])
def test_boxes_that_contradict_their_masks_are_refused(folder, mask):
    good = [annotation(i, bbox=(15, 0, 20, 20), segmentation=mask) for i in range(6)]
    assert len(opened(folder, annotations=good).pictures[0].instances) == 6
    one = [*good, annotation(9, bbox=(0, 0, 6, 6), segmentation=mask)]
    assert list(opened(folder, annotations=one).problems) == ["boxes that contradict their mask, skipped"]
    fractions = [annotation(i, bbox=(0.3, 0.1, 0.5, 0.9), segmentation=mask) for i in range(6)]
    with pytest.raises(UserError, match=r"they are fractions of the image\. Write x, y, width, height in pixels"):
        opened(folder, annotations=fractions)
    small = (
        [[20, 10, 30, 10, 30, 18, 20, 18]] if isinstance(mask, list) else {"size": [20, 40], "counts": [580, 60, 160]}
    )
    corners = [
        annotation(i, bbox=(20, 10, 32, 20) if isinstance(mask, list) else (29, 0, 32, 20), segmentation=small)
        for i in range(6)
    ]
    with pytest.raises(UserError, match=r"6 boxes of 6 annotations contradict.*x1, y1, x2, y2; COCO's are x, y, width"):
        opened(folder, annotations=corners)


def test_a_missing_size_is_that_of_the_upright_image(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40)).save(folder / "images" / "1.jpg", exif=exif)
    image = {"id": 1, "file_name": "1.jpg"}
    coco = opened(folder, images=[image], annotations=[annotation(1)])
    assert (coco.pictures[0].width, coco.pictures[0].height) == (40, 20)


# ---------------------------------------------------------------- images


def test_sizes_are_read_from_files_and_bad_entries_skipped(folder):
    images = copy.deepcopy(GOOD["images"])
    del images[0]["width"]
    images.append({"id": 8, "width": 3, "height": 3})
    (folder / "images" / "text.png").write_text("no image")
    images.append({"id": 9, "file_name": "text.png"})
    coco = opened(folder, images=images)
    assert [(p.width, p.height) for p in coco.pictures] == [(40, 20)] * 3
    assert list(coco.problems) == [
        "image entries without id or file_name, skipped",
        "images without width and height whose file cannot be read, skipped",
    ]


def test_missing_files(folder):
    (folder / "images" / "3.png").unlink()
    coco = opened(folder)
    assert [p.id for p in coco.pictures] == [1, 2]
    assert coco.summary()[1] == "images without a file, skipped: 1 (3.png)"
    (folder / "images" / "2.png").rename(folder / "images" / "two.png")
    with pytest.raises(UserError, match=r"data.train: 2 of 3 images are not in .*images; the first: 2.png\."):
        opened(folder)
    (folder / "images" / "part").mkdir()
    for i in (1, 2, 3):
        (folder / "images" / "part" / f"{i}.png").touch()
    with pytest.raises(UserError, match=r"the first: 2.png. It is in .*images/part; use that folder"):
        opened(folder)
    (folder / "images").rename(folder / "imagery")
    with pytest.raises(UserError, match=r"The folder does not exist. Did you mean `imagery`"):
        opened(folder)


# ---------------------------------------------------------------- files in another format


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[1, 2", "cannot be read as JSON"),
        ('{"images": [], "annotations": {}}', r"it has no list of annotations or categories"),
        ("[]", r"it has no list of images or annotations or categories"),
        ('[{"image_id": 1, "score": 0.5}]', r"contains results \(predictions with scores\), not annotations"),
        (
            '{"images": [], "categories": [], "annotations": [{"caption": "x"}]}',
            r"has a bbox. Use instance annotations, not captions",
        ),
        ('{"images": [], "categories": [], "annotations": [{"bbox": [1, 1, 1, 1]}]}', r"Mask R-CNN needs masks"),
        ('{"images": [], "categories": [], "annotations": []}', "no usable object"),
        ('{"images": [], "categories": [{"id": "a"}], "annotations": []}', "a category needs a whole number as id"),
    ],
)
def test_other_formats_are_rejected(folder, data, message):
    path = folder / "instances.json"
    path.write_text(data)
    with pytest.raises(UserError, match=message):
        open_coco(path, folder / "images", "data.train")


def test_no_file_no_object_other_classes_no_extra(folder, monkeypatch):
    opened(folder)
    with pytest.raises(UserError, match=r"no file .*instance.json. Did you mean `instances.json`"):
        open_coco(folder / "instance.json", folder / "images", "data.train")
    with pytest.raises(UserError, match=r"has no usable object.\nboxes without area, skipped: 1"):
        opened(folder, annotations=[annotation(1, bbox=(1, 1, 0, 0))])
    with pytest.raises(UserError, match=r"has other classes than the training set; only in one of them: cap, tie"):
        open_coco(folder / "instances.json", folder / "images", "data.val", classes=["bag", "cap"])
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(UserError, match=r"pip install 'scalekd\[detection\]'"):
        opened(folder)


JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    0.5,
    7,
    10**400,
    float("nan"),
    float("inf"),
    -1e30,
    "",
    "x",
    "1\x00",
    [],
    [[]],
    {},
    [1],
]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [(tree, k) for k in keys] + [place for k in keys for place in places(tree[k])]


def test_whatever_stands_anywhere_is_told_and_what_is_kept_can_be_used(folder):
    runs = annotation(3, bbox=(5, 0, 3, 20), segmentation={"size": [20, 40], "counts": [100, 50, 650]})
    text = annotation(
        4,
        bbox=(0, 0, 20, 20),
        segmentation={"size": [20, 40], "counts": mask_tools().encode(np.eye(20, 40, dtype="u1"))["counts"]},
    )
    text["segmentation"]["counts"] = str(text["segmentation"]["counts"], "ascii")
    whole = GOOD | {"annotations": [*GOOD["annotations"], runs, text]}
    used = refused = 0
    for place in range(len(places(whole))):
        for junk in JUNK:
            data = copy.deepcopy(whole)
            container, key = places(data)[place]
            container[key] = junk
            try:
                coco = opened(folder, data)
            except UserError as error:
                refused += 1
                assert len(str(error)) < 600
                continue
            for picture in coco.pictures:
                for instance in picture.instances:
                    x, y, w, h = instance.box
                    assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= picture.width + 1e-6
                    assert mask_of(instance.mask, picture.height, picture.width).shape == (
                        picture.height,
                        picture.width,
                    )
                    used += 1
    assert used > 100 and refused > 100


# ---------------------------------------------------------------- masks


def test_compressed_runs_are_read_as_cocos_own_tools_read_them():
    random = np.random.default_rng(0)
    for height, width in ((1, 1), (20, 40), (300, 7)):
        for share in (0.0, 0.03, 0.5, 1.0):
            mask = (random.random((height, width)) < share).astype(np.uint8)
            rle = mask_tools().encode(np.asfortranarray(mask))
            text = rle["counts"] if isinstance(rle["counts"], str) else rle["counts"].decode()
            counts = rle_counts(text)
            assert counts is not None and sum(counts) == mask.size
            rle = {"size": [height, width], "counts": text}
            np.testing.assert_array_equal(mask_of(rle, height, width), mask)


def test_masks_of_polygons_and_runs():
    wanted = np.zeros((20, 40), np.uint8)
    wanted[2:10, 2:12] = 1
    np.testing.assert_array_equal(mask_of(POLYGON, 20, 40), wanted)
    wanted[0:5, 20:30] = 1
    np.testing.assert_array_equal(mask_of([*POLYGON, [20, 0, 30, 0, 30, 5, 20, 5]], 20, 40), wanted)
    runs = {"size": [2, 3], "counts": [1, 2, 3]}
    np.testing.assert_array_equal(mask_of(runs, 2, 3), [[0, 1, 0], [1, 0, 0]])


def test_boxes_are_enough_for_a_detector_without_masks(folder):
    bare = [{k: v for k, v in entry.items() if k != "segmentation"} for entry in GOOD["annotations"]]
    wrong = annotation(3, image=3, bbox=(20, 2, 10, 8))  # its mask is elsewhere
    (folder / "instances.json").write_text(json.dumps(GOOD | {"annotations": [*bare, wrong]}))
    files = folder / "instances.json", folder / "images", "data.train"
    coco = open_coco(*files, masks=False)
    assert [[(x.box, x.mask) for x in p.instances] for p in coco.pictures] == [[((2, 2, 10, 8), None)]] * 2 + [[]]
    assert coco.problems == {CONTRADICTING: ["annotation 3"]}
    with pytest.raises(UserError, match="has no usable object"):
        open_coco(*files)
