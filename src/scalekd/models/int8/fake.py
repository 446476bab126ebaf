"""A student that computes what its int8 file will compute, with gradients: quantisation-aware training."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.models.stages import Features, Shapes
from scalekd.models.student_file import FEATURES, LOGITS

from .graph import Graph
from .onnx_quantiser import CONVOLUTIONS, Place, operator_of, with_int32_bias

LEVELS = 255  # the largest number of an activation
WEIGHT_LEVELS = 127  # of a weight, in both directions


class FakeActivation(nn.Module):
    """Rounds a tensor to its 256 levels. The scale is learnt; the zero point stays."""

    def __init__(self, place: Place):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(place.scale)]))  # a step changes a scale by a share of it
        self.register_buffer("zero", torch.tensor([float(place.zero)]))
        self.most = math.inf  # of the scale of a clipped tensor: the int8 file has no clipping but the range

    zero: Tensor

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=self.most)

    @property
    def place(self) -> Place:
        return Place(self.scale.item(), int(self.zero.item()))

    def forward(self, x: Tensor) -> Tensor:
        # as in LSQ (arXiv:1902.08153): the gradient of a scale is summed over a tensor, and this keeps it at its size
        factor = 1 / math.sqrt(x[0].numel() * LEVELS)
        return torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, self.zero, 0, LEVELS, factor)


def weight_scale(weight: Tensor) -> Tensor:
    """The scale of each output channel, from its largest value, as the quantiser sets it."""
    largest = weight.detach().abs().flatten(1).amax(1)
    return (largest / WEIGHT_LEVELS).clamp(min=torch.finfo(weight.dtype).tiny)


class FakeWeight(nn.Module):
    """Rounds a weight to 255 levels for each output channel."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight_scale(weight)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS)


class FakeBias(nn.Module):
    """Rounds a bias to the products of an input's level and a weight's level, which the file adds it to as int32."""

    def __init__(self, given: FakeActivation):
        super().__init__()
        self.given = (given,)  # of the layer's input; in a tuple, because it is registered elsewhere

    def forward(self, bias: Tensor, weight: Tensor) -> Tensor:
        scale = self.given[0].scale.detach() * weight_scale(weight)
        return bias + ((bias / scale).round() * scale - bias).detach()


class FakeQuantised(nn.Module):
    """The graph of a student with rounded weights and activations. Gives logits of normalised images.

    Batch norms are folded, dropout and drop path are off in training too. `places` and the weights are what the int8 file
    gets, so its logits are equal up to a rounding here and there.
    """

    def __init__(self, graph: Graph, places: Mapping[str, Place]):
        super().__init__()
        self.graph = copy.deepcopy(graph.module)
        self.outputs = graph.outputs
        self.pairs = graph.folded.pairs
        self.placed = {name: f"activation_{name}" for name in places}  # tensor -> module of the graph
        self.classifier = _classifier_of(graph.folded.student)
        nodes = {node.name: node for node in self.graph.graph.nodes}
        at = {graph.nodes.get(name, name): FakeActivation(place) for name, place in places.items()}
        int32 = with_int32_bias(graph)
        for node in [n for n in nodes.values() if operator_of(n) in {*CONVOLUTIONS, "linear"}]:
            weight = node.args[1]
            node.update_arg(1, self._insert(f"weight_{node.name}", FakeWeight(), weight))
            if node.name in int32 and len(node.args) > 2 and node.args[2] is not None:
                bias = FakeBias(_scale_of(node.args[0], at))
                node.update_arg(2, self._insert(f"bias_{node.name}", bias, node.args[2], weight))
        for name, key in self.placed.items():
            node = nodes[graph.nodes.get(name, name)]
            at[node.name].most = _most(node)
            rounded = self._insert(key, at[node.name], node)
            node.replace_all_uses_with(rounded, delete_user_cb=lambda user, rounded=rounded: user is not rounded)
        self.graph.recompile()

    def _insert(self, name: str, module: nn.Module, *given: Any) -> Any:
        """A node that calls a module on other nodes, after the last of them."""
        self.graph.add_module(name, module)
        order = list(self.graph.graph.nodes)
        with self.graph.graph.inserting_after(max(given, key=order.index)):
            return self.graph.graph.call_module(name, given)

    def all_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Logits, features and maps by name, as `Graph.outputs` lists them."""
        values = self.graph(images)
        return {name: values[position] for name, position in self.outputs.items()}

    def forward(self, images: Tensor) -> Tensor:
        return self.graph(images)[self.outputs[LOGITS]]

    def train(self, mode: bool = True) -> FakeQuantised:
        self.training = mode  # the graph is the same in both modes, and refuses to be told
        return self

    def get_classifier(self) -> nn.Module:
        """The module that holds the parameters of the classifier."""
        return self.graph.get_submodule(self.classifier) if self.classifier else nn.Identity()

    def places(self) -> dict[str, Place]:
        """The learnt places, by tensor."""
        modules: dict[str, Any] = {name: self.graph.get_submodule(key) for name, key in self.placed.items()}
        return {name: module.place for name, module in modules.items()}

    def weights(self) -> dict[str, Tensor]:
        """The state of the folded student, before rounding, on the CPU."""
        own = tuple(f"{key}." for key in self.placed.values())
        state = self.graph.state_dict()
        return {name: value.detach().cpu() for name, value in state.items() if not name.startswith(own)}

    def put_on(self, device: torch.device) -> None:
        """Moves parameters, and constants that the graph creates, to a device."""
        self.to(device)
        for node in self.graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": device}
        self.graph.recompile()


def _scale_of(node: Any, at: Mapping[str, FakeActivation]) -> FakeActivation:
    """The place of a layer's input; that before a max pooling, whose output has the scale of its input."""
    while node.name not in at:
        node = node.args[0]
    return at[node.name]


def _most(node: Any) -> float:
    """The largest scale of a tensor that is clipped at 6, say."""
    if operator_of(node) in ("hardtanh", "clamp", "relu6"):
        high = node.args[2] if len(node.args) > 2 else 6.0 if operator_of(node) == "relu6" else None
        return float(high) / LEVELS if high is not None else math.inf
    return math.inf


def _classifier_of(student: Any) -> str:
    """The name of the student's classifier; '' if it has several or none."""
    classifier = student.get_classifier() if hasattr(student, "get_classifier") else None
    return next((name for name, module in student.named_modules() if module is classifier), "")


class GraphView:
    """Calls a fake-quantised student as `StageView` calls a timm model."""

    def __init__(self, model: FakeQuantised, name: str, shapes: Shapes, refusal: str | None):
        self.model, self.name, self.refusal = model, name, refusal
        self.shapes = replace(shapes, can_resume=False)

    def __call__(
        self, images: Tensor, maps: bool = True, resumable: bool = False, classifier: bool = False
    ) -> Features:
        if resumable or (maps and self.refusal):
            raise ValueError(self.refusal or f"{self.name} is quantised and cannot run from a stage to its end.")
        if not maps:
            return Features(self.model(images))
        found = self.model.all_outputs(images)
        stages = tuple(found[f"map{i}"] for i in (1, 2, 3, 4))
        prefix = tuple(found.get(f"prefix{i}") for i in (1, 2, 3, 4))
        return Features(
            found[LOGITS], stages, found["final"], prefix, pooled=found.get(FEATURES) if classifier else None
        )
