"""Measures `kd` and `fd` against timm's own distillation tasks with the same pair, batch, precision and optimiser.

    python benchmarks/timm_tasks.py demo --out docs/results/performance

timm's tasks get what timm's loader returns, pixels normalised with the student's mean and std, and the normalisation is
part of both steps. The two `fd` differ: timm compares the pooled features by their squared difference, scalekd the maps
position by position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from harness import about, in_turns, median_text, parser, prepare, quartiles, ratio, table, write
from steps import PAIRS, TASK, Pair, make_step
from timm.optim import create_optimizer_v2
from timm.task import DistillationTeacher, FeatureDistillationTask, LogitDistillationTask
from torch import Tensor, nn

from scalekd import Distiller
from scalekd.models.inputs import default_statistics

TASKS = {"kd": LogitDistillationTask, "fd": FeatureDistillationTask}


def measure(pair: Pair, device: torch.device, rounds: int, half: bool) -> dict[str, Any]:
    student = timm.create_model(pair.student, **pair.student_kwargs).to(device)
    teacher = timm.create_model(pair.teacher, **pair.teacher_kwargs).to(device).eval().requires_grad_(False)
    size = (pair.size, pair.size)
    pixels = torch.rand(pair.batch, 3, *size, device=device)
    targets = torch.randint(student.num_classes, (pair.batch,), device=device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in default_statistics(student))

    def of_scalekd(distiller: nn.Module) -> Tensor:
        return distiller(pixels, targets)["total"]

    def of_timm(task: nn.Module) -> Tensor:
        return task((pixels - mean) / std, targets)["loss"]

    steps: dict[str, Callable[[], None]] = {}
    for name, task_type in TASKS.items():
        distiller = Distiller(student, teacher, TASK | {name: {}}, image_size=size).to(device)
        task = task_type(
            student_model=student,
            teacher_model=DistillationTeacher(teacher, device=device),
            criterion=nn.CrossEntropyLoss(),
            device=device,
            verbose=False,
        ).to(device)
        for key, trained, losses in (
            (f"scalekd {name}", distiller, of_scalekd),
            (f"timm {name}", task, of_timm),
        ):
            parameters = [p for p in trained.parameters() if p.requires_grad]
            optimizer = create_optimizer_v2(parameters, opt=pair.optimizer, lr=0.0, weight_decay=1e-4)
            steps[key] = make_step(trained, partial(losses, trained), optimizer, device, half)
    seconds = in_turns(steps, device, rounds, warm=2)
    return {
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "timm / scalekd": {name: ratio(seconds[f"timm {name}"], seconds[f"scalekd {name}"]) for name in TASKS},
    }


def main() -> None:
    args_parser = parser(__doc__, rounds=9)
    args_parser.add_argument("pair", choices=PAIRS)
    args_parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    args = args_parser.parse_args()
    device, pair = prepare(args), PAIRS[args.pair]
    found = about(device) | {"batch": pair.batch, "precision": args.precision, "rounds": args.rounds}
    found |= measure(pair, device, args.rounds, args.precision == "bf16")
    rows = [
        [
            name,
            *(median_text(found["seconds"][f"{package} {name}"], 3) for package in ("scalekd", "timm")),
            median_text(v),
        ]
        for name, v in found["timm / scalekd"].items()
    ]
    head = f"{args.pair}: {pair.teacher} -> {pair.student}, batch {pair.batch}, {args.precision}"
    foot = f"{found['machine']}; timm {timm.__version__}; {args.rounds} rounds; medians (quartiles)."
    lines = [head, "", *table(["step", "scalekd s", "timm s", "timm / scalekd"], rows), "", foot]
    write(args.out, f"timm-{args.pair}", found, lines)


if __name__ == "__main__":
    main()
