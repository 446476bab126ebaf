"""RetinaNet on a pyramid, without masks, and its ONNX file."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from exported_models import DETECTOR, RETINANET, new_detector

from scalekd.common.errors import UserError
from scalekd.models import student_file
from scalekd.transfer.detection import onnx_file
from scalekd.transfer.detection.model import Detector
from scalekd.transfer.detection.onnx_file import OneSize, equal, explained, write_onnx
from scalekd.transfer.pyramid import Pyramid, any_size_kwargs

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def found_by(detector: Detector, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        (found,) = detector([pixels])
    return found["boxes"], found["scores"], found["labels"]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_all_of_it_learns_although_the_finest_map_is_not_used(name):
    pyramid = Pyramid(timm.create_model(name, **any_size_kwargs(name)), (64, 64), 8)
    whole = Pyramid(timm.create_model(name, **any_size_kwargs(name)), (64, 64))
    assert pyramid.strides == [8, 16, 32] and pyramid.channels == whole.channels[1:]
    pixels = torch.randn(1, 3, 64, 96)
    assert [tuple(m.shape) for m in pyramid(pixels)] == [tuple(m.shape) for m in whole(pixels)[1:]]
    model = Detector(pyramid, 3, MEAN, STD, kind="retinanet", short=64, long=96, width=16).train()
    target = {"boxes": torch.tensor([[8.0, 4, 40, 40]]), "labels": torch.tensor([2])}
    terms = model([image(64, 64), image(50, 60)], [target, target])
    assert list(terms) == ["class", "box", "total"] and all(value > 0 for value in terms.values())
    terms["total"].backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (200, 90)])
def test_the_exported_form_finds_what_the_detector_finds(size):
    detector = new_detector(RETINANET).eval()
    wanted = found_by(detector, image(*size))
    assert 10 < len(wanted[1]) <= 100 and wanted[1].min() > 0.05 and set(wanted[2].tolist()) == {1, 2}
    with torch.no_grad():
        found = OneSize(detector, size)(image(*size)[None])
    assert len(found[1]) == 100 and equal(wanted, found).all()
    torch.testing.assert_close(found[1][: len(wanted[1])], wanted[1])


def test_labels_start_at_one_in_training_too():
    """The logit of the object's own class gets the largest pull at the place of its best anchor."""
    model = new_detector(RETINANET).train()
    logits = []
    model.student.head.classification_head.register_forward_hook(lambda module, given, out: logits.append(out))
    target = {"boxes": torch.tensor([[8.0, 8, 24, 24]]), "labels": torch.tensor([2])}
    terms = model([image(64, 64)], [target])
    (pull,) = torch.autograd.grad(terms["class"], logits[0])
    assert pull.shape[-1] == 2 and pull[..., 1].min() < 0 <= pull[..., 0].min()


def test_objects_are_equal_in_any_order_and_each_part_counts():
    boxes, scores, labels = torch.tensor([[0.0, 0, 9, 9], [5, 5, 8, 8]]), torch.tensor([0.9, 0.8]), torch.tensor([1, 2])
    one = boxes, scores, labels
    assert equal(one, tuple(part.flip(0) for part in one)).tolist() == [True, True]
    moved = boxes + torch.tensor([[0, 0, 0, 0.2], [0, 0, 0, 0]])
    assert equal(one, (moved, scores, labels)).tolist() == [False, True]
    assert equal(one, (boxes, scores + torch.tensor([0, 0.01]), labels)).tolist() == [True, False]
    assert not equal(one, (boxes, scores, labels.flip(0))).any()
    nothing = boxes[:0], scores[:0], labels[:0]
    assert not equal(one, nothing).any() and not explained(one, nothing, 0.49).any()


def test_only_a_rival_with_an_equal_score_explains_a_missing_object():
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]])
    wanted = boxes, torch.tensor([0.9, 0.5, 0.2]), torch.tensor([1, 1, 2])
    lowest = boxes[2:], torch.tensor([0.1]), torch.tensor([2])

    def found(box: list[float], score: float, label: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.cat(p) for p in zip((torch.tensor([box]), torch.tensor([score]), torch.tensor([label])), lowest)
        )

    rival = [0.0, 0, 10, 6]  # overlaps the first by 0.6
    assert explained(wanted, found(rival, 0.9, 1), 0.49).tolist() == [True, False, False]
    for box, score, label in ((rival, 0.8, 1), (rival, 0.9, 2), ([0.0, 0, 10, 4], 0.9, 1)):
        assert not explained(wanted, found(box, score, label), 0.49).any()
    tie = boxes[:1], torch.tensor([0.5]), torch.tensor([2])  # the last that was found
    assert explained(wanted, tie, 0.49).tolist() == [False, True, True]


def test_onnx_finds_the_same_objects(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason=student_file.ONNX_MISSING)
    pytest.importorskip("onnxscript", reason=student_file.ONNX_MISSING)
    detector, path = new_detector(RETINANET).eval(), tmp_path / "detector.onnx"
    written = write_onnx(detector, RETINANET, (50, 70), path)
    assert written.equal == written.compared == 200 and written.milliseconds > 0
    assert [file.name for file in tmp_path.iterdir()] == ["detector.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    card = json.loads(session.get_modelmeta().custom_metadata_map["scalekd"])
    assert card == RETINANET | {"input_size": [50, 70]}
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [("image", [1, 3, 50, 70], "tensor(uint8)")]
    pixels = image(50, 70, seed=5)
    found = tuple(map(torch.from_numpy, session.run(["boxes", "scores", "labels"], {"image": pixels[None].numpy()})))
    wanted = found_by(detector, pixels)
    assert len(wanted[1]) > 10 and equal(wanted, found).all()


def test_a_file_that_finds_other_objects_is_removed(tmp_path, monkeypatch):
    """The converter is replaced: it writes a file, and the runtime gives boxes that are nine pixels off."""
    detector, path = new_detector(RETINANET).eval(), tmp_path / "detector.onnx"

    class Session:
        def __init__(self, file, providers):
            path.touch()

        def run(self, names, inputs):
            with torch.no_grad():
                boxes, scores, labels = OneSize(detector, (50, 70))(torch.from_numpy(inputs["image"]))
            return [(boxes + 9).numpy(), scores.numpy(), labels.numpy()]

    monkeypatch.setattr(onnx_file, "onnx_runtime", lambda exporting: type("Runtime", (), {"InferenceSession": Session}))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: object())
    monkeypatch.setattr(onnx_file, "save_onnx", lambda program, path, card: None)
    with pytest.raises(
        UserError, match=r"\d+ of 200 objects of the detector are not found under onnxruntime; the file was removed"
    ):
        write_onnx(detector, RETINANET, (50, 70), path)
    assert not path.exists()


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(UserError, match=r"images of 20000x2 pixels are too narrow"):
        OneSize(new_detector(RETINANET), (20000, 2))
    with pytest.raises(UserError, match=r"Mask R-CNN cannot be exported .* Train with detector.kind=retinanet"):
        write_onnx(new_detector().eval(), DETECTOR, (64, 64), tmp_path / "detector.onnx")
