from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import (
    batch_norm,
    check_gradients,
    check_half_precision,
    conv,
    layer_norm,
    randomised,
    resample,
    values,
    weights,
)

from scalekd.methods.diffkd import DiffKD
from scalekd.models.stages import Shapes

KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


class ByNumpy:
    """One stage, layer by layer."""

    def __init__(self, method, stage, norm):
        self.kind = {"batch": batch_norm, "layer": layer_norm}[norm]
        prefix = f"denoisings.s{stage}."
        self.p = {name.removeprefix(prefix): p for name, p in weights(method).items() if name.startswith(prefix)}

    def layer(self, name, x):
        return conv(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def norm(self, name, x):
        return self.kind(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def bottleneck(self, name, x):
        y = np.maximum(self.norm(f"{name}.block.1", self.layer(f"{name}.block.0", x)), 0)
        y = np.maximum(self.norm(f"{name}.block.4", self.layer(f"{name}.block.3", y)), 0)
        return x + self.norm(f"{name}.block.7", self.layer(f"{name}.block.6", y))

    def noise(self, x, times):
        x = x + self.p["time.weight"][times][:, :, None, None]
        x = self.bottleneck("guess.1", self.bottleneck("guess.0", x))
        return self.norm("guess.3", self.layer("guess.2", x))

    def denoised(self, x, grid, noise, times):
        x = self.layer("align.1", resample(x, grid))
        scores = self.bottleneck("adapter.0", x).mean((2, 3)) @ self.p["adapter.3.weight"].T + self.p["adapter.3.bias"]
        share = (1 / (1 + np.exp(scores[:, 1] - scores[:, 0])))[:, None, None, None]
        x = share * x + (1 - share) * noise
        for time, after in zip(times, [*times[1:], None]):
            guess = self.noise(x, np.full(len(x), time))
            clean = (x - np.sqrt(1 - KEPT[time]) * guess) / np.sqrt(KEPT[time])
            kept = 1.0 if after is None else KEPT[after]
            x = np.sqrt(kept) * clean + np.sqrt(1 - kept) * guess
        return self.norm("out.1", self.layer("out.0", x))


@pytest.mark.parametrize(
    ("latent", "channels", "steps", "times", "norm"),
    [
        (None, 6, 5, [400, 300, 200, 100, 0], "batch"),
        (9, 9, 5, [400, 300, 200, 100, 0], "layer"),
        (5, 5, 2, [250, 0], "batch"),
        (0, 12, 1, [0], "batch"),
    ],
)
def test_against_numpy(pair, latent, channels, steps, times, norm):
    method = randomised(DiffKD(pair.student, pair.teacher, latent=latent, steps=steps, norm=norm, alpha=0.5))
    student, teacher, targets = pair.features()
    torch.manual_seed(7)
    noise = values(torch.randn(3, channels, 3, 2, dtype=torch.float64))
    at = values(torch.randint(1000, (3,)))
    added = values(torch.randn(3, channels, 3, 2, dtype=torch.float64))
    torch.manual_seed(7)
    losses = method(student, teacher, targets)

    numpy, expected = ByNumpy(method, 4, norm), {}
    code = values(teacher.final)
    if latent != 0:
        code = numpy.norm("encode.1", numpy.layer("encode.0", code))
        expected["s4_code"] = ((numpy.layer("decode", code) - values(teacher.final)) ** 2).mean()
    mimic = numpy.denoised(values(student.final), (3, 2), noise, times)
    expected["s4"] = 0.5 * ((mimic - code) ** 2).mean()
    kept = KEPT[at][:, None, None, None]
    guess = numpy.noise(np.sqrt(kept) * code + np.sqrt(1 - kept) * added, at)
    expected["s4_noise"] = ((guess - added) ** 2).mean()
    assert list(losses) == list(expected)
    for name, value in losses.items():
        # the noise schedule is kept in float32
        assert value.item() == pytest.approx(expected[name], rel=1e-4)


def test_by_hand():
    """One channel, one position, two images: a batch norm of two different values gives -1 and 1.

    Without noise and with a diffusion model that predicts zeros, only the last layers act. They turn -3 and 5 into -1
    and 1, so the error to the code (0, 2) is 1 and 1. Without the norm it would be 9 and 9.
    """
    shapes = Shapes("m", ((1, 1, 1),) * 4, (1, 1, 1), 0)
    denoising = DiffKD(shapes, shapes, latent=0, steps=1).denoisings["s4"].double()
    denoising.align = torch.nn.Identity()
    torch.nn.init.zeros_(denoising.adapter[3].weight)
    denoising.adapter[3].bias.data = torch.tensor([99.0, 0.0], dtype=torch.float64)  # all of the map, no noise
    denoising.predicted_noise = lambda x, times: torch.zeros_like(x)
    torch.nn.init.ones_(denoising.out[0].weight)
    mimic = denoising(torch.tensor([-3.0, 5.0], dtype=torch.float64).view(2, 1, 1, 1))
    assert mimic.flatten().tolist() == pytest.approx([-1, 1], abs=1e-6)
    assert ((mimic.flatten() - torch.tensor([0.0, 2.0])) ** 2).mean().item() == pytest.approx(1, abs=1e-5)


def test_checkpoints_from_before_the_last_norm(pair):
    """They are rebuilt as they were trained: without the norm, with the convolution's bias."""
    method = DiffKD(pair.student, pair.teacher)
    state = method.state_dict()
    weight = state["denoisings.s4.out.0.weight"]
    old = {name: value for name, value in state.items() if ".out." not in name}
    method.load_state_dict(old | {"denoisings.s4.out.weight": weight, "denoisings.s4.out.bias": torch.ones(6)})
    x = torch.randn(2, 6, 3, 2)
    expected = torch.nn.functional.conv2d(x, weight, torch.ones(6))
    torch.testing.assert_close(method.denoisings["s4"].out(x), expected)


def test_denoising_finds_the_map_under_the_noise(pair):
    """With a model that knows the noise, DDIM takes it out: the steps undo the way in which noise is put on."""
    denoising = DiffKD(pair.student, pair.student, latent=0).denoisings["s4"]
    clean, noise = torch.randn(2, 8, 2, 3), torch.randn(2, 8, 2, 3)
    kept = denoising.kept[denoising.times[0]]

    class Ready(torch.nn.Module):
        def forward(self, x):
            return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    denoising.align, denoising.out = Ready(), torch.nn.Identity()
    torch.nn.init.zeros_(denoising.adapter[3].weight)
    denoising.adapter[3].bias.data = torch.tensor([50.0, 0.0])  # all of the map, no noise of the adapter's
    denoising.predicted_noise = lambda x, times: noise
    torch.testing.assert_close(denoising(clean), clean, rtol=1e-4, atol=1e-4)


def test_who_learns_from_what(pair):
    """The student and its adapter from the first term only; the code from its own loss only."""
    method = randomised(DiffKD(pair.student, pair.teacher))
    student, teacher, targets = pair.features()
    losses = method(student, teacher, targets)
    denoising = method.denoisings["s4"]
    reached = {
        name: [
            torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)[0] is not None
            for x in (student.final, denoising.adapter[3].weight, denoising.encode[0].weight, denoising.time.weight)
        ]
        for name, value in losses.items()
    }
    assert reached == {
        "s4": [True, True, False, True],
        "s4_noise": [False, False, False, True],
        "s4_code": [False, False, True, False],
    }


def test_training_the_diffusion_model_lowers_its_loss():
    """On equal codes the trained model separates noise from code; the untrained one does not."""
    torch.manual_seed(0)
    shapes = Shapes("m", ((4, 3, 3),) * 4, (4, 3, 3), 0)
    denoising = DiffKD(shapes, shapes, latent=0).denoisings["s4"]
    code = torch.randn(1, 4, 3, 3).expand(64, 4, 3, 3)
    optimizer = torch.optim.Adam(denoising.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = denoising.noise_loss(code)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_the_global_generator_decides(pair):
    method = DiffKD(pair.student, pair.teacher).double()
    batch = pair.features()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(method(*batch))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert all(runs[0][name] != runs[2][name] for name in ("s4", "s4_noise"))


def test_the_schedule_is_not_saved(pair):
    method = DiffKD(pair.student, pair.teacher)
    np.testing.assert_allclose(values(method.denoisings["s4"].kept), KEPT, rtol=1e-4)
    assert not any("kept" in name for name in method.state_dict())


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_whether_denoising_sees_the_time(pair, norm):
    """Its images share a time, and BatchNorm takes out what they share."""
    denoising = randomised(DiffKD(pair.student, pair.teacher, latent=16, norm=norm)).denoisings["s4"]
    x = torch.randn(4, 16, 3, 2, dtype=torch.float64)
    early, late = (denoising.predicted_noise(x, torch.tensor([time])) for time in (0, 400))
    assert torch.allclose(early, late) == (norm == "batch")
    each = torch.tensor([0, 100, 200, 400])
    assert not torch.allclose(denoising.predicted_noise(x, each), denoising.predicted_noise(x, each.flip(0)))


@pytest.mark.parametrize(("stages", "latent", "norm"), [((4,), 16, "batch"), ((1, 3), 0, "batch"), ((4,), 16, "layer")])
def test_gradients(pair, stages, latent, norm):
    def dead(name):  # shifts of all images alike, which the BatchNorm at the end takes out
        return norm == "batch" and name.endswith(("guess.0.block.7.bias", "guess.1.block.7.bias"))

    method = DiffKD(pair.student, pair.teacher, stages=stages, latent=latent, norm=norm, steps=2)
    check_gradients(method, pair, stages, dead=dead)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: DiffKD(pair.student, pair.teacher), pair, dtype, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (9,)}, "stages"),
        ({"alpha": 0.0}, "alpha"),
        ({"latent": -1}, "latent"),
        ({"steps": 0}, "steps"),
        ({"steps": 501}, "steps"),
        ({"norm": "group"}, "'batch' or 'layer'"),
    ],
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        DiffKD(pair.student, pair.teacher, **options)
