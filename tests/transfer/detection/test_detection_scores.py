"""Average precision against values worked out by hand."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

import scalekd
from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.transfer.detection.coco import Coco
from scalekd.transfer.detection.instances import Instance, Picture
from scalekd.transfer.detection.masks import mask_of
from scalekd.transfer.detection.scores import Detections, average_precision, detections, merged

SIZE = 200
SMALL, MEDIUM, LARGE = (5, 5, 20, 20), (40, 40, 60, 60), (60, 50, 120, 140)


def instance(box, label: int = 1, crowd: bool = False, area: float | None = None) -> Instance:
    """A rectangle, and a mask that fills it."""
    x, y, w, h = box
    mask = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return Instance(label, tuple(map(float, box)), mask, crowd, w * h if area is None else area)


def annotated(*pictures, classes=("bag", "tie")) -> Coco:
    made = [Picture(f"id{i}", "", SIZE, SIZE, list(instances)) for i, instances in enumerate(pictures)]
    return Coco(list(classes), [7, 90][: len(classes)], made, {})


def detected(picture: int, *objects) -> Detections:
    """Of (box, label, score), through what a detector gives."""
    instances = [instance(box, label) for box, label, _ in objects]
    masks = [torch.from_numpy(mask_of(i.mask, SIZE, SIZE).copy())[None].float() * 0.9 for i in instances]
    corners = [[x, y, x + w, y + h] for (x, y, w, h), _, _ in objects]
    prediction = {
        "boxes": torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in objects], dtype=torch.float32),
        "masks": torch.stack(masks) if masks else torch.zeros(0, 1, SIZE, SIZE),
    }
    return detections(prediction, picture)


def test_images_that_could_not_be_read_are_no_misses():
    coco = annotated([instance(SMALL)], [instance(SMALL)])
    for scores in average_precision(coco, [detected(0, (SMALL, 1, 0.9))]).values():
        assert scores["ap"] == pytest.approx(1)
    for scores in average_precision(coco, [detected(0, (SMALL, 1, 0.9)), detected(1)]).values():
        assert scores["ap"] == pytest.approx(51 / 101)  # found half of them: the recalls from 0 to 0.5


def test_perfect_and_empty():
    coco = annotated([instance(SMALL), instance(MEDIUM, 2)], [instance(LARGE), instance(LARGE, 2)], [])
    perfect = [
        detected(0, (SMALL, 1, 0.9), (MEDIUM, 2, 0.8)),
        detected(1, (LARGE, 1, 0.7), (LARGE, 2, 0.6)),
        detected(2),
    ]
    for scores in average_precision(coco, perfect).values():
        assert scores.pop("classes") == {"bag": pytest.approx(1), "tie": pytest.approx(1)}
        assert len(scores) == 6 and all(value == pytest.approx(1) for value in scores.values())
    for nothing in ([detected(i) for i in range(3)],):
        for scores in average_precision(coco, nothing).values():
            assert scores.pop("classes") == {"bag": 0, "tie": 0}
            assert scores == dict.fromkeys(["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"], 0)


def test_half_of_the_objects_found_and_one_error():
    coco = annotated([instance(MEDIUM), instance(SMALL)], classes=("bag",))
    scores = average_precision(coco, [detected(0, (MEDIUM, 1, 0.9), ((150, 150, 30, 30), 1, 0.8))])
    # precision is 1 up to recall 0.5: at 51 of the 101 recalls 0, 0.01, ... 1
    assert scores["box"]["ap50"] == scores["mask"]["ap50"] == pytest.approx(51 / 101)
    assert scores["box"]["ap"] == pytest.approx(51 / 101)
    assert scores["box"]["ap_small"] == 0 and scores["box"]["ap_medium"] == pytest.approx(1)
    assert scores["box"]["ap_large"] is None  # there is none


def test_an_inexact_box_counts_up_to_its_overlap():
    coco = annotated([instance((0, 0, 100, 100))], classes=("bag",))
    scores = average_precision(coco, [detected(0, ((0, 0, 100, 72), 1, 0.9))])  # IoU 0.72: 0.5, 0.55, ... 0.7
    for kind in ("box", "mask"):
        assert scores[kind]["ap"] == pytest.approx(0.5)
        assert scores[kind]["ap50"] == pytest.approx(1) and scores[kind]["ap75"] == 0


def test_an_error_that_is_surer_than_the_hit():
    coco = annotated([instance(MEDIUM)], classes=("bag",))
    scores = average_precision(coco, [detected(0, (MEDIUM, 1, 0.5), ((150, 150, 30, 30), 1, 0.8))])
    assert scores["box"]["ap50"] == pytest.approx(0.5)  # precision 1/2 at every recall


def test_what_lies_in_a_crowd_region_is_no_error():
    inside = detected(0, (MEDIUM, 1, 0.5), ((120, 120, 30, 30), 1, 0.8), ((150, 150, 30, 30), 1, 0.7))
    for crowd, wanted in ((True, 1.0), (False, (1 / 3) * 51 / 101)):
        coco = annotated([instance(MEDIUM), instance((110, 110, 80, 80), crowd=crowd)], classes=("bag",))
        scores = average_precision(coco, [inside])
        assert scores["box"]["ap50"] == pytest.approx(wanted) and scores["mask"]["ap50"] == pytest.approx(wanted)


def test_a_class_without_objects_has_no_score():
    coco = annotated([instance(MEDIUM)])
    scores = average_precision(coco, [detected(0, (MEDIUM, 1, 0.5), (SMALL, 2, 0.9))])
    assert scores["box"]["classes"] == {"bag": pytest.approx(1), "tie": None}
    assert scores["box"]["ap"] == pytest.approx(1)


def test_areas_come_from_the_file_or_the_mask():
    medium = annotated([instance(SMALL, area=2000)], classes=("bag",))  # the file's word
    ours = instance(SMALL)
    ours.area = None
    small = annotated([ours], classes=("bag",))
    runs = [5 * SIZE + 5, 20] + [SIZE - 20, 20] * 19
    results = [detected(0, (SMALL, 1, 0.9))]
    assert average_precision(medium, results)["box"]["ap_medium"] == pytest.approx(1)
    for counts in ([*runs, SIZE * SIZE - sum(runs)], _text(results[0].masks[0])):  # the two forms of RLE
        ours.mask = {"size": [SIZE, SIZE], "counts": counts}
        scores = average_precision(small, results)["mask"]
        assert scores["ap_small"] == pytest.approx(1) and scores["ap_medium"] is None


def test_what_is_found_is_kept_exactly():
    kept = detected(3, ((2, 3, 10, 20), 2, 0.75))
    assert kept.picture == 3 and kept.boxes.tolist() == [[2, 3, 10, 20]]
    assert kept.labels.tolist() == [2] and kept.scores.tolist() == [0.75]
    mask = mask_of(kept.masks[0] | {"counts": _text(kept.masks[0])}, SIZE, SIZE)
    assert mask[3:23, 2:12].all() and mask.sum() == 200
    assert detected(0).masks == [] and detected(0).boxes.shape == (0, 4)


def _text(rle) -> str:
    return rle["counts"] if isinstance(rle["counts"], str) else rle["counts"].decode()


def test_results_of_several_processes_are_merged_by_picture(monkeypatch):
    theirs = [detected(3), detected(1, (SMALL, 1, 0.5))]
    monkeypatch.setattr(parallel, "gather", lambda mine: [mine, theirs])
    ours = [detected(2), detected(0), detected(1, (SMALL, 1, 0.5))]  # picture 1 was seen by both
    every = merged(ours)
    assert [result.picture for result in every] == [0, 1, 2, 3]
    assert [len(result.scores) for result in every] == [0, 1, 0, 0]


def test_without_the_extra_its_install_line_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"pip install 'scalekd\[detection\]'"):
        average_precision(annotated([instance(SMALL)]), [])


def test_the_core_imports_without_the_extra():
    """No module of the package imports it when it is itself imported."""
    sources = sorted(Path(scalekd.__file__).parent.rglob("*.py"))
    at_import = {
        (file.name, name.split(".")[0])
        for file in sources
        for node in ast.parse(file.read_text()).body
        for name in ([a.name for a in getattr(node, "names", [])] + [getattr(node, "module", None) or ""])
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert ("masks.py", "numpy") in at_import  # the search finds what is there
    assert not [file for file, name in at_import if name == "faster_coco_eval"]


def test_without_masks_there_is_the_box_ap_alone():
    """The same boxes as with masks, and objects without an area in the file."""
    coco = annotated([instance(SMALL, area=0.0), instance(MEDIUM, 2)], [instance(LARGE)])
    for picture in coco.pictures:
        for object_ in picture.instances:
            object_.area = None
    results = [detected(0, (SMALL, 1, 0.9), (LARGE, 2, 0.8)), detected(1, (LARGE, 1, 0.7))]
    both = average_precision(coco, results)
    for picture in coco.pictures:
        for object_ in picture.instances:
            object_.mask = None
    alone = average_precision(coco, [result._replace(masks=None) for result in results])
    assert alone == {"box": both["box"]} and 0 < both["box"]["ap"] < 1 and both["box"]["ap_small"] == pytest.approx(1)
