"""Computes where the queries of a cross attention projector (CAP) attend on the student's map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalekd.methods.projectors import CrossAttentionProjector

from .runs import Runs, projector_calls


def attention_weights(cap: CrossAttentionProjector, x: Tensor, queries: Tensor | None = None) -> Tensor:
    """The attention weights (B, heads, H * W, h * w) of each query, a position of the teacher's map, on positions of `x`.

    x: (B, ds, h, w). queries: (B, dt, H, W), or None for the projector's own. The projector's fused attention does not
    return these weights. Rows sum to 1.
    """
    tokens = (F.relu(cap.norm(cap.conv(x))) + cap.position).flatten(2).transpose(1, 2)  # (B, h*w, ds)
    if queries is None:
        assert cap.queries is not None
        embedded = cap.query_embed(cap.queries[None])
    else:
        embedded = cap.query_embed(queries.flatten(2).transpose(1, 2))
    q = cap.q(F.relu(embedded)).unflatten(2, (cap.heads, -1)).transpose(1, 2)
    k = cap.k(tokens).unflatten(2, (cap.heads, -1)).transpose(1, 2)
    return (cap.scale * q @ k.transpose(2, 3)).softmax(3)


@torch.no_grad()
def attention_maps(runs: Runs, images: int) -> list[dict[str, Any]]:
    """For each run and CAP: the attention of the first `images` images, averaged over heads, and their pixels.

    `maps`: by image, then by query, `[(row, column) or None, (h, w) list]`; None is the mean over all queries.
    """
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for pixels, _ in runs.batches(images):
        teacher = runs.teacher.features(pixels)
        for t in runs.trained:
            done: set[CrossAttentionProjector] = set()  # a projector of both views is listed under the first one
            for name, call in projector_calls(t.methods, t.student.features(pixels), teacher).items():
                if isinstance(call.projector, CrossAttentionProjector) and call.projector not in done:
                    done.add(call.projector)
                    grid = call.projector.grid
                    empty = {"run": t.label, "projector": name, "grid": grid, "pixels": [], "maps": []}
                    result = results.setdefault((t.label, name), empty)
                    weights = attention_weights(call.projector, *call.inputs).mean(1)
                    result["pixels"] += list(pixels.cpu().numpy())
                    result["maps"] += _maps(weights, grid, tuple(call.inputs[0].shape[2:]))
    return list(results.values())


def _maps(weights: Tensor, grid: tuple[int, ...], student_grid: tuple[int, ...]) -> list[list[Any]]:
    """The mean over queries, and the queries at the quarters of the teacher's grid. weights: (B, H * W, h * w)."""
    height, width = grid
    quarters = [(r, c) for r in (height // 4, 3 * height // 4) for c in (width // 4, 3 * width // 4)]
    shaped = weights.unflatten(2, student_grid).double().cpu()
    single = {q: q[0] * width + q[1] for q in quarters}
    return [[(None, image.mean(0).tolist()), *((q, image[i].tolist()) for q, i in single.items())] for image in shaped]
