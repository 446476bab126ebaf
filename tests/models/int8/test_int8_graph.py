"""Folded batch norms, the graph of a student, onnxruntime's quantiser and the fake-quantised student."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

from scalekd.models.int8.fake import FakeActivation, FakeBias, FakeQuantised, FakeWeight, GraphView
from scalekd.models.int8.fold import fold_batch_norms, unfold
from scalekd.models.int8.graph import Graph, graph_of
from scalekd.models.int8.onnx_quantiser import METHODS, Place, int8_nodes, places_of, quantised, ranges
from scalekd.models.int8.shares import left_in_float, multiply_adds
from scalekd.models.stages import StageView

SIZE = 48


def card_of(name: str) -> dict[str, Any]:
    return {"model": name, "classes": list("abcde"), "image_size": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.2] * 3}


def student_of(name: str, **kwargs: Any) -> nn.Module:
    """A student whose norms and biases are not at their initial values."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


class Case(NamedTuple):
    student: nn.Module
    graph: Graph
    images: torch.Tensor
    found: Any  # ranges


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    student = student_of(name, **({"img_size": SIZE, "depth": 4} if "vit" in name else {}))
    graph = graph_of(student, card_of(name))
    images = torch.randn(24, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return Case(student, graph, images, ranges(graph, images.split(8), "minmax"))


def run(model: Any, images: torch.Tensor, outputs: list[str] | None = None) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(outputs, {"images": images.numpy()})


def test_the_graph_gives_the_students_outputs(case):
    with torch.no_grad():
        logits = case.student(case.images)
        features = case.student.forward_head(case.student.forward_features(case.images), pre_logits=True)
        traced = case.graph.module(case.images)
    names = case.graph.outputs
    assert {"logits", "features", "final", "map1", "map4"} <= names.keys()
    torch.testing.assert_close(traced[names["logits"]], logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(traced[names["features"]], features, atol=1e-4, rtol=1e-4)
    own = run(case.graph.onnx, case.images, ["logits", "features"])
    np.testing.assert_allclose(own[0], logits, atol=1e-3)
    np.testing.assert_allclose(own[1], features, atol=1e-3)
    assert "/" not in "".join(str(node.metadata_props) for node in case.graph.onnx.graph.node).replace("', '", "")


def test_the_int8_file_computes_what_the_fake_quantised_student_computes(case):
    model = quantised(case.graph, case.found)
    fake = FakeQuantised(case.graph, places_of(model))
    with torch.no_grad():
        ours, exact = fake(case.images).numpy(), case.student(case.images).numpy()
    theirs = run(model, case.images, ["logits"])[0]
    rounding = np.abs(theirs - exact).mean()
    assert rounding > 1e-3  # something is rounded
    # and both do it alike, but for a tie here and there
    assert np.median(np.abs(ours - theirs)) < 1e-5 and np.abs(ours - theirs).mean() < rounding / 5
    assert (ours.argmax(1) == theirs.argmax(1)).all()
    again = quantised(case.graph, places=fake.places())  # without ranges
    assert np.abs(run(again, case.images, ["logits"])[0] - theirs).mean() < rounding / 5
    fake(case.images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fake.parameters())


def test_its_view_gives_what_the_students_view_gives(case):
    """`fm` reads the classifier's input: in a ViT the class token, which the view of a quantised student left out."""
    fake = FakeQuantised(case.graph, places_of(quantised(case.graph, case.found)))
    own = StageView(case.student, name="student", image_size=(SIZE, SIZE))
    view = GraphView(fake, own.name, own.shapes, own.refusal)
    with torch.no_grad():
        found, exact = (v(case.images, classifier=True) for v in (view, own))
    for ours, wanted in ((found.logits, exact.logits), (found.pooled, exact.pooled), *zip(found.maps, exact.maps)):
        assert ours.shape == wanted.shape and 0 < (ours - wanted).norm() < 0.1 * wanted.norm()
    if found.prefix[3] is not None:
        assert (found.pooled - found.final.mean((2, 3))).norm() > 0.2 * found.pooled.norm()
    assert found.pooled.shape[1] == view.shapes.pooled and view(case.images).pooled is None


@pytest.mark.parametrize("method", METHODS)
def test_the_range_of_images_with_an_odd_value(case, method):
    images = case.images.clone()
    images[3, 0, 0, 0] = 40.0
    low, high = (bound.item() for bound in ranges(case.graph, images.split(8), method)["images"].range_value)
    if method == "minmax":
        assert (low, high) == pytest.approx((images.min().item(), 40), abs=1e-5)
    else:  # the search by entropy may keep an odd value, percentiles do not
        assert -5 < low < -2 and 2 < high < (39 if method == "percentile" else 40.001)


def test_weights_are_per_channel_and_symmetric(case):
    model = quantised(case.graph, case.found)
    values = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    weights = [
        n
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and values.get(n.input[0], np.float32(0)).dtype == np.int8
    ]
    assert len(weights) == sum(
        n.op_type in ("Conv", "Gemm", "MatMul") for n in case.graph.onnx.graph.node if n.name in int8_nodes(case.graph)
    )
    for node in weights:
        scales, zeros = values[node.input[1]], values[node.input[2]]
        assert scales.ndim == 1 and len(scales) > 1 and not zeros.any()
        axis = next(a.i for a in node.attribute if a.name == "axis")
        largest = np.abs(values[node.input[0]].astype(int)).max(
            axis=tuple(i for i in range(values[node.input[0]].ndim) if i != axis)
        )
        assert (largest == 127).mean() > 0.9  # but for channels without weights
    (logits,) = [n for n in model.graph.node if "logits" in n.output]
    assert logits.op_type == "Gemm"  # in float32, not rounded to 256 numbers


def test_what_stays_in_float_and_its_share(case):
    macs = multiply_adds(case.graph, (3, SIZE, SIZE))
    from scalekd.cost.flops import flop_counter

    with torch.no_grad(), flop_counter() as counter:
        case.graph.folded.student(case.images[:1])
    assert sum(macs.values()) == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
    left = {kind["operator"]: kind for kind in left_in_float(case.graph, (3, SIZE, SIZE))}
    if case.graph.view.name == "test_resnet":
        assert "Conv" not in left and "Relu" not in left and sum(kind["share"] for kind in left.values()) == 0
    else:  # the two products of attention, and what follows linear layers
        assert 0 < left["MatMul"]["share"] < 0.2 and left["LayerNormalization"]["share"] == 0
        assert left["MatMul"]["count"] == 2 * len(case.student.blocks)


@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_efficientnet"])
def test_folding(name):
    student, images = student_of(name), torch.randn(4, 3, SIZE, SIZE)
    folded = fold_batch_norms(student, images)
    norms = [n for n, m in student.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(norm for _, norm in folded.pairs) == sorted(norms)
    with torch.no_grad():
        torch.testing.assert_close(folded.student(images), student(images), atol=1e-4, rtol=1e-4)
        for parameter in folded.student.parameters():
            parameter.mul_(1.1)
        plain = student_of(name)
        unfold(folded.student.state_dict(), folded.pairs, plain)
        torch.testing.assert_close(plain.eval()(images), folded.student(images), atol=1e-3, rtol=1e-3)


def test_an_output_used_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            nn.init.normal_(self.norm.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.norm(x) + x

    assert fold_batch_norms(Twice().eval(), torch.randn(2, 3, 8, 8)).pairs == []


def test_rounding_by_hand():
    x = torch.tensor([[-1.0, 0.0, 0.24, 0.26, 3.0, 200.0]])
    activation = FakeActivation(Place(0.5, 2))
    expected = (np.clip(np.round(x.numpy() / 0.5) + 2, 0, 255) - 2) * 0.5
    np.testing.assert_allclose(activation(x).detach(), expected, rtol=1e-6)
    activation.most = 0.25
    assert activation.place == Place(0.25, 2)

    weight = torch.tensor([[0.5, -1.0, 0.111], [0.0, 0.0, 0.0], [3.0, 1.0, -2.0]])
    scale = np.array([[1 / 127], [1.0], [3 / 127]])
    np.testing.assert_allclose(FakeWeight()(weight), np.round(weight.numpy() / scale) * scale, atol=1e-6)

    bias = torch.tensor([0.1234567, 1.0, -0.5], requires_grad=True)
    step = 0.25 * scale[[0, 2], 0]
    rounded = FakeBias(activation)(bias, weight)
    np.testing.assert_allclose(
        rounded.detach()[[0, 2]], np.round(bias.detach().numpy()[[0, 2]] / step) * step, atol=1e-6
    )
    rounded.sum().backward()
    assert torch.equal(bias.grad, torch.ones(3))


def test_a_scale_that_is_learnt_gets_its_gradient():
    """As in LSQ: the difference of the rounded and the exact value inside the range, the bound outside."""
    activation = FakeActivation(Place(0.5, 0))
    x = torch.tensor([[0.2, 1.3, 500.0, -3.0]], requires_grad=True)
    activation(x).sum().backward()
    inside = (round(0.2 / 0.5) - 0.2 / 0.5) + (round(1.3 / 0.5) - 1.3 / 0.5)
    expected = (inside + 255 + 0) * 0.5 / np.sqrt(4 * 255)  # by the chain rule of the logarithm
    assert activation.log_scale.grad.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(x.grad, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_onnx_is_readable_by_the_checker(case):
    onnx.checker.check_model(quantised(case.graph, case.found))
