"""Runs that read stored teacher outputs end bit for bit like runs that compute them."""

from __future__ import annotations

import os

import pytest
import torch
from whole_runs import CPU, Interrupted, assert_same, changed, final_state, start

from scalekd.cli.app import main
from scalekd.common.errors import UserError
from scalekd.common.sections import to_yaml
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.distill.teacher_outputs import TeacherOutputs, outputs_name
from scalekd.models.weights.trained import Loaded
from scalekd.train.log import read_log

ALL = {"ce": {}, "kd": {}, "scalekd": {}, "srrl": {}}  # logits, maps, the last stage run on, the classifier
TEACHERS = [
    {"model": "test_vit", "kwargs": {"depth": 4}, "weights": "random"},  # tokens: strides of channels last
    {"model": "test_convnext", "kwargs": {}, "weights": "random"},  # maps as they are
    {"model": "test_vit", "kwargs": {"depth": 4}, "weights": "random", "precision": "bf16"},
]


@pytest.fixture
def recipe(tiny_recipe):
    """`recipe(**sections)`: the tiny one, changed."""
    return lambda **sections: changed(tiny_recipe, **sections)


def run_with(recipe, folder, outputs=None):
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(check_config(recipe, "test")))
    options = ["--teacher-outputs", str(outputs)] if outputs else []
    assert main(["train", str(file), "--out", str(folder), "--no-preflight", "--device", "cpu", *options]) == 0
    read = [e for e in read_log(folder) if e["event"] == "teacher_outputs"]
    return torch.load(folder / "last.pt", weights_only=False), (read[-1] if read else None)


@pytest.mark.parametrize("teacher", TEACHERS, ids=["tokens", "maps", "half"])
def test_read_equals_computed_to_the_last_bit(recipe, tmp_path, teacher):
    text = recipe(losses=ALL, teacher=teacher, train={"epochs": 1, "accumulate": 2}, data={"image_size": 64})
    alone, _ = run_with(text, tmp_path / "alone")
    first, counts = run_with(text, tmp_path / "first", tmp_path / "outputs")
    assert counts["computed"] and not counts["read"]
    second, counts = run_with(text, tmp_path / "second", tmp_path / "outputs")
    assert counts["computed"] == 1 and counts["read"]  # the first defines the layout of a record
    for part in ("student", "methods", "optimizer"):
        assert_same(first[part], alone[part])
        assert_same(second[part], alone[part])


TOP = {"model": "test_vit", "kwargs": {"depth": 4}, "weights": "random", "top_k": 2}  # of three classes
LOGITS = {"ce": {}, "kd": {"temperature": 2.0}, "dkd": {"temperature": 2.0}}


def test_a_run_on_the_largest_logits_is_the_same_without_and_with_a_file(recipe, tmp_path):
    text = recipe(losses=LOGITS, teacher=TOP, train={"epochs": 1})
    alone, _ = run_with(text, tmp_path / "alone")
    first, _ = run_with(text, tmp_path / "first", tmp_path / "outputs")
    second, counts = run_with(text, tmp_path / "second", tmp_path / "outputs")
    assert counts["computed"] == 1 and counts["read"] == 2
    (file,) = (tmp_path / "outputs").glob("*.outputs")
    assert file.stat().st_size == 3 * (8 + 8 * (1 + 2 * 2 + 4 + 4))  # 3 records of checksums and 8 images
    whole, _ = run_with(recipe(losses=LOGITS, teacher=TOP | {"top_k": None}, train={"epochs": 1}), tmp_path / "whole")
    for part in ("student", "optimizer"):
        assert_same(first[part], alone[part])
        assert_same(second[part], alone[part])
    assert any(not torch.equal(a, b) for a, b in zip(whole["student"].values(), alone["student"].values()))


def test_a_run_on_the_largest_logits_resumes_exactly(recipe, tmp_path):
    text = recipe(losses=LOGITS, teacher=TOP, train={"save_minutes": 0})
    with pytest.raises(Interrupted):
        start(text, tmp_path / "parts", 4)
    start(text, tmp_path / "parts")
    start(text, tmp_path / "whole")
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


def views(run, tmp_path, records=4):
    return TeacherOutputs(tmp_path, "name", run.distiller, records)


@pytest.fixture
def run(recipe):
    return build(check_config(recipe(losses=ALL), "test"), CPU)


@pytest.fixture
def run_of_top(recipe):
    return build(check_config(recipe(losses=LOGITS, teacher=TOP), "test"), CPU)


