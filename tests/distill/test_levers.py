"""The settings of a step's speed and memory: half-precision teachers, streams, CUDA graphs, TF32, recomputed blocks."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor
from whole_runs import CPU, Interrupted, assert_same, changed, final_state, start

from scalekd.checks.preflight import preflight
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.data.batches import Batch
from scalekd.distill.build import build
from scalekd.distill.compiled import compile_step
from scalekd.distill.distiller import Distiller
from scalekd.distill.levers import move
from scalekd.distill.streams import SideStream
from scalekd.methods.names import METHODS
from scalekd.models.half import hold_in

SHORT: dict[str, dict[str, Any]] = {"crd": {"negatives": 16}, "diffkd": {"steps": 1}, "fd": {"projector": "conv"}}
# deit needs a student with a second head
ALL = {name: SHORT.get(name, {}) for name in METHODS if name != "deit"}
HALF = {"precision": "bf16"}


def randomised(losses: dict[str, Any]) -> Distiller:
    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=10, img_size=48, depth=4)
    student = timm.create_model("test_resnet", num_classes=10)
    distiller = Distiller(student, teacher, losses, image_size=(48, 48))
    with torch.no_grad():
        for p in (*teacher.parameters(), *student.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    return distiller.train()


def losses_of(distiller: Distiller, autocast: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    pixels, targets = torch.rand(4, 3, 48, 48), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = distiller(pixels, targets)
    losses["total"].backward()
    return losses


# ---------------------------------------------------------------- teacher.precision


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.02)])
def test_every_method_learns_from_a_teacher_in_half_precision(precision, tolerance):
    plain, half = randomised(ALL), randomised(ALL)
    hold_in(half.teachers["teacher"].view, precision)
    wanted, found = losses_of(plain), losses_of(half)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(wanted[name].item(), rel=tolerance, abs=0.02), name
    assert found["kd"] != wanted["kd"]
    for (name, a), b in zip(half.named_parameters(), plain.parameters()):
        assert a.grad.dtype == torch.float32 and a.grad.isfinite().all() and (a.grad.any() or not b.grad.any()), name
    under_autocast = losses_of(half, autocast=True)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in under_autocast.values())


def test_it_is_one_graph_for_the_compiler():
    losses = {"kd": {}, "tpp": {"norm": "layer"}}
    plain, compiled = randomised(losses), randomised(losses)
    for distiller in (plain, compiled):
        hold_in(distiller.teachers["teacher"].view, "bf16")
    torch._dynamo.reset()
    compile_step(compiled, 4, backend="eager", fullgraph=True)
    wanted, found = losses_of(plain, autocast=True), losses_of(compiled, autocast=True)
    assert {n: v.item() for n, v in found.items()} == pytest.approx({n: v.item() for n, v in wanted.items()})


def test_it_stays_in_half_precision_when_the_distiller_moves():
    distiller = randomised({"kd": {}})
    hold_in(distiller.teachers["teacher"].view, "bf16")
    distiller.to(torch.float64)
    assert {p.dtype for p in distiller.teachers["teacher"].view.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in distiller.student.parameters()} == {torch.float64}


def test_a_run_from_pre_flight_to_resume(tiny_recipe, tmp_path):
    losses = {"ce": {}, "kd": {}, "scalekd": {}, "srrl": {}}
    recipe = changed(tiny_recipe, teacher=HALF, losses=losses, train={"grad_checkpointing": True})
    start(recipe, tmp_path / "whole", check=True)
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "resumed", stop_at=4)
    start(recipe, tmp_path / "resumed")
    assert_same(*(final_state(tmp_path / name) for name in ("whole", "resumed")))
    start(changed(recipe, train={"grad_checkpointing": False}), tmp_path / "plain")
    states = [final_state(tmp_path / name) for name in ("whole", "plain")]
    assert_same(*({key: state[key] for key in ("student", "methods", "optimizer", "deployed")} for state in states))


# ---------------------------------------------------------------- train.streams


class Stream:
    """Stands in for a CUDA stream: records for which stream it waited."""

    def __init__(self, name: str, log: list[tuple[str, ...]]):
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for", other.name))


@pytest.fixture
def log(monkeypatch):
    """What streams and tensors are asked for, in order. `default` is the default stream, `side` the other."""
    made: list[tuple[str, ...]] = []
    default, side = Stream("default", made), Stream("side", made)

    @contextlib.contextmanager
    def on(stream: Stream):
        made.append((stream.name, "begins"))
        yield
        made.append((stream.name, "ends"))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, s: made.append((s.name, "uses", str(id(tensor)))))
    return made


def waits(log: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [event for event in log if event[1] != "uses"]


def test_a_step_waits_where_it_must_and_nowhere_else(log, tiny_recipe):
    recipe = changed(tiny_recipe, train={"streams": True}, augment={"mixup": 0.2})
    run = build(check_config(recipe, "test"), CPU)
    assert not log  # on a CPU there are no streams
    run.model.beside = SideStream(CPU)
    assert waits(log) == [("side", "waits for", "default")]  # the weights are on their way
    log.clear()
    batch = Batch(torch.randint(256, (8, 3, 48, 48), dtype=torch.uint8), torch.arange(8) % 3)
    run.losses(run.model, batch, 0)["total"].backward()
    given = [("side", "waits for", "default")] * 2  # the batch, which is on the device of this test already
    side = [("side", "begins"), ("side", "ends"), ("default", "waits for", "side")]
    assert waits(log) == given + side + side  # the copying, and the teacher, which waits for nothing


def test_without_a_teacher_the_images_are_copied_beside_the_student(log, tiny_recipe):
    """So that the rows of a comparison, of which one has no teacher, can have one setting."""
    recipe = changed(tiny_recipe, train={"streams": True}, losses={"ce": {}}) | {"teacher": None}
    run = build(check_config(recipe, "test"), CPU)
    run.model.beside = SideStream(CPU)
    log.clear()
    batch = Batch(torch.randint(256, (8, 3, 48, 48), dtype=torch.uint8), torch.arange(8) % 3)
    images, _ = run.inputs(batch)
    copied = waits(log).index(("default", "waits for", "side"))
    assert ("side", "begins") in waits(log)[:copied] and ("default", "uses", str(id(images))) in log


def test_tensors_of_another_origin_are_waited_for(log):
    beside = SideStream(CPU)
    log.clear()
    own, other = torch.rand(2), torch.rand(2)
    beside.join([own])
    assert log == [("default", "waits for", "side"), ("default", "uses", str(id(own)))]
    log.clear()
    with beside.work(own):
        pass
    assert log == [("side", "begins"), ("side", "ends")]
    log.clear()
    with beside.work(other):
        pass
    assert log[:2] == [("side", "waits for", "default"), ("side", "uses", str(id(other)))]


def test_every_tensor_of_the_features_is_kept_for_the_default_stream(log):
    distiller = randomised({"ce": {}, "kd": {}, "scalekd": {}, "srrl": {}})
    distiller.beside = SideStream(CPU)
    features = distiller.teacher_features(torch.rand(4, 3, 48, 48))
    log.clear()
    distiller.beside.join({"teacher": features})
    used = {event[2] for event in log if event[:2] == ("default", "uses")}
    tensors = [features.logits, features.final, features.pooled, *features.maps, *features.prefix]
    assert used == {str(id(t)) for t in tensors if t is not None}


def test_a_run_with_streams_is_the_run_without(tiny_recipe, tmp_path):
    recipe = changed(tiny_recipe, train={"epochs": 1})
    start(recipe, tmp_path / "plain")
    start(changed(recipe, train={"streams": True}), tmp_path / "streams")
    states = [final_state(tmp_path / name) for name in ("plain", "streams")]
    for state in states:
        del state["recipe"]
    assert_same(*states)


# ---------------------------------------------------------------- train.cuda_graphs, train.tf32


def test_cuda_graphs_are_asked_for_and_each_step_begins_anew(monkeypatch):
    asked: list[Any] = []
    begun: list[None] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    distiller = randomised({"ce": {}, "kd": {}})
    compile_step(distiller, 4)
    losses_of(distiller)
    assert not begun and not any(options["options"]["triton.cudagraphs"] for options in asked)
    asked.clear()
    compile_step(distiller, 4, cuda_graphs=True)
    losses_of(distiller)
    losses_of(distiller)
    assert len(begun) == 2 and all(options["options"]["triton.cudagraphs"] for options in asked) and len(asked) == 2


@pytest.mark.parametrize("setting", ["cuda_graphs", "tf32"])
def test_a_cpu_is_refused(tiny_recipe, setting):
    recipe = changed(tiny_recipe, train={setting: True, "compile": setting == "cuda_graphs"})
    with pytest.raises(UserError, match=rf"train\.{setting} needs a GPU; set train\.{setting}=false"):
        build(check_config(recipe, "test"), CPU)


@pytest.mark.parametrize(
    ("precision", "capability", "reason"),
    [("bf16", (9, 0), "this run has bf16"), ("float32", (7, 5), "Tesla T4 has no TF32")],
)
def test_tf32_on_a_gpu_that_has_no_use_for_it(tiny_recipe, monkeypatch, precision, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    config = check_config(changed(tiny_recipe, train={"tf32": True}), "test")
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    with pytest.raises(UserError, match=rf"train\.tf32.*{reason}"):
        move(randomised({"kd": {}}), config, torch.device("cuda", 0))


@pytest.mark.parametrize(("tf32", "asked"), [(True, "high"), (False, "highest")])
def test_tf32_is_set_for_every_run_on_a_gpu(tiny_recipe, monkeypatch, tf32, asked):
    found: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(Distiller, "to", lambda distiller, *_: distiller)
    config = check_config(changed(tiny_recipe, train={"tf32": tf32}), "test")
    move(randomised({"kd": {}}), config, torch.device("cuda", 0))
    assert found == [asked]


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"train": {"cuda_graphs": True}}, r"train\.cuda_graphs: .*only with train\.compile: true"),
        ({"train": {"cuda_graphs": True, "compile": True, "accumulate": 2}}, r"train\.cuda_graphs: not with train\.accumulate"),
        ({"train": {"cuda_graphs": True, "compile": True, "streams": True}}, r"train\.cuda_graphs: not with train\.streams"),
        ({"train": {"compile": True, "grad_checkpointing": True}}, r"train\.grad_checkpointing: not with train\.compile"),
        ({"train": {"tf32": True, "precision": "bf16"}}, r"train\.tf32: .*only with train\.precision: float32"),
        ({"student": {"precision": "bf16"}}, r"student\.precision: has no effect here.*set train\.precision"),
        ({"teacher": {"precision": "int8"}}, r"teacher\.precision: .*'bf16' or 'fp16'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_go_together(tiny_recipe, sections, problem):
    with pytest.raises(UserError, match=problem):
        check_config(changed(tiny_recipe, **sections), "test")


def test_another_name_of_a_precision(tiny_recipe):
    assert check_config(changed(tiny_recipe, teacher={"precision": "float16"}), "test").teacher.precision == "fp16"


def test_the_pre_flight_sees_a_teacher_that_overflows(tiny_recipe):
    """fp16 ends at 65,504: the accuracy check and the trial step use the teacher as training does."""
    run = build(
        check_config(changed(tiny_recipe, teacher={"precision": "fp16"}, losses={"ce": {}, "kd": {}}), "test"), CPU
    )
    with torch.no_grad():
        run.distiller.teachers["teacher"].view.model.head.weight.fill_(6e4)
        run.distiller.teachers["teacher"].view.model.norm.weight.fill_(6e4)
    screen = io.StringIO()
    with pytest.raises(UserError, match="NaN or infinite: kd"):
        preflight(run, Console(file=screen, width=200))
    assert "weights held in fp16" in screen.getvalue()
