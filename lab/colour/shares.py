"""Who pulls at the student over the steps of a run: shares of the loss and of the gradient, and clipping.

    python lab/colour/shares.py docs/results/lab-colour/trials-300

reads the logs of a comparison's runs, whose recipes have `balance`, and writes shares.json and shares.md into its folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

POINTS = 3  # of each run: after the first, the middle and the last logged steps


def main(folder: Path) -> None:
    found = [shares(run.parent) for run in sorted((folder / "runs").rglob("log.jsonl"))]
    rows = [row for row in found if row]
    (folder / "shares.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "shares.md").write_text(markdown(rows))


def shares(run: Path) -> dict[str, Any] | None:
    """What the log says at the points; None for a run that did not measure gradients."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step" and "gradient_shares" in event]
    if not steps:
        return None
    clip = yaml.safe_load((run / "recipe.yaml").read_text())["train"]["clip_grad"]
    chosen = [steps[round(k * (len(steps) - 1) / (POINTS - 1))] for k in range(POINTS)]
    final = [event for event in events if event["event"] == "finished"][-1]
    return {
        "run": "/".join(run.parts[-3:]),
        "top1": final["top1"],
        "clip_grad": clip,
        "points": [
            {
                "step": event["step"],
                "loss": of_loss(event["losses"]),
                "gradient": event["gradient_shares"],
                "grad_norm": event["grad_norm"],
            }
            for event in chosen
        ],
    }


def of_loss(terms: dict[str, float]) -> dict[str, float]:
    """The share of each loss in the total; its terms are added up."""
    total = terms["total"]
    sums: dict[str, float] = {}
    for term, value in terms.items():
        if term != "total":
            name = term.partition(".")[0]
            sums[name] = sums.get(name, 0.0) + value / total
    return {name: round(value, 4) for name, value in sums.items()}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| run | top-1 % | step | share of the loss | share of the gradient | gradient norm | clipped to |"]
    lines.append("|---|--:|--:|---|---|--:|--:|")
    for row in rows:
        for point in row["points"]:
            texts = [
                ", ".join(f"{name} {100 * v:.0f}" for name, v in point[kind].items()) for kind in ("loss", "gradient")
            ]
            norm, clip = point["grad_norm"], row["clip_grad"]
            left = f"{100 * min(1, clip / norm):.0f} %" if clip else "not clipped"
            lines.append(
                f"| {row['run']} | {row['top1']:.1f} | {point['step']} | {' | '.join(texts)} | {norm:.1f} | {left} |"
            )
    end = (
        "Shares in %, means since the line before in the log. The gradient's share is that of its norm at the student's backbone. "
        "The gradient norm is that of all parameters together, before clipping; `clipped to` is what clipping leaves of a gradient of that norm."
    )
    return "\n".join([*lines, "", end]) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
