"""`balance`: each feature loss pulls at the student's backbone as hard as its weight says, exactly also after a stop."""

from __future__ import annotations

import io

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from whole_runs import CPU, Interrupted, assert_same, changed, events, final_state, start

from scalekd.checks.gradients import gradient_check, length_check
from scalekd.checks.preflight import preflight
from scalekd.config.recipe import check_config
from scalekd.distill.balance import Balance, Gradients, backbone_parameters
from scalekd.distill.build import build

ONE = torch.ones(())


def quadratic(student: nn.Linear, factors: dict[str, float]) -> dict[str, Tensor]:
    """Losses whose gradients at the weights of a linear layer are known: factor * weights."""
    terms = {name: factor * 0.5 * student.weight.square().sum() for name, factor in factors.items()}
    return terms | {"total": torch.stack(list(terms.values())).sum()}


def test_norms_and_factors_by_hand():
    student = nn.Linear(2, 1, bias=False)
    nn.init.constant_(student.weight, 3.0)  # norm sqrt(18)
    balance = Balance({"ce": 2.0, "kd": 3.0, "fd": 0.5}, ["ce", "kd"], every=10, momentum=0.9)
    assert balance.factors().tolist() == [2.0, 3.0, 0.0]  # nothing is known yet
    terms = quadratic(student, {"ce": 1.0, "kd": -0.5, "fd.s3": 10.0, "fd.s4": 30.0})
    balance.measure(terms, list(student.parameters()), ONE)
    balance.update(ONE)
    norm = 18**0.5  # 2 of ce - 1.5 of kd: half of it is the reference
    torch.testing.assert_close(balance.log_norms.exp(), torch.tensor([norm, norm / 2, 40 * norm, norm / 2]))
    torch.testing.assert_close(balance.factors(), torch.tensor([2.0, 3.0, 0.5 / 80]))
    torch.testing.assert_close(balance.shares(), torch.tensor([2.0, 1.5, 0.25]) / 3.75)
    scaled = balance.scaled(terms)
    assert scaled["kd"].item() == pytest.approx(3.0 * -0.5 * 9, rel=1e-5)
    assert scaled["fd.s4"].item() == pytest.approx(0.5 / 80 * 30 * 9, rel=1e-5)
    assert scaled["total"].item() == pytest.approx(sum(v.item() for k, v in scaled.items() if k != "total"), rel=1e-6)


def test_the_running_mean_by_hand():
    """The first measurements are averaged, then each new one counts a tenth; of logarithms, so by ratios."""
    student = nn.Linear(1, 1, bias=False)
    nn.init.ones_(student.weight)
    meter = Gradients(["fd"], every=1, momentum=0.5)
    for factor, expected in ((1.0, 1.0), (4.0, 2.0), (8.0, 4.0), (4.0, 4.0)):
        meter.measure(quadratic(student, {"fd": factor}), [student.weight], ONE)
        meter.update(ONE)
        assert meter.log_norms.exp().item() == pytest.approx(expected, rel=1e-5)


def test_two_micro_batches_are_summed_before_the_norm():
    student = nn.Linear(1, 1, bias=False)
    nn.init.ones_(student.weight)
    meter = Gradients(["fd"], every=1, momentum=0.9)
    for factor in (5.0, -2.0):
        meter.measure(quadratic(student, {"fd": factor}), [student.weight], ONE)
    meter.update(ONE)
    assert meter.log_norms.exp().item() == pytest.approx(3.0, rel=1e-5)


def test_a_scale_for_half_precision_changes_nothing_and_an_overflow_is_skipped():
    student = nn.Linear(2, 1, bias=False)
    meter = Gradients(["ce", "fd"], every=1, momentum=0.9)
    scale = torch.tensor(2.0**16)
    meter.measure(quadratic(student, {"ce": 1.0, "fd": 3.0}), [student.weight], scale)
    meter.update(scale)
    before = meter.log_norms.clone()
    assert (before[1] - before[0]).exp().item() == pytest.approx(3.0, rel=1e-5)
    meter.measure(quadratic(student, {"ce": 1.0, "fd": float("inf")}), [student.weight], scale)
    meter.update(scale)
    assert meter.log_norms.isfinite().all() and meter.log_norms[1] == before[1] and meter.counts.tolist() == [2, 1]


