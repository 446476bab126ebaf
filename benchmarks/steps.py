"""Measures training steps of every method against the floor of any distillation and against the paper taken literally.

    python benchmarks/steps.py swin-s-resnet50 --out docs/results/performance

The floor is the teacher's forward pass without gradients, the student's forward and backward pass with cross entropy,
and the optimiser's step, on the plain timm models. All steps use the same student and teacher with random weights, the
same random pixels, and a learning rate of 0. `literal` is benchmarks/literal.py in place of `scalekd`; the methods after
it are `scalekd` with options that make it cheaper than the published form.

`--precision bf16` runs the floor and our steps under autocast; `--compile` uses torch.compile as `train.compile` does.
`literal` stays eager and in float32; `literal-bf16` is the same under autocast. The JSON then also has the graph breaks
and the differences of each step's losses and gradients from the plain ones in float32. For compiled steps, memory is
reported on a GPU only.

The optimiser is fused, as in training. `literal` uses PyTorch's default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
import torch
from harness import about, in_turns, median_text, memory_mb, parser, prepare, quartiles, ratio, table, write
from literal import LiteralScaleKD
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from scalekd import Distiller
from scalekd.distill.compiled import compile_step


class Pair(NamedTuple):
    teacher: str
    student: str
    size: int
    batch: int
    heads: tuple[int, int]  # at (stage 3, stage 4)
    optimizer: str = "sgd"
    teacher_kwargs: Mapping[str, Any] = MappingProxyType({})
    student_kwargs: Mapping[str, Any] = MappingProxyType({})


DEMO_TEACHER = {"img_size": 28, "patch_size": 1, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10}
DEMO_STUDENT = {
    "channels": [16, 32, 64, 96],
    "stem_width": 8,
    "output_stride": 8,
    "replace_stem_pool": True,
    "num_classes": 10,
}
POOLED = {"class_token": False, "global_pool": "avg"}
LAB_TEACHER = DEMO_TEACHER | {"img_size": 40, "patch_size": 2, "num_classes": 100}
LAB_STUDENT = POOLED | {
    "img_size": 40,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 100,
}
PAIRS = {
    "swin-s-resnet50": Pair("swin_small_patch4_window7_224", "resnet50", 224, 4, (3, 6)),
    "swin-s-mobilenet-v1": Pair("swin_small_patch4_window7_224", "mobilenetv1_100", 224, 4, (3, 6)),
    "swin-s-mixer-s": Pair("swin_small_patch4_window7_224", "mixer_s16_224", 224, 4, (3, 6), "adamw"),
    "swin-l-resnet50": Pair("swin_large_patch4_window7_224", "resnet50", 224, 4, (16, 24)),
    "swin-l-vit-s": Pair(
        "swin_large_patch4_window7_224", "vit_small_patch16_224", 224, 4, (16, 24), "adamw", {}, POOLED
    ),
    "eva-l-mixer-s": Pair(
        "eva_large_patch14_196", "mixer_s16_224", 224, 2, (16, 16), "adamw", {"img_size": 224, "num_classes": 1000}
    ),
    "demo": Pair("vit_tiny_r_s16_p8_224", "resnet10t", 28, 50, (3, 3), "adamw", DEMO_TEACHER, DEMO_STUDENT),
    "lab-vit": Pair("vit_tiny_r_s16_p8_224", "vit_tiny_patch16_224", 40, 32, (3, 3), "adamw", LAB_TEACHER, LAB_STUDENT),
}
TASK = {"ce": {}}
PUBLISHED: dict[str, Any] = {"shared": False, "expansion": 4}
LITERAL = ("literal", "literal-bf16")


def losses_of(heads: tuple[int, int]) -> dict[str, dict[str, Any]]:
    one = {"heads": heads[1]}
    steps: dict[str, dict[str, Any]] = {
        "kd": TASK | {"kd": {}},
        "fd": TASK | {"fd": {}},
        "cap": TASK | {"cap": one},
        "dfm": TASK | {"dfm": one},
        "tpp": TASK | {"tpp": {"heads": heads}},
        "scalekd": TASK | {"kd": {}, "scalekd": {"heads": heads} | PUBLISHED},
    }
    steps |= dict.fromkeys(LITERAL, TASK | {"kd": {}, "literal": partial(LiteralScaleKD, heads=heads)})
    cheaper: dict[str, dict[str, Any]] = {
        "separable": {"tokens": "separable"},
        "reduced": {"tokens": "reduced"},
        "shared": {"shared": True},
        "reduced-shared": {"tokens": "reduced", "shared": True},
        "reduced-shared-narrow": {"tokens": "reduced", "shared": True, "expansion": 1},
        "shared-narrow": {"shared": True, "expansion": 1},
        "grouped-shared-narrow": {"tokens": "grouped", "shared": True, "expansion": 1},
    }
    published = steps["scalekd"]["scalekd"]
    return steps | {name: TASK | {"kd": {}, "scalekd": published | options} for name, options in cheaper.items()}


def make_optimizer(parameters: Iterable[Tensor], name: str, fused: bool = True) -> torch.optim.Optimizer:
    return create_optimizer_v2(parameters, opt=name, lr=0.0, weight_decay=1e-4, fused=fused or None)


def make_step(
    trained: nn.Module, losses: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: torch.device, half: bool
) -> Callable[[], None]:
    """A training step: forward under autocast, backward, the optimiser's step."""
    trained.train()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = losses()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def differences(distiller: Distiller, pixels: Tensor, targets: Tensor, half: bool, compiled: bool) -> dict[str, float]:
    """Compiles the step if asked to, and returns its largest differences from the plain step in float32: of a loss
    relative to itself, and of a gradient value relative to the largest gradient value.
    """
    found = []
    for as_measured in (False, True):
        if as_measured and compiled:
            compile_step(distiller, len(pixels))
        torch.manual_seed(0)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=as_measured and half):
            losses = distiller.train()(pixels, targets)
        losses["total"].backward()
        gradients = torch.cat([p.grad.flatten() for p in distiller.parameters() if p.grad is not None])
        found.append((torch.stack(list(losses.values())).detach(), gradients))
        distiller.zero_grad()
    (plain, slopes), (those_measured, their_slopes) = found
    return {
        "losses": ((those_measured - plain).abs() / plain.abs()).max().item(),
        "gradients": ((their_slopes - slopes).abs().max() / slopes.abs().max()).item(),
    }


