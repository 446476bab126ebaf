"""Which operators of a student stay in float32, with their share of the multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch

from scalekd.models.student_file import onnx_runtime

from .graph import IMAGES, Graph
from .onnx_quantiser import int8_nodes

MOVES = {  # operators that calculate nothing, or shapes only
    *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Pad", "Range", "Reshape"),
    *("Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}  # fmt: skip
MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul")

Left = dict[str, Any]  # operator, count, share of the multiply-adds


def left_in_float(graph: Graph, image_shape: tuple[int, ...]) -> list[Left]:
    """The operators that the quantiser leaves in float32, by kind, those with the most multiply-adds first."""
    chosen = set(int8_nodes(graph))
    macs = multiply_adds(graph, image_shape)
    total = sum(macs.values()) or 1
    kinds: dict[str, Left] = {}
    for node in graph.onnx.graph.node:
        if node.name in chosen or node.op_type in MOVES:
            continue
        entry = kinds.setdefault(node.op_type, {"operator": node.op_type, "count": 0, "share": 0.0})
        entry["count"] += 1
        entry["share"] += macs.get(node.name, 0) / total
    return sorted(kinds.values(), key=lambda kind: (-kind["share"], -kind["count"], kind["operator"]))


def multiply_adds(graph: Graph, image_shape: tuple[int, ...]) -> dict[str, int]:
    """Multiply-adds for one image, by the name of a node of `MULTIPLYING`. The shapes are those of a real pass."""
    nodes = [node for node in graph.onnx.graph.node if node.op_type in MULTIPLYING]
    weights = {weight.name: tuple(weight.dims) for weight in graph.onnx.graph.initializer}
    shapes = weights | _shapes(
        graph, {name for node in nodes for name in (*node.input, *node.output)} - {*weights, ""}, image_shape
    )
    return {node.name: _count(node, shapes) for node in nodes}


def _count(node: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    given, weight, made = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        return math.prod(made) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(given) * math.prod(weight[1:])
    across = next((a.i for a in node.attribute if a.name == "transA"), 0)
    return math.prod(made) * given[-2 if across else -1]


def _shapes(graph: Graph, tensors: Collection[str], image_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    from onnx import TensorProto, helper

    model = type(graph.onnx).FromString(graph.onnx.SerializeToString())
    known = {value.name for value in (*model.graph.output, *model.graph.input)}
    wanted = sorted(tensors)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted if name not in known
    )
    session = onnx_runtime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.zeros(1, *image_shape).numpy()
    asked = [name for name in wanted if name != IMAGES]
    found = dict(zip(asked, (tuple(value.shape) for value in session.run(asked, {IMAGES: images}))))
    return found | {IMAGES: (1, *image_shape)}
