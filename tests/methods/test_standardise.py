"""Hadamard matrices, and the standardisation of features: by numpy, and what PHI-S promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scalekd.methods.hadamard import hadamard
from scalekd.methods.standardise import FLOOR, Standardise, isotropic


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 28, 36, 48, 76, 96, 104, 144, 192, 384, 768])
def test_hadamard(order):
    """28 and 76 are 2 (p + 1) for a prime p; 144 is a product of 12 and 12, or 2 and 72."""
    matrix = hadamard(order)
    assert matrix.shape == (order, order) and set(matrix.flatten().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_no_hadamard():
    assert all(hadamard(order) is None for order in (0, 3, 6, 10, 90, 92))  # 92 exists, but not by these constructions


def data(channels=12, number=500, seed=0):
    """Correlated channels of very different scales, away from zero."""
    random = np.random.default_rng(seed)
    scales = np.exp(random.normal(0, 2, channels))
    return random.normal(0, 1, (number, channels)) @ random.normal(0, 1, (channels, channels)) * scales + 10 * scales


def fitted(kind, x, parts=3):
    made = Standardise(x.shape[1], kind).double()
    for part in np.array_split(x, parts):
        made.observe(torch.from_numpy(part))
    made.freeze()
    return made


def test_channel_is_that_of_numpy():
    x = data()
    got = fitted("channel", x)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, (x - x.mean(0)) / x.std(0), rtol=1e-6, atol=1e-6)


def test_a_channel_that_hardly_varies_is_not_blown_up():
    x = data()
    x[:, 3] = 7.0 + 1e-9 * np.arange(len(x))
    scale = np.sqrt(x.var(0).mean())
    got = fitted("channel", x)(torch.full((1, 12), 7.0 + scale, dtype=torch.float64))
    assert got[0, 3].item() == pytest.approx(1 / FLOOR, rel=1e-5)


def test_phi_s_is_that_of_the_paper():
    """W = H U^T / (phi sqrt(C)) with numpy's eigenvectors, up to their signs, which the largest entry fixes."""
    x = data()
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    rotation = hadamard(12).numpy() / np.sqrt(12) @ vectors.T
    wanted = (x - x.mean(0)) @ rotation.T / np.sqrt(values.mean())
    got = fitted("phi-s", x)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_phi_s_gives_every_channel_variance_one_and_keeps_the_ratios_of_distances():
    x = data()
    got = fitted("phi-s", x)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(got.var(0), 1, rtol=1e-5)
    before, after = (np.linalg.norm(v[:50, None] - v[None, :50], axis=-1) for v in (x, got))
    ratio = after[before > 0] / before[before > 0]
    np.testing.assert_allclose(ratio, np.sqrt(12 / x.var(0).sum()), rtol=1e-6)


def test_the_signs_of_eigenvectors_do_not_matter(monkeypatch):
    covariance = torch.from_numpy(np.cov(data().T))
    wanted, eigh = isotropic(covariance), torch.linalg.eigh

    def flipped(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * torch.tensor([1.0, -1.0] * 6)

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    torch.testing.assert_close(isotropic(covariance), wanted)


@pytest.mark.parametrize("kind", ["phi-s", "channel"])
def test_batches_and_scales_do_not_matter(kind):
    x = data()
    wanted = fitted(kind, x, parts=1)(torch.from_numpy(x))
    torch.testing.assert_close(fitted(kind, x, parts=7)(torch.from_numpy(x)), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fitted(kind, 100 * x)(torch.from_numpy(100 * x)), wanted, rtol=1e-4, atol=1e-5)


def test_before_and_without_measuring_nothing_changes():
    x = torch.from_numpy(data())
    for kind in ("phi-s", "channel", "none"):
        assert torch.equal(Standardise(12, kind).double()(x), x)
    assert not list(Standardise(10, "none").buffers())
    with pytest.raises(ValueError, match="no Hadamard matrix of order 10"):
        Standardise(10, "phi-s")


def test_half_precision_is_measured_and_applied_in_full(monkeypatch):
    x = torch.from_numpy(data()).half().clamp(-6e4, 6e4)
    made = Standardise(12, "phi-s")
    with torch.autocast("cpu", torch.bfloat16):
        made.observe(x)
        made.freeze()
        got = made(x)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy().var(0), 1, rtol=1e-3)
