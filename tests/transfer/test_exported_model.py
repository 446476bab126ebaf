"""Export and loading of detectors and segmenters: equal outputs, and rejection of other files."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch
from exported_models import DETECTOR, RETINANET, SEGMENTER, new_detector, new_segmenter
from safetensors.torch import load_file

from scalekd.common.errors import UserError
from scalekd.models import mixer  # noqa: F401 - adds a name to timm's
from scalekd.transfer import exported_model


@pytest.fixture(scope="module")
def detector():
    return new_detector().eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, detector):
    """The folders `detector/` and `segmenter/` of two runs."""
    folder = tmp_path_factory.mktemp("exported")
    for model, name, card in ((detector.student, "detector", DETECTOR), (new_segmenter(), "segmenter", SEGMENTER)):
        (folder / name).mkdir()
        assert exported_model.export(model, folder / name / f"{name}.safetensors", card) == 0
    return folder


def test_a_detector_comes_back_as_it_was(exported, detector):
    with torch.no_grad():  # as one that predicts may be loaded
        loaded, card = exported_model.load(exported / "detector", "detection")
    weights = exported / "detector/detector.safetensors"
    assert not loaded.training and card == DETECTOR | {"sha256": exported_model.sha256_of(weights)}
    assert load_file(weights).keys() == detector.student.state_dict().keys()
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    low = torch.zeros(3, 24, 60, dtype=torch.uint8)  # resized, 38 pixels: torchvision would take its maps for larger
    with torch.inference_mode():
        loaded([low])
        ours, theirs = detector([image])[0], loaded([image])[0]
    assert len(ours["scores"]) > 3
    for name, value in ours.items():
        assert torch.equal(value, theirs[name])


def test_a_detector_without_masks_comes_back_as_it_was(tmp_path):
    detector = new_detector(RETINANET).eval()
    assert exported_model.export(detector.student, tmp_path / "detector.safetensors", RETINANET) == 0
    loaded, _ = exported_model.load(tmp_path, "detection")
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = detector([image])[0], loaded([image])[0]
    assert len(ours["scores"]) > 3 and ours.keys() == {"boxes", "scores", "labels"}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with torch.no_grad():
        loaded.student.head.regression_head.bbox_reg.bias += 0.125
    noise = torch.randn(1, 3, 64, 64)
    pairs = zip(exported_model.outputs(detector.student, noise), exported_model.outputs(loaded.student, noise))
    assert max((a - b).abs().max().item() for a, b in pairs) == pytest.approx(0.125, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {}),
        ("test_vit", {"img_size": 64, "dynamic_img_size": True}),
        ("mlp_mixer", {"embed_dim": 32, "num_blocks": 2, "img_size": 64}),
        ("test_convnext", {"in_chans": 1}),
    ],
)
def test_a_segmenter_comes_back_as_it_was(tmp_path, name, kwargs):
    card = SEGMENTER | {"backbone": name, "kwargs": kwargs}
    if "in_chans" in kwargs:
        card |= {"mean": [0.5], "std": [0.25]}
    model = new_segmenter(card)
    assert exported_model.export(model, tmp_path / "segmenter.safetensors", card) == 0
    loaded, _ = exported_model.load(tmp_path / "segmenter.safetensors", "segmentation")
    assert (loaded.pyramid.canvas is None) == (name != "mlp_mixer")
    images = torch.randn(1, len(card["mean"]), 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), loaded(images))


def test_the_model_stays_in_its_mode_and_frozen_norms_in_theirs(detector):
    detector.train()
    before = {name: module.training for name, module in detector.named_modules()}
    statistics = {name: value.clone() for name, value in detector.named_buffers()}
    assert set(before.values()) == {False, True}
    exported_model.outputs(detector.student, torch.randn(1, 3, 64, 64))
    assert {name: module.training for name, module in detector.named_modules()} == before
    assert all(torch.equal(value, statistics[name]) for name, value in detector.named_buffers())
    detector.eval()


def test_a_difference_is_measured(exported, detector, monkeypatch, tmp_path):
    other = exported_model.load(exported / "detector", "detection")[0]
    with torch.no_grad():
        other.student.roi_heads.mask_predictor.mask_fcn_logits.bias += 0.125
    monkeypatch.setattr(exported_model, "load", lambda path, task: (other, {}))
    found = exported_model.export(detector.student, tmp_path / "detector.safetensors", DETECTOR)
    assert found == pytest.approx(0.125, rel=1e-4)


# ---------------------------------------------------------------- what is refused


def copy_of(exported, tmp_path, **changes):
    """The segmenter's folder with another card, as if it had been exported so."""
    folder = tmp_path / "copy"
    shutil.copytree(exported / "segmenter", folder)
    card_file = folder / "segmenter.json"
    card = json.loads(card_file.read_text()) | changes
    card_file.write_text(json.dumps({key: value for key, value in card.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet5O"}, "timm has no model `resnet5O`.* Did you mean"),
        ({"kwargs": {"pretrained_cfg": {"file": "x.pth"}}}, "pretrained_cfg: not allowed here"),
        ({"kwargs": {"checkpoint_path": "x.pth"}}, "checkpoint_path: not allowed here"),
        ({"kwargs": {"no_such": 1}}, "test_resnet cannot be built from .*no_such"),
        ({"mean": [0.5, 0.5]}, "one value or three"),
        ({"std": [0.5, 0.5, 0]}, "std.2: Input should be greater than 0"),
        ({"mean": [math.nan] * 3}, "finite"),
        ({"classes": []}, "classes: "),
        ({"classes": ["sky", "sea", "sky"]}, "two classes have the same name"),
        ({"crop": [64, 0]}, "crop.1: "),
        ({"short": 512}, "short \\(512 pixels\\) is larger than long \\(256\\)"),
        ({"inference": "tta"}, "inference: "),
        ({"width": None}, "width: Field required"),
        ({"sha256": None}, "sha256: Field required"),
        ({"task": "detection"}, "it is for `scalekd detect`"),
        ({"task": "depth"}, "task: "),
        ({"width": 8}, r"tensors differ, such as classifier.1.weight, .*, 16, .* in the file and .*, 8, .* in the mod"),
        ({"classes": ["sky", "sea"]}, r"2 of \d+ tensors differ, such as classifier.1.bias, \(3,\) .* \(2,\)"),
    ],
)
def test_a_card_that_does_not_fit(exported, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        exported_model.load(copy_of(exported, tmp_path, **changes), "segmentation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": [32, 64]}, "anchors: "),
        ({"kind": "yolo"}, "kind: "),
        ({"category_ids": [3]}, "1 category ids for 2"),
    ],
)
def test_a_detector_needs_an_anchor_per_stride_and_an_id_per_class(tmp_path, changes, message):
    (tmp_path / "detector.json").write_text(json.dumps(DETECTOR | {"sha256": ""} | changes))
    with pytest.raises(UserError, match=message):
        exported_model.read_card(tmp_path / "detector.json", "detection")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"task": [1]}'])
