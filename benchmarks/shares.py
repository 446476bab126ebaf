"""Measures how two teachers share the gradient of `fm`, if the features of one are 100 times as large.

    python benchmarks/shares.py --out docs/results

The demo's student learns from the demo's teacher and from the laboratory's small one, without labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from scalekd.common.provenance import machine
from scalekd.config.recipe import load_recipe
from scalekd.distill.build import build
from scalekd.train.engine import train_step

STEPS = 21
EVERY = 10
IMAGES = 200
TEACHERS = [
    "teacher=null",
    "teachers.demo={model: vit_tiny_r_s16_p8_224, kwargs: {patch_size: 1, embed_dim: 96, depth: 6, num_heads: 3}, "
    "weights: 'package:demo/teacher.safetensors', mean: [0.286], std: [0.353]}",
    "teachers.small.model=lab/teacher-small",
]


def share(standardise: str, loss: str, scale: float) -> list[float]:
    """The share of the demo's teacher in the gradient at the student, every `EVERY` steps of `STEPS`."""
    images = "" if standardise == "none" else f", images: {IMAGES}"
    losses = f"losses={{fm: {{standardise: {standardise}, loss: {loss}{images}}}}}"
    balance = f"balance={{adjust: false, every: {EVERY}, momentum: 0}}"
    run = build(load_recipe("demo", [*TEACHERS, losses, balance]), torch.device("cpu"))
    norm = run.distiller.teachers["small"].view.model.norm
    with torch.no_grad():
        norm.weight *= scale
        norm.bias *= scale
    run.prepare()
    run.model.train()
    found = []
    for step, batch in enumerate(run.train_batches(run.train_sampler(steps=STEPS), workers=0)):
        run.schedule.step_update(step)
        train_step(run.model, [batch], run, step)
        if step % EVERY == 0:
            found.append(run.gradient_shares()["fm@demo"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = [
        {"loss": loss, "standardise": standardise}
        | {f"x{scale}": share(standardise, loss, scale) for scale in (1, 100)}
        for loss in ("mse", "cosine_l1")
        for standardise in ("none", "channel", "phi-s")
    ]
    found = {"machine": machine(torch.device("cpu")), "steps": STEPS, "every": EVERY, "rows": rows}
    (out / "shares.json").write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(row["loss"], row["standardise"], *(f"{100 * statistics.mean(row[key]):.1f}" for key in ("x1", "x100")))


if __name__ == "__main__":
    main()
