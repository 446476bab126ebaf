"""Where the queries of a cross attention projector look on the student's map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalekd.methods.projectors import CrossAttentionProjector

from .runs import Runs, projector_calls


def attention_weights(cap: CrossAttentionProjector, x: Tensor, queries: Tensor | None = None) -> Tensor:
    """(B, heads, H * W, h * w): how much each query, a position of the teacher's map, takes of each position of `x`.

    x (B, ds, h, w) and queries (B, dt, H, W) or None as in the projector's own call, whose fused attention does not
    give these. Rows sum to 1.
    """
    tokens = (F.relu(cap.norm(cap.conv(x))) + cap.position).flatten(2).transpose(1, 2)  # (B, h*w, ds)
    if queries is None:
        assert cap.queries is not None
        given = cap.queries[None]
    else:
        given = queries.flatten(2).transpose(1, 2)
    q = cap.q(F.relu(cap.query_embed(given))).unflatten(2, (cap.heads, -1)).transpose(1, 2)
    k = cap.k(tokens).unflatten(2, (cap.heads, -1)).transpose(1, 2)
    return (cap.scale * q @ k.transpose(2, 3)).softmax(3)


@torch.no_grad()
def attention_maps(runs: Runs, images: int) -> list[dict[str, Any]]:
    """For each run and CAP: maps of attention, the mean over heads, for the first images, and the images themselves.

    `maps`: by image, then by query, `[(row, column) or None, (h, w) list]`; None stands for the mean over all queries.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for pixels, _ in runs.batches(images):
        teacher = runs.teacher.features(pixels)
        for t in runs.trained:
            seen: set[CrossAttentionProjector] = set()  # one that serves both views stands under the first
            for name, call in projector_calls(t.methods, t.student.features(pixels), teacher).items():
                if isinstance(call.projector, CrossAttentionProjector) and call.projector not in seen:
                    seen.add(call.projector)
                    grid = call.projector.grid
                    empty = {"run": t.label, "projector": name, "grid": grid, "pixels": [], "maps": []}
                    of_cap = found.setdefault((t.label, name), empty)
                    weights = attention_weights(call.projector, *call.given).mean(1)
                    of_cap["pixels"] += list(pixels.cpu().numpy())
                    of_cap["maps"] += _maps(weights, grid, tuple(call.given[0].shape[2:]))
    return list(found.values())


def _maps(weights: Tensor, grid: tuple[int, ...], onto: tuple[int, ...]) -> list[list[Any]]:
    """weights (B, H * W, h * w): the mean over queries and the queries at the quarters of the teacher's grid."""
    height, width = grid
    quarters = [(r, c) for r in (height // 4, 3 * height // 4) for c in (width // 4, 3 * width // 4)]
    shaped = weights.unflatten(2, onto).double().cpu()
    single = {q: q[0] * width + q[1] for q in quarters}
    return [
        [(None, of_image.mean(0).tolist()), *((q, of_image[i].tolist()) for q, i in single.items())]
        for of_image in shaped
    ]
