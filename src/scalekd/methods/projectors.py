"""Projectors: trainable modules that turn a student map into a teacher-shaped map.

Each takes `(B, ds, h, w)` and gives `(B, dt, H, W)`, where `(ds, h, w)` and `(dt, H, W)` are the map
shapes of student and teacher. They are thrown away after training.
"""

from __future__ import annotations

from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalekd.models.stages import MapShape

Norm = Literal["batch", "layer"]
Tokens = Literal["conv", "grouped", "separable", "pointwise", "reduced"]

GROUPS = 4  # of channels, of `tokens: grouped`
SOFTMAX_SCALE = 5.0  # fixed sharpening of the attention in the authors' release; not in the paper


def default_heads(dim: int) -> int:
    """The divisor of `dim` nearest to `dim / 64`, the smaller of two equally near."""
    divisors = [n for n in range(1, dim + 1) if dim % n == 0]
    return min(divisors, key=lambda n: (abs(n - dim / 64), n))


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """`batch`: BatchNorm2d. `layer`: LayerNorm over the channels of each position.

    Raises ValueError for another name.
    """
    if norm not in ("batch", "layer"):
        raise ValueError(f"norm is {norm!r}; it can be 'batch' or 'layer'")
    return nn.BatchNorm2d(channels) if norm == "batch" else LayerNorm2d(channels)


def make_tokens(tokens: Tokens, ds: int, dt: int) -> tuple[nn.Module, int]:
    """The convolution that makes tokens of a student map of `ds` channels, and the channels of a token.

    `conv`: 3x3, `ds -> ds`, the authors'. `grouped`: 3x3 within each quarter of the channels (as many groups as divide `ds`,
    at most 4), which keys and values mix. `separable`: 3x3 in each channel, then 1x1. `pointwise`: 1x1, `ds -> ds`.
    `reduced`: 1x1 to `dt` channels if that is fewer than `ds`, then 3x3 in each channel; where the teacher is narrower,
    keys and values cost less too. Raises ValueError for another name.
    """
    if tokens == "conv":
        return nn.Conv2d(ds, ds, 3, padding=1), ds
    if tokens == "grouped":
        return nn.Conv2d(ds, ds, 3, padding=1, groups=gcd(ds, GROUPS)), ds
    if tokens == "separable":
        return nn.Sequential(nn.Conv2d(ds, ds, 3, padding=1, groups=ds, bias=False), nn.Conv2d(ds, ds, 1)), ds
    if tokens == "pointwise":
        return nn.Conv2d(ds, ds, 1), ds
    if tokens == "reduced":
        width = min(ds, dt)
        each = nn.Conv2d(width, width, 3, padding=1, groups=width)
        return nn.Sequential(nn.Conv2d(ds, width, 1, bias=False), each), width
    raise ValueError(f"tokens is {tokens!r}; it can be 'conv', 'grouped', 'separable', 'pointwise' or 'reduced'")


