"""The optimiser's step alone, for the parameters that ScaleKD trains: fused, and as PyTorch has it when nothing is said.

    python benchmarks/optimizer.py --out docs/results/performance

Of a pair's student, with the projectors of ScaleKD's published form; gradients are random and the learning rate is not zero.
"""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from harness import about, in_turns, parser, prepare, quartiles, ratio, table, told, write
from steps import PAIRS, PUBLISHED, Pair
from timm.optim import create_optimizer_v2
from torch import nn

from scalekd.methods.scalekd import scalekd
from scalekd.stages import StageView

OF = ("swin-s-resnet50", "swin-s-mobilenet-v1", "swin-s-mixer-s", "swin-l-vit-s", "demo", "lab-vit")
WAYS = {"fused": {"fused": True}, "plain": {}}


def trained(pair: Pair) -> nn.Module:
    """What an optimiser has in a distillation of the pair."""
    models = [timm.create_model(pair.student, **pair.student_kwargs)]
    with torch.device("meta"):  # its shapes are all that is needed
        models.append(timm.create_model(pair.teacher, **pair.teacher_kwargs))
    names, size = (pair.student, pair.teacher), (pair.size, pair.size)
    shapes = [StageView(model, name=name, image_size=size).shapes for model, name in zip(models, names, strict=True)]
    return nn.ModuleList([models[0], scalekd(*shapes, heads=pair.heads, **PUBLISHED)])


def measure(pair: Pair, device: torch.device, rounds: int) -> dict[str, Any]:
    module, steps = trained(pair).to(device), {}
    for way, options in WAYS.items():
        one = copy.deepcopy(module)
        for parameter in one.parameters():
            parameter.grad = torch.randn_like(parameter)
        made = create_optimizer_v2(one.parameters(), opt=pair.optimizer, lr=1e-3, weight_decay=1e-4, **options)
        steps[way] = made.step
    seconds = in_turns(steps, device, rounds, warm=2)
    return {
        "optimizer": pair.optimizer,
        "parameters": sum(p.numel() for p in module.parameters()),
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
            *(told([1000 * s for s in of["seconds"][way]], 1) for way in ("plain", "fused")),
            told(of["plain / fused"]),
        ]
        for name, of in found["pairs"].items()
    ]
    columns = ["pair", "optimiser", "parameters M", "plain ms", "fused ms", "plain / fused"]
    head = "The optimiser's step for the student and the projectors of the published form"
    foot = f"{found['machine']}; {args.rounds} rounds; medians (quartiles)."
    write(args.out, "optimizer", found, [head, "", *table(columns, rows), "", foot])


if __name__ == "__main__":
    main()