def measure(
    pair: Pair, names: list[str], device: torch.device, rounds: int, half: bool, compiled: bool = False
) -> dict[str, Any]:
    """Seconds, ratios and memory of the floor and of the named methods."""
    if compiled:
        torch._dynamo.config.recompile_limit = 2 * len(
            losses_of(pair.heads)
        )  # every step is a version of the same function
    student = timm.create_model(pair.student, **pair.student_kwargs).to(device)
    teacher = timm.create_model(pair.teacher, **pair.teacher_kwargs).to(device).eval().requires_grad_(False)
    pixels = torch.rand(pair.batch, 3, pair.size, pair.size, device=device)
    targets = torch.randint(student.num_classes, (pair.batch,), device=device)

    def alone(pixels: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(student(pixels), targets)

    look: Callable[..., Tensor] = torch.compile(teacher, dynamic=False) if compiled else teacher
    learn: Callable[..., Tensor] = torch.compile(alone, dynamic=False) if compiled else alone

    def floor() -> Tensor:
        with torch.no_grad():
            look(pixels)
        return learn(pixels, targets)

    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, dict[str, float]] = {}
    apart: dict[str, dict[str, float]] = {}
    losses = losses_of(pair.heads)
    for name in ["floor", *names]:
        trained: nn.Module = student
        forward = floor
        if name != "floor":
            trained = Distiller(student, teacher, losses[name], image_size=(pair.size, pair.size)).to(device)
            forward = partial(lambda distiller: distiller(pixels, targets)["total"], trained)
            if (compiled or half) and name not in LITERAL:
                apart[name] = differences(trained, pixels, targets, half, compiled)
        optimizer = make_optimizer(trained.parameters(), pair.optimizer, fused=name not in LITERAL)
        steps[name] = make_step(trained, forward, optimizer, device, half and name != "literal")
        steps[name]()
        if compiled and device.type == "cpu":
            continue  # autograd's hooks do not see what compiled code keeps for the backward pass
        memory[name] = memory_mb(
            steps[name],
            [*trained.parameters(), *trained.buffers()],
            [*teacher.parameters(), *teacher.buffers()],
            partial(_state, optimizer),
            device,
        )
    seconds = in_turns(steps, device, rounds)
    found: dict[str, Any] = {"seconds": {name: quartiles(values) for name, values in seconds.items()}}
    for other in ("floor", "fd", "literal"):
        if other in seconds:
            found[f"vs {other}"] = {name: ratio(values, seconds[other]) for name, values in seconds.items()}
    if compiled:
        found |= {"graph_breaks": dict(torch._dynamo.utils.counters["graph_break"])}
    if apart:
        found |= {"differences": apart}
    return found | ({"memory_mb": memory} if memory else {})


