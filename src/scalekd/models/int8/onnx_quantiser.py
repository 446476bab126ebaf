"""Calls onnxruntime's quantiser: which operators of a student become int8, their ranges, and the QDQ file."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from scalekd.common.errors import UserError
from scalekd.models.student_file import onnx_runtime

from .graph import IMAGES, ORIGIN, Graph

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}  # ours -> onnxruntime's
CHUNK = 16  # images of which the histograms are made at a time: onnxruntime keeps all their activations in memory
WEIGHTED = {"Conv", "Gemm", "MatMul"}
PASSING = {"Relu", "Clip", "MaxPool"}  # int8 if their input is
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}


class Place(NamedTuple):
    """How a tensor between two operators is quantised: q = round(x / scale) + zero, from 0 to 255."""

    scale: float
    zero: int


def int8_nodes(graph: Graph) -> list[str]:
    """The names of the ONNX nodes that are quantised.

    Convolutions and linear layers with constant weights, and what follows convolutions without leaving int8: ReLU, max
    pooling, and sums of two int8 tensors. Linear layers give float32, because norms, activations and residual sums of
    transformers need it; so are attention's products of two activations. Weights are found by the torch operator that a
    node was made from, so that `FakeQuantised` quantises the same ones.
    """
    made_from = {node.name: operator_of(node) for node in graph.module.graph.nodes}
    constants = {weight.name for weight in graph.onnx.graph.initializer}
    known = {*made_from, *graph.nodes}
    chosen: list[str] = []
    int8: set[str] = set()  # tensors
    for node in graph.onnx.graph.node:
        origin = made_from.get(origin_of(node), "")
        ends = {node.input[0], *(node.output if node.op_type == "Conv" else ())}
        if node.op_type in WEIGHTED and node.input[1] in constants:
            wanted = origin in CONVOLUTIONS if node.op_type == "Conv" else origin == "linear"
            if not wanted or not ends <= known:
                continue
            int8 |= set(node.output) if node.op_type == "Conv" else set()
        elif (node.op_type in PASSING and node.input[0] in int8) or (node.op_type == "Add" and set(node.input) <= int8):
            int8 |= set(node.output)
        else:
            continue
        chosen.append(node.name)
    return chosen


def with_int32_bias(graph: Graph) -> set[str]:
    """The torch nodes whose bias the int8 file has as int32: those of convolutions and of linear layers on vectors."""
    chosen = set(int8_nodes(graph))
    return {origin_of(n) for n in graph.onnx.graph.node if n.name in chosen and n.op_type in ("Conv", "Gemm")}


def origin_of(node: Any) -> str:
    """The torch node that an ONNX node was made from; '' if torch does not say."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == ORIGIN), "")
    return scopes.rstrip("]'\"").rpartition("'")[2]


def operator_of(node: Any) -> str:
    """`conv2d` for a torch node of aten.conv2d.default or .padding."""
    return str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""


def ranges(graph: Graph, images: Iterable[Tensor], method: str) -> Any:
    """onnxruntime's ranges of all tensors of the graph on normalised images, batches of at most `CHUNK`.

    method: a key of `METHODS`.
    """
    with _quantisation() as tools, tempfile.TemporaryDirectory() as folder:
        calibrator = tools.calibrate.create_calibrator(
            _saved(graph.onnx, Path(folder)),
            [*WEIGHTED, *PASSING, "Add"],
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=getattr(tools.CalibrationMethod, METHODS[method]),
        )
        for batch in images:
            calibrator.collect_data(_Reader(iter([{IMAGES: batch.numpy()}])))
        return calibrator.compute_data()


class _Reader:
    """What onnxruntime takes batches from."""

    def __init__(self, batches: Iterator[dict[str, Any]]):
        self.batches = batches

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def quantised(graph: Graph, found: Any = None, places: Mapping[str, Place] | None = None) -> Any:
    """The int8 model (ModelProto), from `ranges` or from all its places.

    Raises `UserError` if the graph has other places, because another version of torch trained with them.
    """
    chosen = int8_nodes(graph)
    with _quantisation() as tools:
        if found is None:  # the quantiser wants a range for every tensor, also for one that takes over a scale
            ends = {end for node in graph.onnx.graph.node if node.name in chosen for end in (*node.input, *node.output)}
            unit = np.float32(0), np.float32(1)
            found = tools.calibrate.TensorsData(
                tools.CalibrationMethod.MinMax, dict.fromkeys(sorted(ends - {""}), unit)
            )
        overrides = {
            name: [
                {
                    "scale": np.array(place.scale, np.float32),
                    "zero_point": np.array(place.zero, np.uint8),
                    "quant_type": tools.QuantType.QUInt8,
                }
            ]
            for name, place in (places or {}).items()
        }
        model = type(graph.onnx).FromString(graph.onnx.SerializeToString())
        quantiser = tools.QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=tools.QuantType.QInt8,
            # unsigned: signed activations run at the speed of float32 in onnxruntime on x86
            activation_qType=tools.QuantType.QUInt8,
            tensors_range=found,
            nodes_to_quantize=chosen,
            nodes_to_exclude=[],
            op_types_to_quantize=[*WEIGHTED, *PASSING, "Add"],
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                "TensorQuantOverrides": overrides,
            },
        )
        quantiser.quantize_model()
        quantiser.model.topological_sort()
        model = quantiser.model.model
    if places is not None and places_of(model).keys() != places.keys():
        names = sorted(places_of(model).keys() ^ places.keys())
        raise UserError(
            f"the student's graph is another one than in training, at {', '.join(names[:3])}; use one version of torch"
        )
    for node in model.graph.node:
        del node.metadata_props[:]
    return model


def places_of(model: Any) -> dict[str, Place]:
    """The places of an int8 model, by the name of their tensor; without those that take over another one's scale."""
    values = {weight.name: _array(weight) for weight in model.graph.initializer}
    found: dict[str, Place] = {}
    taken: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] not in taken:
            taken.add(node.input[1])  # a max pooling has the scale of its input, and rounding twice changes nothing
            name = node.input[0].removesuffix("_QuantizeLinear_Input")  # of a tensor that is an output of the graph
            found[name] = Place(float(values[node.input[1]]), int(values[node.input[2]]))
    return found


def _array(weight: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(weight)


def _saved(model: Any, folder: Path) -> str:
    import onnx

    file = folder / "model.onnx"
    onnx.save(model, str(file))
    return str(file)


@contextlib.contextmanager
def _quantisation() -> Iterator[Any]:
    """onnxruntime's quantisation tools, without what they print and log."""
    onnx_runtime(exporting=True)
    import onnxruntime.quantization as tools

    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the search for thresholds prints how it goes
            yield tools
    finally:
        logger.setLevel(level)
