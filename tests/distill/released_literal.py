"""One step of the authors' released ScaleKD code, written down again from its formulas, not optimised.

Projectors, distances, the order of the paths and the task losses of deep-optimization/ScaleKD. Student and teacher are
the same timm models as scalekd's; their stages are read with hooks and not through `StageView`. Drop path is off, as in
the shrunken models of the test, because the released loop also turns on the teacher's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from literal import phi
from torch import Tensor, nn


class Released(NamedTuple):
    """The values of one released configuration."""

    task: str  # ce, smooth (smoothing 0.1) or bce
    kd: bool  # with weights 0.5 and 0.5, otherwise the task loss alone with weight 1
    heads: tuple[int, int]
    s3: tuple[float, float]  # weights of the original and the alternative view on the proxy path
    s4: tuple[float, float]  # the same on the student path
    attention: float  # `softmax_scale`
    stage_3: str  # name of the student's module that ends stage 3
    stage_4: str
    teacher: tuple[str, str] = (
        "layers.2",
        "norm",
    )  # the names for the teacher: of Swin, whose target is after its norm


class Projector(nn.Module):
    """`AttentionProjector`: maps a student map to tokens of the teacher's shape, `(B, N, dt)`."""

    def __init__(self, ds: int, hw: tuple[int, int], dt: int, n: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.proj_pos = nn.Conv2d(dt, dt, 1)
        self.conv, self.bn = nn.Conv2d(ds, ds, 3, padding=1), nn.BatchNorm2d(ds, eps=1e-5)
        self.pos_embed = nn.Parameter(torch.zeros(1, ds, *hw))
        self.q, self.k, self.v = nn.Linear(dt, dt), nn.Linear(ds, dt), nn.Linear(ds, dt)
        self.proj = nn.Linear(dt, dt)
        self.norm = nn.LayerNorm(dt, eps=1e-5)
        self.fc1, self.fc2 = nn.Linear(dt, 4 * dt), nn.Linear(4 * dt, dt)
        self.query = nn.Embedding(n, dt)
        self.side = int(n**0.5)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        batch = len(x)
        query = self.query.weight[None].repeat(batch, 1, 1) if query is None else query
        grid = query.permute(0, 2, 1).reshape(batch, -1, self.side, self.side)
        asked = F.relu(self.proj_pos(grid)).flatten(2).transpose(1, 2)
        tokens = (F.relu(self.bn(self.conv(x))) + self.pos_embed).flatten(2).transpose(1, 2)
        q, k, v = (
            y.reshape(batch, y.shape[1], self.heads, -1).permute(0, 2, 1, 3)
            for y in (self.q(asked), self.k(tokens), self.v(tokens))
        )
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 * self.scale).softmax(dim=-1)
        y = self.norm(self.proj((weights @ v).transpose(1, 2).reshape(batch, asked.shape[1], -1)))
        return y + self.fc2(F.relu(self.fc1(y)))

    def copy_from(self, cap: Any) -> None:
        """Copies the parameters of scalekd's projector."""
        pairs = {
            self.proj_pos: cap.query_embed, self.conv: cap.conv, self.bn: cap.norm, self.q: cap.q, self.k: cap.k,
            self.v: cap.v, self.proj: cap.out, self.norm: cap.out_norm, self.fc1: cap.ffn[0], self.fc2: cap.ffn[2],
        }  # fmt: skip
        with torch.no_grad():
            for ours, theirs in pairs.items():
                ours.weight.copy_(theirs.weight.reshape(ours.weight.shape))
                ours.bias.copy_(theirs.bias)
            self.pos_embed.copy_(cap.position)
            if cap.queries is not None:
                self.query.weight.copy_(cap.queries)


def view_losses(tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`get_spat_loss` and `get_freq_loss` without their weights: sums over positions, means over the batch."""
    made = tokens.permute(0, 2, 1).reshape(target.shape)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return ((F.normalize(a, dim=1) - F.normalize(b, dim=1)) ** 2).sum() / len(a)

    return distance(made, target), distance(phi(made), phi(target))


def stages_of(model: nn.Module, images: Tensor, names: tuple[str, ...]) -> tuple[list[Tensor], Tensor]:
    """The outputs of the modules with these names, and the logits."""
    kept: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _, __, output, name=name: kept.__setitem__(name, output))
        for name in names
    ]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return [kept[name] for name in names], logits


def as_map(x: Tensor) -> Tensor:
    """Tokens `(B, N, D)` as a map of N = side x side positions."""
    side = int(x.shape[1] ** 0.5)
    return x if x.ndim == 4 else x.transpose(1, 2).reshape(len(x), -1, side, side)


def step(
    released: Released, student: Any, teacher: Any, method: Any, images: tuple[Tensor, Tensor], y: Tensor
) -> Tensor:
    """The total loss. method: scalekd's, whose parameters are copied. images: normalised for student and for teacher."""
    (s3, s4), logit_s = stages_of(student, images[0], (released.stage_3, released.stage_4))
    s3, s4 = as_map(s3), as_map(s4)
    with torch.no_grad():
        (t3, t4), logit_t = stages_of(teacher, images[1], released.teacher)
        t3, t4 = (x.permute(0, 3, 1, 2) if x.ndim == 4 else as_map(x) for x in (t3, t4))
    total = task_loss(released.task, logit_s, y)
    if released.kd:
        kd = -(logit_t.softmax(1) * logit_s.log_softmax(1)).sum(1).mean()
        entropy = -(logit_t.softmax(1) * logit_t.log_softmax(1)).sum(1).mean()  # constant; scalekd's KL leaves it out
        total = 0.5 * total + 0.5 * (kd - entropy)
    for i, view in enumerate(("ori", "alt")):
        cap = Projector(s3.shape[1], s3.shape[2:], t3.shape[1], t3[0, 0].numel(), released.heads[0], released.attention)
        cap = cap.to(s3)
        cap.copy_from(method.proxy_caps[view])
        proxy = last_stage(teacher, cap(s3), t3)  # forward_specific_stage(..., 4)
        total = total + released.s3[i] * view_losses(proxy, t4)[i]
        if released.s4[i]:
            cap = Projector(
                s4.shape[1], s4.shape[2:], t4.shape[1], t4[0, 0].numel(), released.heads[1], released.attention
            ).to(s4)
            cap.copy_from(method.student_caps[view])
            total = total + released.s4[i] * view_losses(cap(s4, proxy), t4)[i]
    return total


def last_stage(teacher: Any, tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens through the frozen last stage: of a Swin with its norm, of a ViT cut into quarters its last blocks alone."""
    if hasattr(teacher, "blocks"):
        return teacher.blocks[3 * len(teacher.blocks) // 4 :](tokens)
    return teacher.norm(teacher.layers[3](tokens.reshape(len(tokens), *like.shape[2:], -1))).flatten(1, 2)


def task_loss(task: str, logits: Tensor, y: Tensor) -> Tensor:
    hot = F.one_hot(y, logits.shape[1]).to(logits)
    if task == "bce":  # use_sigmoid: summed over the classes
        return -(hot * F.logsigmoid(logits) + (1 - hot) * F.logsigmoid(-logits)).sum(1).mean()
    eps = 0.1 if task == "smooth" else 0.0
    return -(((1 - eps) * hot + eps / logits.shape[1]) * logits.log_softmax(1)).sum(1).mean()
