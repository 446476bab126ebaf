"""`teacher.top_k`: what is kept of the logits, compared with NumPy, and what the losses make of it."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from scalekd.common.errors import UserError
from scalekd.distill.distiller import Distiller
from scalekd.distill.top_logits import rebuilt, top_logits
from scalekd.methods.names import METHODS
from scalekd.models.stages import Features, Shapes


def drawn(images: int, classes: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(images, classes, generator=torch.Generator().manual_seed(seed)) + 5


def by_numpy(logits: Tensor, k: int, temperature: float) -> np.ndarray:
    """One image and one class at a time."""
    rows = []
    for row in logits.double().numpy() / temperature:
        logs = log_softmax(row)
        smallest_first = np.argsort(logs)
        others = smallest_first[: len(row) - k]
        made = logs.astype(np.float16).astype(np.float64)
        if len(others):
            made[others] = logsumexp(logs[others]) - np.log(len(others))
        rows.append(temperature * (made + logsumexp(row)))
    return np.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("classes", "k"), [(11, 4), (16, 1), (16, 15), (9, 9)])
def test_rebuilt_logits_are_those_of_numpy(classes, k, temperature):
    logits = drawn(50, classes)
    found = rebuilt(top_logits(logits, k, temperature), classes, temperature)
    # a rounding to half precision may go the other way
    step = temperature * 2.0**-11 * np.abs(log_softmax(logits.numpy() / temperature, axis=1))
    assert (np.abs(found.numpy() - by_numpy(logits, k, temperature)) <= 2 * step + 1e-5).all()
    off = np.abs(found.numpy() - by_numpy(logits, k, temperature)) > 1e-5
    assert off.mean() < 0.01


def test_which_classes_are_kept_takes_a_bit_each():
    logits = drawn(20, 21)
    top = top_logits(logits, 5)
    kept = logits >= logits.sort(dim=1).values[:, -5:-4]
    assert np.array_equal(top.kept.numpy(), np.packbits(kept.numpy(), axis=1, bitorder="little"))


def test_the_others_have_their_probability_together_at_the_temperature_of_the_loss():
    logits = drawn(30, 40)
    kept = torch.zeros_like(logits).scatter(1, logits.topk(6).indices, 1).bool()

    def rest(given: Tensor, temperature: float) -> Tensor:
        return (given / temperature).softmax(1).masked_fill(kept, 0).sum(1)

    found = rebuilt(top_logits(logits, 6, 2.0), 40, 2.0)
    torch.testing.assert_close(rest(found, 2.0), rest(logits, 2.0), rtol=2e-3, atol=0)
    assert (rest(found, 4.0) > rest(logits, 4.0)).all() and (rest(found, 1.0) < rest(logits, 1.0)).all()


def test_a_hundred_of_a_thousand_classes_take_at_most_400_bytes():
    assert sum(part.nbytes for part in top_logits(drawn(8, 1000), 100)) == 8 * 333
    assert sum(part.nbytes for part in top_logits(drawn(8, 1000), 1000)) == 8 * 2008


def test_extreme_and_equal_logits_give_finite_losses():
    logits = torch.tensor([[1e6, -1e6, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0], [-50.0, -200.0, -300.0, -400.0]])
    for k in (2, 4):
        found = rebuilt(top_logits(logits.half().clamp(-6e4, 6e4), k), 4)
        assert found.isfinite().all() and _gradient("kd", drawn(3, 4), found).isfinite().all()
    torch.testing.assert_close(rebuilt(top_logits(logits, 2), 4)[1], logits[1], atol=2e-3, rtol=0)


def _gradient(loss: str, student: Tensor, teacher: Tensor, **options: float) -> Tensor:
    shapes = Shapes(model="drawn", maps=(), final=None, classes=student.shape[1])
    student = student.clone().requires_grad_()
    targets = torch.arange(len(student)) % student.shape[1]
    terms = METHODS[loss](shapes, shapes, **options)(Features(student), Features(teacher), targets)
    return torch.autograd.grad(torch.stack(list(terms.values())).sum(), student)[0]


def test_the_gradient_of_kd_is_off_by_the_probability_of_the_rest_at_most():
    """It is T * (student's - teacher's probabilities) / B, and only the others' probabilities move, among themselves."""
    teacher, student = drawn(30, 50), drawn(30, 50, seed=1)
    for k in (5, 20, 50):
        top = top_logits(teacher, k, 2.0)
        true, found = (_gradient("kd", student, t, temperature=2.0) for t in (teacher, rebuilt(top, 50, 2.0)))
        off = (found - true).abs().sum(1) * 30 / 2
        assert (off <= 2 * top.rest.exp() + 2e-3).all()
        assert k == 50 or (off > 0.1 * top.rest.exp()).any()


def _distiller(losses: dict, **top_k: int | dict) -> Distiller:
    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=12, img_size=48)
    torch.nn.init.normal_(teacher.get_classifier().weight)
    student = timm.create_model("test_resnet", num_classes=12)
    return Distiller(student, teacher, losses, image_size=(48, 48), teacher_top_k=top_k.get("top_k")).eval()


def test_methods_see_the_rebuilt_logits():
    pixels, targets = torch.rand(4, 3, 48, 48), torch.tensor([0, 1, 2, 11])
    losses = {"ce": {}, "kd": {"temperature": 2.0}, "dkd": {"temperature": 2.0}}
    whole, reduced = _distiller(losses), _distiller(losses, top_k=3)
    true = whole.teacher_features(pixels).logits
    seen = rebuilt(top_logits(true, 3, 2.0), 12, 2.0)
    assert (seen - true).abs().max() > 0.1
    assert torch.equal(reduced.teacher_features(pixels).logits, seen)
    wanted = whole(pixels, targets, Features(seen))
    for name, value in reduced(pixels, targets).items():
        torch.testing.assert_close(value, wanted[name])


@pytest.mark.parametrize(
    ("losses", "k", "message"),
    [
        (
            {"kd": {}, "fd": {}},
            3,
            "teacher.top_k: losses.fd reads feature maps, not only logits; remove one of the two",
        ),
        ({"kd": {}}, 13, "teacher.top_k: 13 is more than the teacher's 12 classes; use 12 or fewer"),
        (
            {"dist": {}},
            3,
            "losses.dist needs the logits of all classes; set teacher.top_k=12, which keeps .*, or use plain kd",
        ),
        ({"kd": {"standardize": True}}, 3, "losses.kd needs the logits of all classes"),
        ({"bkd": {"probabilities": "sigmoid"}}, 3, "losses.bkd needs the logits of all classes"),
        (
            {"kd": {"temperature": 4.0}, "dkd": {}},
            3,
            "is kept at one temperature, and losses.kd has 4 and losses.dkd has 1; give them the same temperature, or set",
        ),
    ],
)
def test_what_it_cannot_serve_is_refused(losses, k, message):
    with pytest.raises(UserError, match=message):
        _distiller(losses, top_k=k)


def test_all_classes_serve_every_loss_on_logits():
    pixels, targets = torch.rand(4, 3, 48, 48), torch.tensor([0, 1, 2, 11])
    losses = {"kd": {"temperature": 4.0}, "dkd": {}, "dist": {}, "bkd": {"probabilities": "sigmoid"}}
    true, found = (_distiller(losses, **given)(pixels, targets) for given in ({}, {"top_k": 12}))
    assert any(not torch.equal(found[name], true[name]) for name in true)
    for name in true:
        torch.testing.assert_close(found[name], true[name], rtol=5e-3, atol=1e-4)