class CrossAttentionProjector(nn.Module):
    """CAP: a transformer decoder block whose queries have the teacher's shape (ScaleKD, eq. 1).

    Student branch: 3x3 convolution `ds -> ds`, norm, ReLU, plus a learned positional embedding; each
    student position is a token. Query branch: Linear `dt -> dt`, ReLU. Then cross attention, LayerNorm,
    and a feed-forward block (4 x dt, ReLU) whose residual adds the normalised input.

    Following the authors' release where the paper is silent or differs: one token per student position
    (the paper speaks of patchifying), attention logits times 5, no residual around the attention.

    Args:
        student: student map shape, `(ds, h, w)`. With one position its map is the same vector everywhere, so
            the methods refuse that.
        teacher: shape of the map to produce, `(dt, H, W)`; any grid, whatever the student's.
        heads: attention heads, a divisor of dt. None: the divisor nearest to dt / 64.
        norm: norm of the student branch; `layer` is what the released configuration of Swin-T has.
        learned_queries: True: a trainable table `(H*W, dt)`, the same for all images. False: the caller
            hands queries in at each call, and no table is built.
        tokens: the student branch's convolution, see `make_tokens`; all but `conv` are ours, and cheaper.
        expansion: hidden channels of the feed-forward block over dt. 4 in the authors' release.
        grad_checkpointing: keep nothing of what follows the student branch's ReLU, and compute it again in the backward pass.

    Raises:
        ValueError: when built, if `heads` does not divide dt, `norm` or `tokens` is unknown or `expansion` is not
            positive; when called, if the student's grid is not the one the positional embedding was built for.
    """

    def __init__(
        self,
        student: MapShape,
        teacher: MapShape,
        *,
        heads: int | None = None,
        norm: Norm = "batch",
        learned_queries: bool = True,
        tokens: Tokens = "conv",
        expansion: int = 4,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        ds, h, w = student
        dt, *grid = teacher
        if expansion < 1:
            raise ValueError(f"expansion is {expansion}; it is 1 or more")
        self.student = (ds, h, w)
        self.grid = tuple(grid)
        self.heads = default_heads(dt) if heads is None else heads
        if self.heads < 1 or dt % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide the teacher's {dt} channels")
        self.grad_checkpointing = grad_checkpointing
        self.scale = SOFTMAX_SCALE * (dt // self.heads) ** -0.5

        self.conv, width = make_tokens(tokens, ds, dt)
        self.norm = make_norm(norm, width)
        self.position = nn.Parameter(torch.empty(1, width, h, w))
        nn.init.trunc_normal_(self.position, std=0.02)

        self.queries = nn.Parameter(torch.randn(grid[0] * grid[1], dt)) if learned_queries else None
        self.query_embed = nn.Linear(dt, dt)
        self.q = nn.Linear(dt, dt)
        self.k = nn.Linear(width, dt)
        self.v = nn.Linear(width, dt)
        self.out = nn.Linear(dt, dt)
        self.out_norm = nn.LayerNorm(dt)
        self.ffn = nn.Sequential(nn.Linear(dt, expansion * dt), nn.ReLU(), nn.Linear(expansion * dt, dt))

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Project `x`, `(B, ds, h, w)`, to `(B, dt, H, W)`.

        `queries`, `(B, dt, H, W)`, are needed, and allowed, only without learned queries.
        """
        assert (queries is None) == (self.queries is not None)
        if x.shape[1:] != self.student:
            raise ValueError(
                f"the projector was built for student maps {self.student} and got "
                f"{tuple(x.shape[1:])}: train at one image size, the one the method was built for"
            )
        branch = F.relu(self.norm(self.conv(x)), inplace=True)  # the norm keeps its input, not its result
        if self.grad_checkpointing and torch.is_grad_enabled():
            # From here on: the convolution is most of the arithmetic, and a batch norm that ran twice would move its
            # running averages twice. Nothing in it is random.
            y: Tensor = checkpoint(self._attend, branch, queries, use_reentrant=False, preserve_rng_state=False)
            return y
        return self._attend(branch, queries)

    def _attend(self, branch: Tensor, queries: Tensor | None) -> Tensor:
        """All that follows the student branch's ReLU: `(B, width, h, w)` to `(B, dt, H, W)`."""
        tokens = branch + self.position
        # (B, h*w, width); one copy, as keys and values would each make and keep their own
        tokens = tokens.flatten(2).transpose(1, 2).contiguous()

        if queries is None:
            assert self.queries is not None
            queries = self.queries[None]  # (1, N, dt): projected once, then expanded over the batch
        else:
            queries = queries.flatten(2).transpose(1, 2)  # (B, N, dt)
        q = self._split(self.q(F.relu(self.query_embed(queries)))).expand(len(branch), -1, -1, -1)
        y = F.scaled_dot_product_attention(
            q, self._split(self.k(tokens)), self._split(self.v(tokens)), scale=self.scale
        )  # (B, heads, N, dt / heads)
        y = self.out_norm(self.out(y.transpose(1, 2).flatten(2)))
        y = y + self.ffn(y)
        return y.transpose(1, 2).unflatten(2, self.grid)

    def _split(self, x: Tensor) -> Tensor:
        """`(B, n, dt)` to `(B, heads, n, dt / heads)`."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Resample(nn.Module):
    """Student map to the teacher's grid: averaged over cells where it shrinks, bilinear where it grows."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        H, W = self.grid
        h, w = x.shape[2:]
        # Not interpolate(antialias=True): its result is wrong where the new width is 1 (torch 2.15, CPU).
        if h > H or w > W:
            x = F.adaptive_avg_pool2d(x, (min(h, H), min(w, W)))
        if h < H or w < W:
            x = F.interpolate(x, size=self.grid, mode="bilinear")
        return x


def linear_projector(student: MapShape, teacher: MapShape) -> nn.Module:
    """The "Linear" of the paper's Table 9b: one linear layer at each position (a 1x1 convolution)."""
    return nn.Sequential(Resample(teacher[1:]), nn.Conv2d(student[0], teacher[0], 1))


def conv_projector(student: MapShape, teacher: MapShape, *, norm: Norm = "batch") -> nn.Module:
    """The "Conv" of Table 9b: two 3x3 convolutions, `ds -> dt -> dt`.

    The paper says no more than "two 3x3 convolutional layers"; widths, norm and ReLU between are ours.
    """
    ds, dt = student[0], teacher[0]
    return nn.Sequential(
        Resample(teacher[1:]),
        nn.Conv2d(ds, dt, 3, padding=1, bias=False),
        make_norm(norm, dt),
        nn.ReLU(),
        nn.Conv2d(dt, dt, 3, padding=1),
    )
