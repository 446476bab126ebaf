"""Measures the optimiser's step alone, for the parameters that ScaleKD trains: fused, and with PyTorch's default.

    python benchmarks/optimizer.py --out docs/results/performance

The parameters are those of a pair's student and of the projectors in ScaleKD's published form; gradients are random.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from harness import about, in_turns, median_text, parser, prepare, quartiles, ratio, table, write
from steps import PAIRS, Pair, losses_of, make_optimizer
from torch import nn

from scalekd import Distiller

OF = ("swin-s-resnet50", "swin-s-mobilenet-v1", "swin-s-mixer-s", "swin-l-vit-s", "demo", "lab-vit")


def measure(pair: Pair, device: torch.device, rounds: int) -> dict[str, Any]:
    student = timm.create_model(pair.student, **pair.student_kwargs)
    teacher = timm.create_model(pair.teacher, **pair.teacher_kwargs)
    distiller = Distiller(student, teacher, losses_of(pair.heads)["scalekd"], image_size=(pair.size, pair.size))
    steps, trained = {}, list(distiller.parameters())
    for way in ("fused", "plain"):
        copies = [nn.Parameter(p.detach().to(device, copy=True)) for p in trained]
        for parameter in copies:
            parameter.grad = torch.randn_like(parameter)
        steps[way] = make_optimizer(copies, pair.optimizer, fused=way == "fused").step
    seconds = in_turns(steps, device, rounds, warm=2)
    return {
        "optimizer": pair.optimizer,
        "parameters": sum(p.numel() for p in trained),
        "seconds": {way: quartiles(values) for way, values in seconds.items()},
        "plain / fused": ratio(seconds["plain"], seconds["fused"]),
    }


def main() -> None:
    args = parser(__doc__, rounds=15).parse_args()
    device = prepare(args)
    found = about(device) | {"rounds": args.rounds}
    found |= {"pairs": {name: measure(PAIRS[name], device, args.rounds) for name in OF}}
    rows = [
        [
            name,
            of["optimizer"],
            f"{of['parameters'] / 1e6:.1f}",
            *(median_text([1000 * s for s in of["seconds"][way]], 1) for way in ("plain", "fused")),
            median_text(of["plain / fused"]),
        ]
        for name, of in found["pairs"].items()
    ]
    columns = ["pair", "optimiser", "parameters M", "plain ms", "fused ms", "plain / fused"]
    head = "The optimiser's step for the student and the projectors of the published form"
    foot = f"{found['machine']}; {args.rounds} rounds; medians (quartiles)."
    write(args.out, "optimizer", found, [head, "", *table(columns, rows), "", foot])


if __name__ == "__main__":
    main()
