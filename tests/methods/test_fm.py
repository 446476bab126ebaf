"""`fm` against numpy: projectors, both losses, both targets, grids that differ; and what its class token is."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import check_half_precision, layer_norm, randomised, resample, values, weights
from scipy.special import erf

from scalekd.distill.several_teachers import left_out
from scalekd.methods.fm import FM, distance

STUDENT = 16  # channels of the student's pooled features, more than its final map has


@pytest.fixture
def both(pair):
    """Student and teacher with pooled features, measured and then on another batch."""
    pair.student = replace(pair.student, pooled=STUDENT)

    def features(batch=3):
        student, teacher, targets = pair.features(batch)
        student.pooled = torch.randn(batch, STUDENT, dtype=torch.float64, requires_grad=True)
        return student, teacher, targets

    pair.both = features
    return pair


def projected(method, term, x):
    """(n, student) to (n, teacher) in numpy: layer norm with eps 1e-5, linear, GELU, linear."""
    w = {name.split(".", 2)[2]: p for name, p in weights(method).items() if name.startswith(f"projectors.{term}.")}
    x = layer_norm(x[:, :, None, None], np.ones(x.shape[1]), np.zeros(x.shape[1]))[:, :, 0, 0]
    x = x * w["0.weight"] + w["0.bias"]
    x = x @ w["1.weight"].T + w["1.bias"]
    if "3.weight" in w:
        x = x * (1 + erf(x / np.sqrt(2))) / 2 @ w["3.weight"].T + w["3.bias"]
    return x


def far(x, t, loss):
    if loss == "mse":
        return ((x - t) ** 2).mean(-1)
    cos = (x * t).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(t, axis=-1)
    d = np.abs(x - t)
    return (1 - cos) / 2 + np.where(d < 1, d**2 / 2, d - 0.5).mean(-1) / 2


@pytest.mark.parametrize("loss", ["cosine_l1", "mse"])
@pytest.mark.parametrize("hidden", [None, 7, 0])
def test_by_numpy(both, loss, hidden):
    method = randomised(
        FM(both.student, both.teacher, standardise="channel", images=2, loss=loss, hidden=hidden, patch_weight=2.0)
    )
    _, seen, _ = both.both(9)
    method.observe(seen)
    method.freeze()
    student, teacher, targets = both.both()
    got = method(student, teacher, targets)

    of = values(seen.pooled)
    target = (values(teacher.pooled) - of.mean(0)) / of.std(0)
    want = far(projected(method, "class", values(student.pooled)), target, loss).mean()
    assert got["class"].item() == pytest.approx(0.5 * want, rel=1e-4)

    flat = lambda x: x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1])  # noqa: E731
    of = flat(values(seen.final))
    target = (flat(values(teacher.final)) - of.mean(0)) / of.std(0)
    ours = flat(resample(values(student.final), teacher.final.shape[2:]))
    want = far(projected(method, "patch", ours), target, loss).mean()
    assert got["patch"].item() == pytest.approx(2.0 * want, rel=1e-4)


def test_on_paper():
    """x = (3, 4), target (4, 3): cosine 24/25; both differences are 1, where smooth L1 is 1/2 and squares are 1."""
    x, t = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert distance(x, t, "cosine_l1").item() == pytest.approx((1 / 25 + 1 / 2) / 2)
    assert distance(x, t, "mse").item() == pytest.approx(1.0)
    assert distance(torch.stack([x, t], 1), torch.stack([t, t], 1), "mse").tolist() == [
        0.5
    ]  # the mean of the positions


def test_class_tokens_of_other_images_have_a_larger_loss(both):
    """With a projector that is the identity, the right pairing has no loss, and a shuffled one has."""
    shapes = replace(both.teacher, pooled=20)
    method = FM(shapes, shapes, standardise="channel", hidden=0, loss="mse").double()
    _, teacher, targets = both.both(8)
    method.observe(teacher)
    method.freeze()
    exact = torch.nn.Identity()
    exact.forward = method.targets["class"].forward
    method.projectors["class"] = exact
    right = method(teacher, teacher, targets)
    shuffled = method(teacher, replace(teacher, pooled=teacher.pooled.roll(1, dims=0)), targets)
    assert right["class"].item() == pytest.approx(0, abs=1e-12) and shuffled["class"] > 0.1
    assert right["patch"] == shuffled["patch"]


def test_without_one_classifier_the_mean_of_the_map_is_taken(pair):
    method = randomised(FM(pair.student, replace(pair.teacher, pooled=0), hidden=0, standardise="none", patch_weight=0))
    student, teacher, targets = pair.features()
    teacher.pooled = None
    x, t = (values(f.final).mean((2, 3)) for f in (student, teacher))
    want = far(projected(method, "class", x), t, "cosine_l1").mean() / 2
    assert method(student, teacher, targets)["class"].item() == pytest.approx(want, rel=1e-4)


def test_gradients(both):
    method = randomised(FM(both.student, both.teacher, hidden=5))
    student, teacher, targets = both.both()
    method.observe(teacher)
    method.freeze()
    inputs = (student.pooled, student.final)
    assert torch.autograd.gradcheck(lambda *_: sum(method(student, teacher, targets).values()), inputs, fast_mode=True)
    sum(method(student, teacher, targets).values()).backward()
    assert all(x.grad.abs().max() > 1e-9 for x in inputs)
    assert all(p.grad is not None and p.grad.abs().max() > 1e-12 for p in method.parameters())
    others = (student.logits, *student.maps, teacher.logits, teacher.final, teacher.pooled, *teacher.maps)
    assert all(x.grad is None for x in others)


def test_a_term_that_is_left_out_has_no_parameters(both):
    for options, term in (({"patch_weight": 0}, "class"), ({"class_weight": 0}, "patch")):
        method = FM(both.student, both.teacher, **options).double()
        assert set(method(*both.both())) == {term}
        assert all(f".{term}." in f".{name}." for name, _ in method.named_parameters())


def test_statistics_are_saved(both):
    method = FM(both.student, both.teacher).double()
    untouched = copy.deepcopy(method.state_dict())
    assert method.images_to_measure == 2048
    student, teacher, targets = both.both(30)
    method.observe(teacher)
    method.freeze()
    assert method.images_to_measure == 0
    again = FM(both.student, both.teacher).double()
    again.load_state_dict(method.state_dict())
    assert again.images_to_measure == 0
    for name, value in again(student, teacher, targets).items():
        assert torch.equal(value, method(student, teacher, targets)[name])
    again.load_state_dict(untouched)
    assert again.images_to_measure == 2048


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["cosine_l1", "mse"])
def test_half_precision(pair, dtype, loss):
    check_half_precision(lambda: FM(pair.student, pair.teacher, loss=loss), pair, dtype)


def test_leaving_out_by_hand(monkeypatch):
    """Teacher b has the largest loss for image 0, a for image 1. The draws leave out a for image 0 only."""
    terms = {
        "a": {"class": torch.tensor([1.0, 2.0]), "patch": torch.tensor([1.0, 3.0])},
        "b": {"class": torch.tensor([4.0, 1.0]), "patch": torch.tensor([0.0, 2.0])},
    }
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.tensor([[0.4, 0.1], [0.2, 0.6]]))
    found = left_out(terms, 0.5)
    # kept: a for image 1, b for both: 3 of 4, and a teacher keeps 1.5 images in the mean
    assert found["a"]["class"].item() == pytest.approx(2 / 1.5) and found["a"]["patch"].item() == pytest.approx(3 / 1.5)
    assert found["b"]["class"].item() == pytest.approx(5 / 1.5) and found["b"]["patch"].item() == pytest.approx(2 / 1.5)


def test_leaving_out_nothing_is_the_mean():
    terms = {name: {"class": torch.rand(5), "patch": torch.rand(5)} for name in "ab"}
    for name, found in left_out(terms, 0.0).items():
        for term, value in found.items():
            torch.testing.assert_close(value, terms[name][term].mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"standardise": "phi"}, "standardise is 'phi'; choose from"),
        ({"loss": "l2"}, "loss is 'l2'"),
        ({"class_weight": 0, "patch_weight": 0}, "class_weight is 0"),
        ({"images": 1}, "images is 1"),
        ({"images": 100, "standardise": "none"}, "images is 100; it must be 2 or more, and needs standardise"),
        ({"hidden": -1}, "hidden is -1"),
        ({"teacher_drop": 1.0}, r"teacher_drop is 1.0 and must be in \[0, 1\)"),
    ],
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        FM(pair.student, pair.teacher, **options)


def test_an_order_without_a_hadamard_matrix(pair):
    with pytest.raises(ValueError, match=r"fm: no Hadamard matrix of order 92.*Set standardise to 'channel'"):
        FM(pair.student, replace(pair.teacher, pooled=92))
    FM(pair.student, replace(pair.teacher, pooled=92), standardise="channel")