def test_a_classifier_of_zeros_hides_the_reference_at_first():
    """As of an MLP-Mixer at its initial weights: its cross-entropy does not reach the backbone."""
    balance = Balance({"ce": 1.0, "fd": 1.0}, ["ce"], every=1, momentum=0.9)
    student = nn.Linear(1, 1, bias=False)
    nn.init.ones_(student.weight)
    for ce, expected in ((0.0, [1.0, 0.0]), (2.0, [1.0, 0.5])):
        balance.measure(quadratic(student, {"ce": ce, "fd": 4.0}), [student.weight], ONE)
        balance.update(ONE)
        torch.testing.assert_close(balance.factors(), torch.tensor(expected))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "resmlp_12_224"])
def test_the_backbone_is_all_but_the_classifier(name):
    with torch.device("meta"):
        student = timm.create_model(name, num_classes=7)
    classifier = {id(p) for p in student.get_classifier().parameters()}
    backbone = {id(p) for p in backbone_parameters(student)}
    assert classifier and not classifier & backbone and classifier | backbone == {id(p) for p in student.parameters()}


# ---------------------------------------------------------------- in a run


def norms_of(run, terms: dict[str, Tensor]) -> dict[str, float]:
    """The norm of the gradient of each loss, and of ce and kd together, at the backbone, apart from the product."""
    norms = {}
    for name in (*run.model.methods, "ce+kd"):
        total = sum(value for term, value in terms.items() if term.split(".")[0] in name.split("+"))
        gradients = torch.autograd.grad(total, backbone_parameters(run.student), retain_graph=True, allow_unused=True)
        norms[name] = sum(g.square().sum().item() for g in gradients if g is not None) ** 0.5
    return norms


def balanced(recipe, **weights):
    losses = {name: {"weight": weights.get(name, 1.0)} for name in ("ce", "kd", "scalekd")}
    return changed(recipe, losses=losses, balance={"every": 2})


