"""What a step costs: against formulas by hand, a step counted in one piece, and what autograd must keep."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import whole_runs
from parts import assert_the_parts_add_up
from torch import nn
from whole_runs import changed

from scalekd.config.recipe import check_config
from scalekd.cost.attribution import Ledger, charge_step
from scalekd.cost.count import cost
from scalekd.distill.distiller import Distiller

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "cost"
LOSSES = {"ce": {}, "kd": {}, "scalekd": {"shared": False, "expansion": 4}}  # two projectors a path, two passes
TINY = changed(copy.deepcopy(whole_runs.TINY), losses=LOSSES)


def counted(**changes: Any) -> dict[str, Any]:
    return cost(check_config(changed(copy.deepcopy(TINY), **changes), "test"), classes=10)


def vit(depth: int, width: int = 32) -> dict[str, Any]:
    kwargs = {"depth": depth, "embed_dim": width, "num_heads": 2, "patch_size": 8, "class_token": False}
    return {"model": "vit_tiny_patch16_224", "kwargs": kwargs | {"global_pool": "avg"}}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return counted()


def tiny_distiller() -> Distiller:
    student = timm.create_model("test_resnet", num_classes=10)
    teacher = timm.create_model("test_vit", num_classes=10, img_size=48, depth=4)
    return Distiller(student, teacher, TINY["losses"], image_size=(48, 48))


# ---------------------------------------------------------------- the parts


def test_parameters_are_those_of_a_real_distiller(tiny):
    real = tiny_distiller()
    parts = tiny["step"]["parts"]
    assert parts["student"]["params"] == sum(p.numel() for p in real.student.parameters())
    assert parts["teacher"]["params"] == sum(p.numel() for p in real.teacher_view.model.parameters())
    for name, method in real.methods.items():
        assert parts[name]["params"] == sum(p.numel() for p in method.parameters())
    caps = {
        f"{kind}.{view}": sum(p.numel() for p in cap.parameters())
        for kind in ("student_caps", "proxy_caps")
        for view, cap in getattr(real.methods["scalekd"], kind).items()
    }
    assert tiny["projectors"] == {"scalekd": caps} and len(caps) == 4
    held = [*real.parameters(), *real.buffers()]
    held += [*real.teacher_view.model.parameters(), *real.teacher_view.model.buffers()]
    fixed = tiny["step"]["fixed_mb"]
    assert fixed["weights"] == pytest.approx(sum(t.numel() * t.element_size() for t in held) / 1e6)
    trained = sum(p.numel() for p in real.parameters())
    assert fixed["gradients"] == pytest.approx(4 * trained / 1e6)
    assert fixed["optimizer"] == pytest.approx(8 * trained / 1e6, rel=1e-3)  # AdamW: two moments, and step counts


@pytest.mark.parametrize("losses", [TINY["losses"], {"ce": {}, "tpp": {}, "srrl": {}, "reviewkd": {}}])
def test_the_parts_add_up_to_a_step_in_one_piece(losses):
    torch.manual_seed(0)
    distiller = tiny_distiller()
    distiller = Distiller(distiller.student, distiller.teacher_view.model, losses, image_size=(48, 48)).train()
    assert_the_parts_add_up(distiller)


def test_without_values_as_with_them(tiny):
    distiller = tiny_distiller().train()
    ledger = Ledger(
        [*distiller.parameters(), *distiller.buffers(), *distiller.teacher_view.model.state_dict().values()]
    )
    charge_step(distiller, torch.rand(8, 3, 48, 48), torch.randint(10, (8,)), ledger, half=False)
    assert tiny["batch"] == 8 and ledger.macs.keys() == tiny["step"]["parts"].keys()
    for name, (forward, backward) in ledger.macs.items():
        part = tiny["step"]["parts"][name]
        assert (part["forward"], part["backward"]) == pytest.approx((forward / 8e9, backward / 8e9))
        assert part["saved_mb"] == pytest.approx(ledger.saved.get(name, 0) / 8e6, rel=1e-3)


def test_no_backward_of_the_teacher_but_of_the_proxy_path(tiny):
    parts = tiny["step"]["parts"]
    assert parts["teacher"]["forward"] > 0 and parts["teacher"]["backward"] == parts["teacher"]["saved_mb"] == 0
    proxy = parts["scalekd: through the teacher"]
    # two views through the last of four blocks; backward to the input alone, so the linear layers cost as much again
    assert proxy["forward"] > parts["teacher"]["forward"] / 4
    assert proxy["forward"] <= proxy["backward"] < 1.5 * proxy["forward"] and proxy["saved_mb"] > 0
    assert proxy["params"] == 0


def test_fd_beside_itself_is_one():
    found = counted(losses={"ce": {}, "fd": {}})
    assert found["ratio"] == {"gmacs": 1.0, "saved_mb": 1.0, "memory_mb": 1.0}


def test_a_recipe_without_a_teacher():
    found = counted(teacher=None, losses={"ce": {}}, optim={"name": "momentum"})
    assert found["step"]["fixed_mb"]["optimizer"] == pytest.approx(4 * found["step"]["total"]["params"] / 1e6)
    assert found["ratio"] is None and found["fd"] is None and found["teacher"] is None
    assert found["step"]["parts"].keys() == {"student", "ce"} and found["no_fd"] == "the recipe has no teacher"


# ---------------------------------------------------------------- by hand


def test_a_vit_and_its_linear_projector_by_formula():
    depth, width, n = 4, 32, 36
    found = counted(student=vit(depth), teacher=vit(depth, 64) | {"weights": "random"}, losses={"ce": {}, "fd": {}})

    def linear(width: int) -> int:
        return depth * 12 * n * width**2

    def attention(width: int) -> int:
        return depth * 2 * n**2 * width

    stem, head = n * 3 * 8**2 * width, 10 * width
    student, teacher = found["step"]["parts"]["student"], found["step"]["parts"]["teacher"]
    assert teacher["forward"] * 1e9 == pytest.approx(linear(64) + attention(64) + 2 * stem + 2 * head)
    assert student["forward"] * 1e9 == pytest.approx(linear(width) + attention(width) + stem + head)
    # each product's two gradients, but none for the pixels; attention computes its weights once more: 5 products for 2
    backward = 2 * linear(width) + 2.5 * attention(width) + stem + 2 * head
    assert student["backward"] * 1e9 == pytest.approx(backward)
    fd = found["step"]["parts"]["fd"]
    assert fd["params"] == 32 * 64 + 64
    assert (fd["forward"] * 1e9, fd["backward"] * 1e9) == pytest.approx((n * 32 * 64, 2 * n * 32 * 64))


def test_a_resnet_by_its_convolutions(tiny):
    macs: list[int] = []
    student = timm.create_model("test_resnet", num_classes=10).eval()
    for layer in student.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda m, _, out: macs.append(out.shape[2] * out.shape[3] * m.weight.numel()))
    student(torch.rand(1, 3, 48, 48))
    head = student.num_features * 10
    part = tiny["step"]["parts"]["student"]
    assert part["forward"] * 1e9 == pytest.approx(sum(macs) + head)
    assert part["backward"] * 1e9 == pytest.approx(2 * (sum(macs) + head) - macs[0])  # none for the pixels


def test_saved_bytes_of_two_layers_by_hand():
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    x = torch.randn(3, 5)
    ledger = Ledger(net.parameters())
    with ledger.open():
        ledger.on("net")
        hidden = net[1](net[0](x))
        y = net[2](hidden)
        ledger.on("loss")
        loss = (hidden[0] * y.sum()).sum()
        ledger.on("net", backward=True)
        loss.backward()
    # the input for the first weight; the ReLU's result, for itself and the second weight: one storage, counted once
    assert ledger.saved["net"] == 4 * (3 * 5 + 3 * 7)
    assert ledger.saved["loss"] == 4  # y's sum; the other factor is a row of what is held already
    assert ledger.macs["net"] == [3 * 5 * 7 + 3 * 7 * 2, 3 * 5 * 7 + 2 * 3 * 7 * 2]


def test_half_precision_keeps_less():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 3, bias=False))
    saved = {}
    for half in (False, True):
        ledger = Ledger(net.parameters())
        with ledger.open(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            ledger.on("net")
            net(torch.randn(1, 4, 10, 10))
        saved[half] = ledger.saved["net"]
    maps, weights = 4 * 10 * 10 + 8 * 8 * 8, 8 * 4 * 9 + 2 * 8 * 9
    assert saved == {False: 4 * maps, True: 2 * (maps + weights)}  # autocast keeps its copies of the weights


# ---------------------------------------------------------------- the command


def test_the_command_opens_no_data_and_writes_what_it_shows(cli, recipe_file, tmp_path):
    out = tmp_path / "out"
    words = ("cost", recipe_file, "data.train=/nowhere", "losses={ce: {}, tpp: {}}", "--classes", 10, "--batch", 6)
    shown = cli(*words, "--out", out)
    assert shown.code == 0 and "through the teacher" in shown.out and "the same pair with fd" in shown.out
    written = json.loads((out / "tiny.json").read_text())
    assert written["batch"] == 6 and written["classes"] == 10
    text = (out / "tiny.md").read_text()
    assert f"{written['ratio']['gmacs']:.2f} times the GMACs" in text and text.count("\n| ") >= 7
    assert sorted(p.name for p in out.iterdir()) == ["tiny.json", "tiny.md"]


def test_real_steps(cli, recipe_file):
    result = cli("cost", recipe_file, "losses.scalekd=off", "--measure", "--device", "cpu", "--classes", 10, "--json")
    measured = json.loads(result.out)["measured"]
    assert measured["seconds"].keys() == {"recipe", "fd", "student alone", "teacher forward"}
    assert measured["ratio"].keys() == {"fd", "student alone", "teacher forward"} and measured["batch"] == 4
    for middle, least, most in (*measured["seconds"].values(), *measured["ratio"].values()):
        assert 0 < least <= middle <= most


def test_errors(cli, recipe_file):
    result = cli("cost", recipe_file, "--batch", 1)
    assert result.code == 2 and "`--batch` 1: must be 2 or more" in result.err
    result = cli("cost", recipe_file, "--classes", 0)
    assert result.code == 2 and "`--classes` 0: must be 1 or more" in result.err
    result = cli("cost", recipe_file, "student.kwargs={depht: 3}")
    assert result.code == 2 and "student.kwargs" in result.err and "Traceback" not in result.err


# ---------------------------------------------------------------- what the docs show

DOCUMENTED = sorted(RESULTS.glob("*.json"))


@pytest.mark.parametrize("name", [path.stem for path in DOCUMENTED])
def test_the_docs_show_what_the_results_hold(name):
    """The row `| ... | [name](...) | ratios | memory |` of docs/how-to/cost.md, and the shape of the file."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    row = re.search(
        rf"^\|.*\(../results/cost/{name}\.md\).*$", (ROOT / "docs" / "how-to" / "cost.md").read_text(), re.MULTILINE
    )
    assert row, f"docs/how-to/cost.md does not show {name}"
    cells = [cell.strip() for cell in row[0].strip("|").split("|")]
    ratio, step = found["ratio"], found["step"]
    wanted = [f"{step['total']['gmacs']:.1f}", f"{ratio['gmacs']:.2f}", f"{step['total']['saved_mb']:.0f}"]
    wanted += [f"{step['memory_mb'] / 1e3:.2f}", f"{ratio['memory_mb']:.2f}"]
    assert cells[1:6] == wanted
