from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from by_hand import check_half_precision, randomised, values, weights

from scalekd.methods.crd import CRD
from scalekd.models.stages import Features, Shapes

BUFFERS = ["student_queue", "teacher_queue", "oldest", "log_z"]


def embeddings(method, student, teacher):
    p = weights(method)
    for name, x in (("student", student.final), ("teacher", teacher.final)):
        y = values(x).mean((2, 3)) @ p[f"embed_{name}.weight"].T + p[f"embed_{name}.bias"]
        yield y / np.sqrt((y**2).sum(1, keepdims=True))


def by_numpy(anchors, positives, queue, tau, z):
    """The paper's critic h, sample by sample; z None: the mean of this batch."""
    e = np.array([np.exp(np.concatenate([[a @ p], queue @ a]) / tau) for a, p in zip(anchors, positives)])
    z = e.mean() if z is None else z
    h = e / (e + len(queue) * z)
    return -(np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)).mean(), z


def test_against_numpy_over_three_steps(pair):
    """Z stays the first step's; the queue of 5 takes batches of 3: places 0 1 2, then 3 4 0, then 1 2 3."""
    method = randomised(CRD(pair.student, pair.teacher, dim=4, negatives=5, temperature=0.5, alpha=0.3))
    queues = [values(method.student_queue).copy(), values(method.teacher_queue).copy()]
    zs, places = [None, None], [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    for step in range(3):
        student, teacher, targets = pair.features()
        losses = method(student, teacher, targets)
        s, t = embeddings(method, student, teacher)
        expected, zs[0] = by_numpy(s, t, queues[1], 0.5, zs[0])
        assert losses["student"].item() == pytest.approx(0.3 * expected, rel=1e-9)
        expected, zs[1] = by_numpy(t, s, queues[0], 0.5, zs[1])
        assert losses["teacher"].item() == pytest.approx(0.3 * expected, rel=1e-9)
        queues[0][places[step]], queues[1][places[step]] = s, t
        np.testing.assert_allclose(values(method.student_queue), queues[0], rtol=1e-12)
        np.testing.assert_allclose(values(method.teacher_queue), queues[1], rtol=1e-12)


def test_on_paper():
    """Two dimensions, tau 1, one negative: everything is e^0, e^1 or e^-1."""
    shapes = Shapes("m", ((2, 1, 1),) * 4, (2, 1, 1), 0)
    method = CRD(shapes, shapes, dim=2, negatives=1, temperature=1.0, alpha=1.0)
    for linear in (method.embed_student, method.embed_teacher):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    method.teacher_queue.copy_(torch.tensor([[-1.0, 0.0]]))
    method.log_z.zero_()  # Z = 1
    maps = [Features(torch.empty(1, 0), (), torch.tensor([x, 0.0]).view(1, 2, 1, 1)) for x in (3.0, 5.0)]
    e = np.e  # positive e^1: h = e / (e + 1); negative e^-1: 1 - h = 1 / (e^-1 + 1), the same
    assert method(*maps, torch.tensor([0]))["student"].item() == pytest.approx(-2 * np.log(e / (e + 1)), rel=1e-6)


def test_a_batch_longer_than_the_queue(pair):
    method = randomised(CRD(pair.student, pair.teacher, dim=4, negatives=2))
    student, teacher, targets = pair.features(batch=5)
    method(student, teacher, targets)
    s, _ = embeddings(method, student, teacher)
    np.testing.assert_allclose(values(method.student_queue), s[-2:], rtol=1e-12)
    assert method.oldest.item() == 0


def test_the_right_pairing_has_the_smaller_loss(pair):
    """Embeddings that agree, then the teacher's shuffled among the images."""
    method = CRD(pair.student, pair.student, negatives=64).double()
    method.embed_teacher.load_state_dict(method.embed_student.state_dict())
    student, _, targets = pair.features(batch=8)
    same = Features(student.logits, student.maps, student.final)
    other = Features(student.logits, student.maps, student.final.roll(1, dims=0))
    right = copy.deepcopy(method)(student, same, targets)["student"]
    assert right < copy.deepcopy(method)(student, other, targets)["student"]


def test_buffers_make_resuming_exact(pair):
    method = CRD(pair.student, pair.teacher, negatives=8).double()
    batches = [pair.features() for _ in range(4)]
    for batch in batches[:2]:
        method(*batch)
    saved = copy.deepcopy(method.state_dict())
    assert set(BUFFERS) <= set(saved) and {id(b) for b in method.buffers()} == {id(getattr(method, n)) for n in BUFFERS}
    straight = [method(*batch) for batch in batches[2:]]

    torch.manual_seed(99)  # another start
    resumed = CRD(pair.student, pair.teacher, negatives=8).double()
    resumed.load_state_dict(saved)
    for batch, losses in zip(batches[2:], straight):
        for name, value in resumed(*batch).items():
            assert torch.equal(value, losses[name])
    for name in BUFFERS:
        assert torch.equal(getattr(resumed, name), getattr(method, name))


def test_buffers_are_written_in_place(pair):
    """DDP and the engine's way back from a bad step hold on to them."""
    method = CRD(pair.student, pair.teacher, negatives=8).double()
    before = {name: (buffer, buffer.clone()) for name, buffer in method.named_buffers()}
    method(*pair.features())
    for name, buffer in method.named_buffers():
        assert buffer is before[name][0] and not torch.equal(buffer, before[name][1])
        assert not buffer.requires_grad


def test_eval_mode_leaves_no_trace(pair):
    method = CRD(pair.student, pair.teacher, negatives=8).double()
    method(*pair.features())
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    method.eval()(*pair.features())
    assert all(torch.equal(buffer, before[name]) for name, buffer in method.named_buffers())


def test_gradients(pair):
    """Of each term in its anchors; the other side and Z are constants, so both are kept still here."""
    method = randomised(CRD(pair.student, pair.teacher, dim=6, negatives=10))
    student, teacher, targets = pair.features()
    method(student, teacher, targets)
    method.eval()
    for side, x in (("student", student.final), ("teacher", method.embed_teacher.weight)):
        assert torch.autograd.gradcheck(lambda _, side=side: method(student, teacher, targets)[side], x)

    sum(method.train()(student, teacher, targets).values()).backward()
    assert student.final.grad.abs().max() > 1e-9
    assert all(p.grad.abs().max() > 1e-9 for p in method.parameters())
    others = (student.logits, *student.maps, teacher.logits, teacher.final, *teacher.maps)
    assert all(x.grad is None for x in others)


def test_each_term_trains_its_anchors_alone(pair):
    method = CRD(pair.student, pair.teacher, negatives=8).double()
    student, teacher, targets = pair.features()
    losses = method(student, teacher, targets)
    assert torch.autograd.grad(losses["teacher"], student.final, allow_unused=True, retain_graph=True)[0] is None
    for mine, other in (("student", "teacher"), ("teacher", "student")):
        own, others = (getattr(method, f"embed_{side}").weight for side in (mine, other))
        own, others = torch.autograd.grad(losses[mine], (own, others), allow_unused=True, retain_graph=True)
        assert own.abs().max() > 1e-9 and others is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: CRD(pair.student, pair.teacher, negatives=32), pair, dtype)


@pytest.mark.parametrize("option", ["dim", "negatives", "temperature", "alpha"])
def test_rejected_options(pair, option):
    with pytest.raises(ValueError, match=f"{option} is 0"):
        CRD(pair.student, pair.teacher, **{option: 0})