def test_a_card_that_is_none(exported, tmp_path, text):
    folder = copy_of(exported, tmp_path)
    (folder / "segmenter.json").write_text(text)
    with pytest.raises(UserError, match="is not a segmenter's card"):
        exported_model.load(folder, "segmentation")


def test_weights_that_were_changed(exported, tmp_path):
    folder = copy_of(exported, tmp_path)
    weights = folder / "segmenter.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="the sha256 differs"):
        exported_model.load(folder, "segmentation")
    weights.write_bytes(b"no safetensors")
    card = json.loads((folder / "segmenter.json").read_text()) | {"sha256": exported_model.sha256_of(weights)}
    (folder / "segmenter.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        exported_model.load(weights, "segmentation")


def test_other_paths_are_explained(exported, tmp_path):
    def error_of(path, task="detection"):
        with pytest.raises(UserError) as error:
            exported_model.load(path, task)
        return str(error.value)

    assert "`scalekd detect train` writes them at the end of a run" in error_of(tmp_path)
    assert "contains a run of `scalekd segment`; use it with that command" in error_of(exported / "segmenter")
    assert "it is for `scalekd segment`" in error_of(exported / "segmenter/segmenter.safetensors")
    assert "Did you mean `detector`?" in error_of(exported / "detectr")
    (tmp_path / "student.safetensors").touch()
    assert f"`scalekd segment train RECIPE backbone.model={tmp_path}` trains a segmenter" in error_of(
        tmp_path, "segmentation"
    )
    (tmp_path / "model.pth").touch()
    assert "no detector.safetensors with its .json;" in error_of(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("task", "package", "line"),
    [
        ("detection", "faster_coco_eval", r"pip install 'scalekd\[detection\]'"),
        ("segmentation", "segmentation_models_pytorch", r"pip install 'scalekd\[segmentation\]'"),
    ],
)
def test_a_missing_extra_is_named_first(monkeypatch, tmp_path, task, package, line):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=line):
        exported_model.load(tmp_path / "nowhere", task)
