"""Measures what `balance` adds to a training step: in the steps in which it measures gradients, and in the others.

    python benchmarks/balance.py --out docs/results/performance

Whole steps of recipes on the demo's images, with and without `balance`, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import about, in_turns, median_text, parser, prepare, quartiles, ratio, table, write

from scalekd.config.recipe import load_recipe
from scalekd.distill.build import build
from scalekd.train.engine import train_step

EVERY = 50  # the default of `balance.every`
LOSSES = {
    "ce, dist, fd": "{ce: {}, dist: {weight: 2}, fd: {weight: 0.5}}",
    "ce, dist, scalekd": "{ce: {}, dist: {weight: 2}, scalekd: {weight: 0.5}}",
    "ce, scalekd": "{ce: {}, scalekd: {weight: 0.5}}",
}


def step_of(losses: str, balance: str, number: int, device: torch.device) -> Callable[[], object]:
    """One optimiser step, the same number each time."""
    run = build(load_recipe("demo", [f"losses={losses}", f"balance={balance}"]), device)
    batches = [next(run.train_batches(run.train_sampler(steps=1), workers=0))]
    run.model.train()
    train_step(run.model, batches, run, 0)  # a first measurement
    return lambda: train_step(run.model, batches, run, number)


def measure(losses: str, device: torch.device, rounds: int) -> dict[str, Any]:
    ways = {
        "without": step_of(losses, "null", EVERY, device),
        "measured": step_of(losses, "{}", EVERY, device),
        "others": step_of(losses, "{}", EVERY + 1, device),
    }
    seconds = in_turns(ways, device, rounds, warm=2)
    found: dict[str, Any] = {"seconds": {way: quartiles(values) for way, values in seconds.items()}}
    found |= {f"{way} / without": ratio(seconds[way], seconds["without"]) for way in ("measured", "others")}
    mean = [
        (m + (EVERY - 1) * o) / EVERY for m, o in zip(seconds["measured"], seconds["others"], strict=True)
    ]  # of a run
    return found | {"run / without": ratio(mean, seconds["without"])}


def main() -> None:
    args = parser(__doc__, rounds=25).parse_args()
    device = prepare(args)
    found = about(device) | {"rounds": args.rounds, "every": EVERY}
    found |= {"losses": {name: measure(losses, device, args.rounds) for name, losses in LOSSES.items()}}
    ratios = [f"{way} / without" for way in ("measured", "others", "run")]
    rows = [
        [name, median_text([1000 * s for s in of["seconds"]["without"]], 1), *(median_text(of[key]) for key in ratios)]
        for name, of in found["losses"].items()
    ]
    columns = ["losses", "step without ms", "a measured step", "another step", f"a run, measured every {EVERY} steps"]
    head = "Steps with `balance`, as multiples of the step without"
    foot = f"The demo's models, {found['machine']}; {args.rounds} rounds; medians (quartiles)."
    write(args.out, "balance", found, [head, "", *table(columns, rows), "", foot])


if __name__ == "__main__":
    main()
