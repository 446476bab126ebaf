"""ScaleKD word for word as its paper describes it (Fan et al., NeurIPS 2024, arXiv:2411.06786), not optimised.

The benchmarks compare against it, and tests/distill/test_literal.py uses it as a slow reference. It runs in float32 and
eager mode: learned queries are copied for every sample and projected there, attention is written out, each view goes
through the teacher's last stage separately, phi (eq. 2) is a 2-d DCT whose matrices are computed at each call, and the
distance is that of normalised copies. Parameters have the names of `scalekd.methods.scalekd.ScaleKD`, so that weights
can be copied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scalekd.models.stages import Features, MapShape, Shapes

ALPHA, BETA = 0.14, 0.571  # as released
SOFTMAX_SCALE = 5.0  # as released


def dct_matrix(n: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II, `(n, n)`: row k holds cos(pi (2 i + 1) k / 2n)."""
    i = torch.arange(n, device=like.device, dtype=like.dtype)
    matrix = torch.cos(math.pi * (2 * i[None] + 1) * i[:, None] / (2 * n)) * math.sqrt(2 / n)
    matrix[0] = math.sqrt(1 / n)
    return matrix


def phi(x: Tensor) -> Tensor:
    """Eq. 2: DCT over the grid of `(B, D, H, W)`, zero for the direct component, inverse DCT."""
    rows, columns = (dct_matrix(n, x) for n in x.shape[2:])
    z = rows @ x @ columns.T
    others = torch.ones_like(z)
    others[:, :, 0, 0] = 0
    return rows.T @ (z * others) @ columns


def distance(a: Tensor, t: Tensor) -> Tensor:
    """L of eq. 1: squared distance of the maps with channels normalised at each position, 49 x the mean over positions."""
    a_hat = a / a.norm(dim=1, keepdim=True)
    t_hat = t / t.norm(dim=1, keepdim=True)
    return 49 * ((a_hat - t_hat) ** 2).sum(dim=1).mean()


class LiteralProjector(nn.Module):
    """CAP of eq. 1: (B, ds, h, w) to (B, dt, H, W). `queries`, (B, dt, H, W), replace the learned ones."""

    def __init__(self, student: MapShape, teacher: MapShape, heads: int, learned: bool) -> None:
        super().__init__()
        ds, h, w = student
        dt, self.height, self.width = teacher
        self.heads = heads
        self.conv = nn.Conv2d(ds, ds, 3, padding=1)
        self.norm = nn.BatchNorm2d(ds)
        self.position = nn.Parameter(torch.randn(1, ds, h, w) * 0.02)
        self.queries = nn.Parameter(torch.randn(self.height * self.width, dt)) if learned else None
        self.query_embed = nn.Linear(dt, dt)
        self.q, self.k, self.v = nn.Linear(dt, dt), nn.Linear(ds, dt), nn.Linear(ds, dt)
        self.out = nn.Linear(dt, dt)
        self.out_norm = nn.LayerNorm(dt)
        self.ffn = nn.Sequential(nn.Linear(dt, 4 * dt), nn.ReLU(), nn.Linear(4 * dt, dt))

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        batch = len(x)
        tokens = torch.relu(self.norm(self.conv(x))) + self.position
        tokens = tokens.flatten(2).transpose(1, 2)
        if self.queries is not None:
            asked = self.queries[None].repeat(batch, 1, 1)
        else:
            assert queries is not None
            asked = queries.flatten(2).transpose(1, 2)
        q = self._heads(self.q(torch.relu(self.query_embed(asked))))
        k, v = self._heads(self.k(tokens)), self._heads(self.v(tokens))
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 * SOFTMAX_SCALE).softmax(dim=-1)
        y = self.out_norm(self.out((weights @ v).transpose(1, 2).flatten(2)))
        y = y + self.ffn(y)
        return y.transpose(1, 2).reshape(batch, -1, self.height, self.width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), x.shape[1], self.heads, -1).transpose(1, 2)


class LiteralScaleKD(nn.Module):
    """CAP, DFM and TPP (eq. 5 without its task and KD terms), as a method for a `Distiller`.

    heads: of the projectors at (stage 3, stage 4).
    """

    def __init__(self, student: Shapes, teacher: Shapes | None, heads: tuple[int, int]) -> None:
        super().__init__()
        assert teacher is not None and teacher.final is not None and student.final is not None
        self.student_caps, self.proxy_caps = nn.ModuleDict(), nn.ModuleDict()
        for view in ("ori", "alt"):
            self.student_caps[view] = LiteralProjector(student.final, teacher.final, heads[1], learned=False)
            self.proxy_caps[view] = LiteralProjector(student.maps[2], teacher.maps[2], heads[0], learned=True)

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        assert teacher is not None and teacher.resume is not None and teacher.final is not None
        losses = {}
        for view, weight in {"ori": ALPHA * BETA, "alt": ALPHA * (1 - BETA)}.items():
            proxy = teacher.resume(3, self.proxy_caps[view](student.maps[2]))
            mimic = self.student_caps[view](student.final, proxy)
            for name, made in {view: mimic, f"proxy_{view}": proxy}.items():
                target = teacher.final.detach()
                if view == "alt":
                    made, target = phi(made), phi(target)
                losses[name] = weight * distance(made, target)
        return losses