def _plain(pair: Pair) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in pair._asdict().items()}


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for v in chain.from_iterable(s.values() for s in optimizer.state.values()) if isinstance(v, Tensor)]


def lines_of(found: dict[str, Any]) -> list[str]:
    columns = ["step", "seconds", "vs floor"]
    columns += [c for c in ("vs fd", "vs literal") if c in found]
    memory = found.get("memory_mb")
    if memory:
        columns += ["memory MB"] + ["memory vs fd"] * ("vs fd" in found)
    rows = []
    for name, seconds in found["seconds"].items():
        row = [name, median_text(seconds, 3)]
        row += [median_text(found[c][name]) for c in ("vs floor", "vs fd", "vs literal") if c in found]
        if memory:
            mb = memory[name]["total"]
            row += [f"{mb:.0f}"] + [f"{mb / memory['fd']['total']:.2f}"] * ("vs fd" in found)
        rows.append(row)
    p = found["pair"]
    title = f"{p['teacher']} -> {p['student']}, {p['size']} pixels, batch {p['batch']}, {found['precision']}, {p['optimizer']}"
    title += ", compiled" * found.get("compile", False)
    return [title, "", *table(columns, rows), "", f"{found['machine']}; {found['rounds']} rounds; medians (quartiles)."]


def main() -> None:
    args_parser = parser(__doc__, rounds=7)
    args_parser.add_argument("pair", choices=PAIRS)
    args_parser.add_argument("--batch", type=int)
    args_parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    args_parser.add_argument(
        "--steps", nargs="+", choices=(names := list(losses_of((1, 1)))), help="the steps to measure (default: all)"
    )
    args_parser.add_argument(
        "--compile", action="store_true", help="compile the floor and our steps with torch.compile"
    )
    args = args_parser.parse_args()
    half = args.precision == "bf16"
    if not half and "literal-bf16" in (args.steps or ()):
        args_parser.error("literal-bf16 needs --precision bf16")
    steps = args.steps or [name for name in names if half or name != "literal-bf16"]
    device = prepare(args)
    pair = PAIRS[args.pair]
    pair = pair._replace(batch=args.batch or pair.batch)
    found = about(device) | {"pair": _plain(pair), "precision": args.precision, "rounds": args.rounds}
    found |= {"compile": args.compile}
    found |= measure(pair, steps, device, args.rounds, half, args.compile)
    name = f"steps-{args.pair}" + "-bf16" * half + "-compile" * args.compile
    write(args.out, name, found, lines_of(found))


if __name__ == "__main__":
    main()