def test_each_loss_pulls_as_its_weight_says(tiny_recipe):
    """Also with two teachers, of which one has a hundred times the features: neither drowns the other."""
    teachers = dict.fromkeys(("a", "b"), tiny_recipe["teacher"])
    recipe = changed(tiny_recipe, losses={"ce": {}, "kd": {"weight": 0.5}, "fd": {"weight": 0.4}}, balance={})
    recipe = {key: value for key, value in recipe.items() if key != "teacher"} | {"teachers": teachers}
    run = build(check_config(recipe, "test"), CPU)
    with torch.no_grad():
        run.model.teachers["b"].view.model.norm.weight.mul_(100)
    run.model.train()
    batch = next(run.train_batches(run.train_sampler(steps=1), 0))
    for micro in (0, 101):  # measured, then not
        torch.manual_seed(0)
        terms = run.losses(run.model, batch, micro)
    norms = norms_of(run, terms)
    assert run.model.gradients.factors()[:2].tolist() == [1.0, 0.5]  # as without `balance`
    reference = norms.pop("ce+kd")
    assert norms["fd@a"] / reference == pytest.approx(0.2, rel=0.02)
    assert norms["fd@b"] / reference == pytest.approx(0.2, rel=0.02)
    shares = run.gradient_shares()
    assert shares == {name: pytest.approx(norm / sum(norms.values()), rel=0.02) for name, norm in norms.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_is_the_uninterrupted_one(random_recipe, tmp_path, accumulate):
    recipe = balanced(
        changed(random_recipe, data={"workers": 0}, train={"accumulate": accumulate, "save_minutes": 0, "epochs": 3})
    )
    start(recipe, tmp_path / "whole")
    for stop in (1, 3, 6):
        with pytest.raises(Interrupted):
            start(recipe, tmp_path / "parts", stop)
    start(recipe, tmp_path / "parts")
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    assert final_state(tmp_path / "whole")["balance"]["counts"].tolist() == [7, 7, 7, 7]  # steps 0 to 4, 6, 8
    shares = [[e["gradient_shares"] for e in events(tmp_path / part, "step")] for part in ("parts", "whole")]
    assert shares[0] == shares[1] and len(shares[0]) == 9


def test_measuring_alone_changes_nothing(tiny_recipe, tmp_path):
    plain = start(tiny_recipe, tmp_path / "plain")
    measured = start(changed(tiny_recipe, balance={"adjust": False, "every": 2}), tmp_path / "measured")
    assert_same(plain.student.state_dict(), measured.student.state_dict())
    assert not any("gradient_shares" in e for e in events(tmp_path / "plain", "step"))
    shares = events(tmp_path / "measured", "step")[-1]["gradient_shares"]
    assert set(shares) == {"ce", "kd", "scalekd"} and sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_weights_matter_only_in_relation(tiny_recipe):
    """Values of the losses do not: ten times the feature loss is the same balanced run."""
    terms = []
    for alpha in (0.14, 1.4):
        losses = {"ce": {}, "scalekd": {"alpha": alpha, "weight": 0.5}}
        run = build(check_config(changed(tiny_recipe, losses=losses, balance={}), "test"), CPU)
        batch = next(run.train_batches(run.train_sampler(steps=1), 0))
        for micro in (0, 101):
            torch.manual_seed(0)
            found = run.losses(run.model.train(), batch, micro)
        terms.append(torch.stack([found[name] for name in sorted(found)]))
    torch.testing.assert_close(*terms, rtol=1e-4, atol=1e-5)


def test_one_loss_is_left_as_it_is(tiny_recipe):
    """As in the row without a teacher of a comparison whose recipe has `balance`."""
    terms = []
    for balance in (None, {}):
        recipe = changed(tiny_recipe, losses={"scalekd": {"weight": 0.5}}, balance=balance)
        run = build(check_config(recipe, "test"), CPU)
        assert run.model.gradients is None and list(run.parts) == ["student", "methods"]
        batch = next(run.train_batches(run.train_sampler(steps=1), 0))
        torch.manual_seed(0)
        terms.append(run.losses(run.model.train(), batch, 0)["total"])
    assert terms[0] == terms[1]


# ---------------------------------------------------------------- on the screen


def screen_of(recipe) -> str:
    run, screen = build(check_config(recipe, "test"), CPU), io.StringIO()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    preflight(run, Console(file=screen, width=200))
    assert_same(before, dict(run.model.state_dict()))
    return " ".join(screen.getvalue().split())


def test_preflight_shows_the_shares(tiny_recipe):
    text = screen_of(tiny_recipe)
    assert "share of the loss and of the gradient at the student: ce " in text
    balance = screen_of(balanced(tiny_recipe))
    assert "(with `balance`)" in balance
    # also of losses that were not measured yet, and that have the factor 0 in the first step
    losses = balance.partition("losses: ")[2].partition(", total")[0]
    assert len(losses.split(", ")) == 6 and "0.000" not in losses


def test_preflight_warns_of_a_run_that_is_short_for_its_projectors(tiny_recipe):
    run = build(check_config(tiny_recipe, "test"), CPU)
    (check,) = length_check(run)
    assert check.status == "warn" and check.text.startswith("6 steps are few for scalekd")
    long = changed(tiny_recipe, train={"epochs": 200})
    assert not length_check(build(check_config(long, "test"), CPU))
    other = changed(tiny_recipe, losses={"ce": {}, "fd": {}})
    assert not length_check(build(check_config(other, "test"), CPU))


def test_preflight_warns_if_the_labels_hardly_count(tiny_recipe):
    recipe = changed(tiny_recipe, losses={"ce": {"weight": 0.001}, "fd": {"weight": 10.0}})
    run = build(check_config(recipe, "test"), CPU)
    check = gradient_check(run)
    assert check.status == "warn" and "Little is left for ce" in check.text
    assert check.fix == "Lower losses.fd.weight, or set balance={} to weight it by its gradient"
    assert gradient_check(build(check_config(changed(recipe, balance={}), "test"), CPU)).status == "ok"
    even = changed(tiny_recipe, losses={"ce": {}, "fd": {"weight": 0.001}})
    assert gradient_check(build(check_config(even, "test"), CPU)).status == "ok"
