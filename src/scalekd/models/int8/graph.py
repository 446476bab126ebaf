"""The graph of a student, twice from one trace: as ONNX for onnxruntime's quantiser, as a torch module for training.

Both have the same tensor names, so a place that the quantiser chooses in one is known in the other.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError, first_line
from scalekd.models.features import with_features
from scalekd.models.stages import StageView
from scalekd.models.student_file import CARD, FEATURES, LOGITS, TOLERANCE, example_images, onnx_runtime

from .fold import Folded, fold_batch_norms

IMAGES = "images"
ORIGIN = "pkg.torch.onnx.name_scopes"  # of an ONNX node: the modules around it, and last its torch node

Outputs = dict[str, Tensor]


class Graph(NamedTuple):
    """A student as a graph, without the batch norms that could be folded."""

    onnx: Any  # ModelProto, float32; outputs `logits` and, if the model has them, `features`
    module: torch.fx.GraphModule  # the same with gradients; it also returns the maps of the stages
    outputs: dict[str, int]  # logits, features, final, map1 to map4, prefix1 to prefix4 -> position in the result
    nodes: dict[str, str]  # ONNX tensor -> node of the module, where the names differ
    folded: Folded
    view: StageView  # of the folded student


def graph_of(
    student: nn.Module, card: dict[str, Any], cuts: Any = None, folded_weights: Outputs | None = None
) -> Graph:
    """The graph of a student with a classifier. Its names depend on the architecture only, not on the weights.

    cuts: as in the recipe. folded_weights: the state of the folded student, to use in place of its own. Raises
    `UserError` if the packages of `scalekd[onnx]` are missing or torch cannot export the model.
    """
    onnx_runtime(exporting=True)
    images = example_images(card)
    folded = fold_batch_norms(student, images)
    if folded_weights is not None:
        folded.student.load_state_dict(folded_weights)
    size = (card["image_size"][0], card["image_size"][1])
    view = StageView(folded.student, name=card["model"], image_size=size, cuts=cuts)
    outputs = _outputs_of(view, images)
    with torch.no_grad():
        values, expected = outputs(images), folded.student(images)
    if not torch.allclose(values[LOGITS], expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise UserError(f"{card['model']}: its logits change when its features are read, so it cannot be quantised")
    first = {id(value): name for name, value in reversed(values.items())}  # a tensor may have several names
    distinct = [name for name, value in values.items() if first[id(value)] == name]

    def forward(images: Tensor) -> tuple[Tensor, ...]:
        found = outputs(images)
        return tuple(found[name] for name in distinct)

    program = _exported(folded.student, forward, images, distinct, card)
    module = _module(program.exported_program)
    nodes = dict(zip(distinct, (node.name for node in results(module))))
    nodes[IMAGES] = next(node.name for node in module.graph.nodes if node.op == "placeholder")
    model = _kept(program.model_proto, [name for name in (LOGITS, FEATURES) if name in distinct])
    model.metadata_props.add(key=CARD, value=json.dumps(card))
    positions = {name: distinct.index(first[id(value)]) for name, value in values.items()}
    return Graph(model, module, positions, nodes, folded, view)


def results(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The nodes whose values a module returns, in order."""
    return list(next(node for node in module.graph.nodes if node.op == "output").all_input_nodes)


def _outputs_of(view: StageView, images: Tensor) -> Callable[[Tensor], Outputs]:
    """A function that gives the outputs of a student, by name."""
    student: Any = view.model
    if view.refusal is None:

        def from_stages(images: Tensor) -> Outputs:
            features = view(images, classifier=True)
            values = {LOGITS: features.logits, FEATURES: features.pooled, "final": features.final}
            values |= {f"map{i}": value for i, value in enumerate(features.maps, 1)}
            values |= {f"prefix{i}": value for i, value in enumerate(features.prefix, 1)}
            return {name: value for name, value in values.items() if value is not None}

        return from_stages
    both, plain = with_features(student), student.forward
    try:
        with torch.no_grad():
            both(images)
        return lambda images: dict(zip((LOGITS, FEATURES), both(images)))
    except Exception:  # models whose head does not take `pre_logits`, or does not pool
        return lambda images: {LOGITS: plain(images)}


def _exported(student: Any, forward: Callable[..., Any], images: Tensor, names: list[str], card: dict[str, Any]) -> Any:
    """torch's ONNX program of `forward`, which calls `student`. Raises `UserError`."""
    student.forward = forward  # not a module around it, whose parameters would have other names
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                student,
                (images,),
                dynamo=True,
                input_names=[IMAGES],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:  # torch raises anything on code that it cannot trace
        raise UserError(f"{card['model']} cannot be quantised: torch cannot export it: {first_line(error)}") from None
    finally:
        del student.forward


def _module(exported: Any) -> Any:
    """The traced program as a module with trainable parameters."""
    try:
        module = exported.module(check_guards=False)  # its guards would refuse images that the graph can take
    except TypeError:  # of older versions of torch, without guards
        module = exported.module()
    return module


def _kept(model: Any, outputs: list[str]) -> Any:
    """An ONNX model with some of its outputs, without the nodes and weights for the others, and without file names.

    torch writes the source lines of a node into its metadata, with the paths of this machine.
    """
    graph = model.graph
    by_name = {output.name: output for output in graph.output}
    needed = set(outputs)
    nodes = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.append(node)
    for node in nodes:
        scopes = [entry.value for entry in node.metadata_props if entry.key == ORIGIN]
        del node.metadata_props[:]
        for value in scopes:
            node.metadata_props.add(key=ORIGIN, value=value)
    weights = [weight for weight in graph.initializer if weight.name in needed]
    shapes = [value for value in graph.value_info if value.name in needed]
    parts = (graph.node, nodes[::-1]), (graph.initializer, weights), (graph.value_info, shapes)
    for field, values in (*parts, (graph.output, [by_name[name] for name in outputs])):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
    return model
