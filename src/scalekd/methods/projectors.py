"""Projectors: trainable modules from a student's map to the shape of a teacher's map.

They map `(B, ds, h, w)` to `(B, dt, H, W)`, where `(ds, h, w)` and `(dt, H, W)` are the map shapes of student and
teacher. They are not part of the exported student.
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

GROUPS = 4  # groups of channels with `tokens: grouped`
SOFTMAX_SCALE = 5.0  # factor of the attention logits in most released configurations; not in the paper


def default_heads(dim: int) -> int:
    """The divisor of `dim` closest to `dim / 64`, the smaller one of two that are equally close."""
    divisors = [n for n in range(1, dim + 1) if dim % n == 0]
    return min(divisors, key=lambda n: (abs(n - dim / 64), n))


def make_norm(norm: Norm, channels: int, eps: float | None = None) -> nn.Module:
    """`batch`: BatchNorm2d, eps 1e-5 by default. `layer`: LayerNorm over the channels of each position, eps 1e-6.

    Raises ValueError for any other name, and for an eps that is not positive.
    """
    if norm not in ("batch", "layer"):
        raise ValueError(f"norm is {norm!r}; choose 'batch' or 'layer'")
    if eps is not None and not eps > 0:
        raise ValueError(f"norm_eps is {eps} and must be positive")
    if norm == "batch":
        return nn.BatchNorm2d(channels, eps=1e-5 if eps is None else eps)
    return LayerNorm2d(channels, eps=1e-6 if eps is None else eps)


def make_tokens(tokens: Tokens, ds: int, dt: int) -> tuple[nn.Module, int]:
    """The convolution from a student map of `ds` channels to tokens, and the number of channels of a token.

    - `conv`: 3x3, `ds -> ds`, as in the authors' release.
    - `grouped`: 3x3 in up to 4 groups of channels (as many as divide `ds`). Keys and values mix the groups.
    - `separable`: depthwise 3x3, then 1x1.
    - `pointwise`: 1x1, `ds -> ds`.
    - `reduced`: 1x1 to `dt` channels if that is fewer than `ds`, then depthwise 3x3. With a narrower teacher, keys and
      values cost less too.

    Raises ValueError for any other name.
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
    raise ValueError(f"tokens is {tokens!r}; choose 'conv', 'grouped', 'separable', 'pointwise' or 'reduced'")


