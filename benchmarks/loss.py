"""Measures the loss of ScaleKD alone, both views, forward and backward, against the paper's DCT taken literally.

    python benchmarks/loss.py --out docs/results/performance

`made` stands for the output of a projector, with its memory layout; there are two for each view, one per path, as in a
step of ScaleKD. Values and gradients are compared too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import literal
import torch
from harness import about, in_turns, median_text, parser, prepare, quartiles, ratio, table, write
from torch import Tensor

from scalekd.methods.distance import normalized_distance, remove_direct

GRIDS, CHANNELS, BATCH = (7, 14, 28), 768, 16


def ours(made: list[Tensor], target: Tensor) -> Tensor:
    centred = remove_direct(target)
    first = [normalized_distance(m, target, "mean") for m in made[:2]]
    second = [normalized_distance(remove_direct(m), centred, "mean") for m in made[2:]]
    return torch.stack([*first, *second]).sum()


def as_in_the_paper(made: list[Tensor], target: Tensor) -> Tensor:
    first = [literal.distance(m, target) for m in made[:2]]
    second = [literal.distance(literal.phi(m), literal.phi(target)) for m in made[2:]]
    return torch.stack([*first, *second]).sum()


def value_and_gradient(loss: Any, made: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(made, target)
    return value.detach(), torch.stack(torch.autograd.grad(value, made))


def measure(grid: int, device: torch.device, rounds: int) -> dict[str, Any]:
    def maps() -> Tensor:  # tokens first, as attention gives them; away from zero mean, as real features are
        tokens = torch.randn(BATCH, grid * grid, CHANNELS, device=device) + torch.randn(CHANNELS, device=device)
        return tokens.transpose(1, 2).unflatten(2, (grid, grid))

    made, target = [maps().requires_grad_() for _ in range(4)], maps()
    ways = {"ours": partial(value_and_gradient, ours), "literal": partial(value_and_gradient, as_in_the_paper)}
    (value, gradient), (expected, by_hand) = (way(made, target) for way in ways.values())
    seconds = in_turns({name: partial(way, made, target) for name, way in ways.items()}, device, rounds)
    return {
        "grid": grid,
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "literal / ours": ratio(seconds["literal"], seconds["ours"]),
        "difference of values": abs(1 - value / expected).item(),
        "difference of gradients": ((gradient - by_hand).norm() / by_hand.norm()).item(),
    }


def main() -> None:
    args = parser(__doc__, rounds=15).parse_args()
    device = prepare(args)
    grids = [measure(grid, device, args.rounds) for grid in GRIDS]
    rows = [
        [
            f"{g['grid']}x{g['grid']}",
            *(median_text([1000 * s for s in g["seconds"][name]], 1) for name in ("ours", "literal")),
            median_text(g["literal / ours"]),
            *(f"{g[f'difference of {what}']:.0e}" for what in ("values", "gradients")),
        ]
        for g in grids
    ]
    columns = ["grid", "ours ms", "literal ms", "literal / ours", "values differ by", "gradients differ by"]
    found = about(device) | {"batch": BATCH, "channels": CHANNELS, "rounds": args.rounds, "grids": grids}
    head = f"Loss part, both views and both paths, forward and backward; batch {BATCH}, {CHANNELS} channels, float32"
    foot = f"{found['machine']}; {args.rounds} rounds; medians (quartiles); differences are relative."
    write(args.out, "loss", found, [head, "", *table(columns, rows), "", foot])


if __name__ == "__main__":
    main()