PIXELS = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_other_pixels_are_computed_and_do_not_change_the_record(run, tmp_path):
    views(run, tmp_path).features(1, PIXELS)
    again = views(run, tmp_path)
    other = again.features(1, PIXELS.flip(0))
    assert_same(other.logits, run.distiller.teacher_features(PIXELS.flip(0)).logits)
    again.features(1, PIXELS.flip(0))
    same = again.features(1, PIXELS)
    assert (again.computed, again.read) == (2, 1)
    assert_same(same.maps, run.distiller.teacher_features(PIXELS).maps)


@pytest.mark.parametrize("kind", ["run", "run_of_top"])
def test_a_damaged_record_is_computed_again(kind, request, tmp_path):
    run = request.getfixturevalue(kind)
    first = views(run, tmp_path)
    first.features(0, PIXELS)
    first.features(1, PIXELS)
    content = bytearray(first.path.read_bytes())
    content[first.size + 20] ^= 1  # in record 1
    first.path.write_bytes(content)
    again = views(run, tmp_path)
    again.features(3, PIXELS)
    assert_same(again.features(1, PIXELS).logits, run.distiller.teacher_features(PIXELS).logits)
    assert (again.computed, again.read) == (2, 0)
    again.features(0, PIXELS)
    assert again.read == 1


def test_two_processes_write_one_file(run_of_top, tmp_path):
    """Here two objects with one file each, which write in turns and read what the other one wrote."""
    both = [views(run_of_top, tmp_path), views(run_of_top, tmp_path)]
    pixels = [PIXELS.roll(i, -1) for i in range(4)]
    written = [both[i % 2].features(i, pixels[i]).logits for i in range(4)]
    for i in range(4):
        assert_same(both[(i + 1) % 2].features(i, pixels[i]).logits, written[i])
    assert [(of.computed, of.read) for of in both] == [(2, 2), (2, 2)]


def test_all_classes_in_half_precision_are_read_back(recipe, tmp_path):
    """Nothing says then which classes are kept: a tensor without elements, on which the second run ended in a traceback."""
    top = {"top_k": 3}
    run = build(check_config(recipe(teacher=top, losses={"ce": {}, "dist": {}}), "test"), CPU)
    outputs = views(run, tmp_path)
    first, again = (outputs.features(0, PIXELS) for _ in range(2))
    assert outputs.read == 1 and first.top[0].shape == again.top[0].shape == (3, 0)
    assert torch.equal(first.logits, again.logits) and len(first.logits.unique()) > 3


def test_runs_on_maps_do_not_enlarge_the_file_of_the_largest_logits(run_of_top, tmp_path):
    outputs = TeacherOutputs(tmp_path, "name", run_of_top.distiller, 4, losses=["kd", "scalekd"])
    assert not outputs.features(0, PIXELS).maps


def test_a_batch_of_another_size_is_computed(run, tmp_path):
    outputs = views(run, tmp_path)
    outputs.features(0, PIXELS)
    assert outputs.features(1, PIXELS[:2]).logits.shape[0] == 2
    assert outputs.features(1, PIXELS).logits.shape[0] == 3
    assert not outputs.read and outputs.computed == 3


def test_what_changes_the_teacher_or_its_pixels_changes_the_name(recipe):
    def name(sha256="a", head=None, device="cpu", tf32=False, **sections):
        config = check_config(recipe(**sections), "test")
        distiller = build(config, CPU).distiller
        config = config.model_copy(update={"train": config.train.model_copy(update={"tf32": tf32})})
        return outputs_name(config, distiller, Loaded({}, "file", sha256, 1, 1, 0.0, head), torch.device(device))

    first = name()
    assert name() == first == name(losses={"ce": {}, "fd": {}}) == name(optim={"lr": 0.5})
    others = [
        name(sha256="b"),
        name(head="another"),
        name(seed=1),
        name(device="cuda"),
        name(tf32=True),
        name(train={"precision": "bf16"}),
        name(augment={"flip": 0}),
        name(train={"batch_size": 4}),
        name(data={"image_size": 64}),
        name(teacher={"model": "test_vit2", "kwargs": {}, "weights": "random"}),
        *(name(teacher={"top_k": 2}, losses={"kd": {"temperature": t}}) for t in (1.0, 2.0)),
    ]
    assert len({first, *others}) == len(others) + 1


def test_a_full_disk_is_an_error_before_the_run(run, tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="GB free; choose another folder with `teacher_outputs`"):
        views(run, tmp_path, records=10**6).features(0, PIXELS)
    assert usage and not list(tmp_path.glob("*.outputs"))


def test_a_run_without_teacher_stores_nothing(recipe, tmp_path):
    text = recipe(losses={"ce": {}}, train={"epochs": 1}) | {"teacher": None}
    _, counts = run_with(text, tmp_path / "run", tmp_path / "outputs")
    assert counts is None and not (tmp_path / "outputs").exists()