class CrossAttentionProjector(nn.Module):
    """CAP: a transformer decoder block whose queries have the teacher's shape (ScaleKD, eq. 1).

    Student branch: 3x3 convolution `ds -> ds`, norm, ReLU, plus a learned positional embedding; each
    student position is a token. Query branch: Linear `dt -> dt`, ReLU. Then cross attention, LayerNorm,
    and a feed-forward block (4 x dt, ReLU) whose residual adds the normalised input.

    Where the paper does not say or differs, this follows the authors' release: one token per student position (the
    paper mentions patchifying), attention logits times 5 (`attention_scale`), no residual around the attention.

    Args:
        student: shape of the student's map, `(ds, h, w)`. With one position the output is the same vector everywhere;
            methods reject such a student (`check_positions`).
        teacher: shape of the output, `(dt, H, W)`. Its grid may differ from the student's.
        heads: attention heads, a divisor of dt. None: the divisor closest to dt / 64.
        norm: norm of the student branch; the released configuration of Swin-T has `layer`.
        learned_queries: True: a trainable table `(H*W, dt)`, the same for all images. False: there is no table, and
            the caller passes queries at each call.
        tokens: convolution of the student branch, see `make_tokens`. All except `conv` are our cheaper additions.
        expansion: hidden channels of the feed-forward block, as a multiple of dt. 4 in the authors' release.
        attention_scale: factor of the attention logits besides 1 / sqrt(head size). Default 5.
        norm_eps: eps of that norm. None: 1e-5 for `batch`, 1e-6 for `layer`.
        grad_checkpointing: store no activations after the student branch's ReLU; compute them again in the backward
            pass.
        skip: add a linear projection of the student's own position, as `linear_projector` makes it, to the output. Not
            in the paper.

    Raises:
        ValueError: when built, if `heads` does not divide dt, `norm` or `tokens` is unknown, or a number is not
            positive; when called, if the student's map does not have the shape that it was built for.
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
        attention_scale: float = SOFTMAX_SCALE,
        norm_eps: float | None = None,
        grad_checkpointing: bool = False,
        skip: bool = False,
    ) -> None:
        super().__init__()
        ds, h, w = student
        dt, *grid = teacher
        if expansion < 1:
            raise ValueError(f"expansion is {expansion} and must be 1 or more")
        self.student = (ds, h, w)
        self.grid = tuple(grid)
        self.heads = default_heads(dt) if heads is None else heads
        if self.heads < 1 or dt % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide the teacher's {dt} channels")
        self.grad_checkpointing = grad_checkpointing
        if not attention_scale > 0:
            raise ValueError(f"attention_scale is {attention_scale} and must be positive")
        self.scale = attention_scale * (dt // self.heads) ** -0.5

        self.conv, width = make_tokens(tokens, ds, dt)
        self.norm = make_norm(norm, width, norm_eps)
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
        self.skip = linear_projector(student, teacher) if skip else None

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Projects `x`, `(B, ds, h, w)`, to `(B, dt, H, W)`.

        `queries`, `(B, dt, H, W)`, are required without learned queries, and otherwise not allowed.
        """
        assert (queries is None) == (self.queries is not None)
        if x.shape[1:] != self.student:
            raise ValueError(
                f"the projector was built for student maps {self.student} and got {tuple(x.shape[1:])}; "
                "train at the image size that the method was built for"
            )
        branch = F.relu(self.norm(self.conv(x)), inplace=True)  # inplace: the norm stores its input, not its output
        if self.grad_checkpointing and torch.is_grad_enabled():
            # Not the convolution, which is most of the arithmetic, nor the batch norm, which would update its running
            # averages twice. Nothing in `_attend` is random.
            y: Tensor = checkpoint(self._attend, branch, queries, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self._attend(branch, queries)
        return y if self.skip is None else y + self.skip(x)

    def _attend(self, branch: Tensor, queries: Tensor | None) -> Tensor:
        """Everything after the student branch's ReLU: `(B, width, h, w)` to `(B, dt, H, W)`."""
        tokens = branch + self.position
        # (B, h*w, width); contiguous, or keys and values would each make and store a copy
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
    """Resamples a map to another grid: adaptive average pooling where it shrinks, bilinear where it grows."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        H, W = self.grid
        h, w = x.shape[2:]
        # Not interpolate(antialias=True): its result is wrong if the new width is 1 (torch 2.15, CPU).
        if h > H or w > W:
            x = F.adaptive_avg_pool2d(x, (min(h, H), min(w, W)))
        if h < H or w < W:
            x = F.interpolate(x, size=self.grid, mode="bilinear")
        return x


def linear_projector(student: MapShape, teacher: MapShape) -> nn.Module:
    """ "Linear" in Table 9b of the ScaleKD paper: one linear layer at each position, a 1x1 convolution."""
    return nn.Sequential(Resample(teacher[1:]), nn.Conv2d(student[0], teacher[0], 1))


def conv_projector(student: MapShape, teacher: MapShape, *, norm: Norm = "batch") -> nn.Module:
    """ "Conv" in Table 9b of the ScaleKD paper: two 3x3 convolutions, `ds -> dt -> dt`.

    The paper only says "two 3x3 convolutional layers"; widths, norm and ReLU are our choice.
    """
    ds, dt = student[0], teacher[0]
    return nn.Sequential(
        Resample(teacher[1:]),
        nn.Conv2d(ds, dt, 3, padding=1, bias=False),
        make_norm(norm, dt),
        nn.ReLU(),
        nn.Conv2d(dt, dt, 3, padding=1),
    )
