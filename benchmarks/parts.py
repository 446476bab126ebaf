"""Measures where the time of a step goes, part by part, and what cheaper student branches cost.

    python benchmarks/parts.py swin-s-resnet50 --out docs/results/performance

Each part runs alone. The floor is the plain timm models on random pixels. ScaleKD's own parts are both views and both
paths on random maps of the pair's shapes, forward and backward. Multiply-adds (G) are per image, from PyTorch's FLOP
counter, as in `scalekd cost`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from harness import about, in_turns, median_text, parser, prepare, quartiles, table, write
from literal import LiteralScaleKD
from loss import as_in_the_paper, ours
from steps import PAIRS, PUBLISHED, Pair, make_optimizer
from torch import Tensor, nn

from scalekd.cost.flops import flop_counter
from scalekd.methods.projectors import CrossAttentionProjector
from scalekd.methods.scalekd_forms import scalekd
from scalekd.models.stages import Features, StageView

CHEAPER: dict[str, dict[str, Any]] = {  # changes to the published form
    "tokens=separable": {"tokens": "separable"},
    "tokens=pointwise": {"tokens": "pointwise"},
    "tokens=reduced": {"tokens": "reduced"},
    "shared": {"shared": True},
    "shared, expansion=1": {"shared": True, "expansion": 1},
    "tokens=grouped, shared, expansion=1": {"tokens": "grouped", "shared": True, "expansion": 1},
    "tokens=reduced, shared": {"tokens": "reduced", "shared": True},
    "tokens=reduced, shared, expansion=1": {"tokens": "reduced", "shared": True, "expansion": 1},
}
OPTIONS = {"published form": PUBLISHED} | {name: PUBLISHED | options for name, options in CHEAPER.items()}


def branch(cap: CrossAttentionProjector, x: Tensor) -> Callable[[], None]:
    return lambda: cap.conv(x).sum().backward()


def norm_and_tokens(cap: CrossAttentionProjector, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        tokens = F.relu(cap.norm(x)) + cap.position
        tokens.flatten(2).transpose(1, 2).contiguous().sum().backward()

    return run


def keys_and_values(cap: CrossAttentionProjector, tokens: Tensor) -> Callable[[], None]:
    return lambda: (cap.k(tokens).sum() + cap.v(tokens).sum()).backward()


def queries(cap: CrossAttentionProjector, given: Tensor) -> Callable[[], None]:
    return lambda: cap.q(F.relu(cap.query_embed(given))).sum().backward()


def attention(cap: CrossAttentionProjector, q: Tensor, kv: Tensor) -> Callable[[], None]:
    def run() -> None:
        asked = cap._split(q).expand(len(kv), -1, -1, -1)
        key = cap._split(kv)
        F.scaled_dot_product_attention(asked, key, key, scale=cap.scale).sum().backward()

    return run


def after_attention(cap: CrossAttentionProjector, y: Tensor) -> Callable[[], None]:
    def run() -> None:
        n = cap.out_norm(cap.out(y))
        (n + cap.ffn(n)).sum().backward()

    return run


def parts_of(method: nn.Module, resume: Callable[[int, Tensor], Tensor], batch: int) -> dict[str, list[Callable]]:
    """Part -> the function to time, on its own leaf tensors."""
    found: dict[str, list[Callable[[], None]]] = {}
    caps = [*method.student_caps.values(), *method.proxy_caps.values()]
    device = next(method.parameters()).device

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, requires_grad=True)

    for cap in caps:
        ds, h, w = cap.student
        dt, grid = cap.q.in_features, cap.grid[0] * cap.grid[1]
        given = cap.queries[None] if cap.queries is not None else leaf(batch, grid, dt)
        width = cap.position.shape[1]
        for part, run in {
            "student branch: convolution": branch(cap, leaf(batch, ds, h, w)),
            "student branch: norm, ReLU, position": norm_and_tokens(cap, leaf(batch, width, h, w)),
            "keys and values": keys_and_values(cap, leaf(batch, h * w, width)),
            "queries": queries(cap, given),
            "attention": attention(cap, leaf(len(given), grid, dt), leaf(batch, h * w, dt)),
            "output, norm, feed-forward": after_attention(cap, leaf(batch, grid, dt)),
        }.items():
            found.setdefault(part, []).append(run)
    proxy, last = next(iter(method.proxy_caps.values())), next(iter(method.student_caps.values()))
    x = leaf(2 * batch, proxy.q.in_features, *proxy.grid)
    found["teacher's last stage"] = [lambda: resume(3, x).sum().backward()]
    made = [leaf(batch, last.q.in_features, *last.grid) for _ in range(4)]
    target = leaf(batch, last.q.in_features, *last.grid).detach()
    found["losses"] = [lambda: ours(made, target).backward()]
    found["losses, literal DCT"] = [lambda: as_in_the_paper(made, target).backward()]
    return found


def floor_of(pair: Pair, student: nn.Module, teacher: nn.Module, device: torch.device) -> dict[str, list[Callable]]:
    """The cost of any distillation: part -> the function to time."""
    pixels = torch.rand(pair.batch, 3, pair.size, pair.size, device=device)
    targets = torch.randint(student.num_classes, (pair.batch,), device=device)
    student.train()
    return {
        "teacher: forward": [lambda: torch.no_grad()(teacher)(pixels)],
        "student: forward, backward": [lambda: F.cross_entropy(student(pixels), targets).backward()],
        "optimiser: student": [optimizer_step(student, pair.optimizer)],
    }


def optimizer_step(module: nn.Module, name: str) -> Callable[[], object]:
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return make_optimizer(module.parameters(), name).step


def measure(pair: Pair, device: torch.device, rounds: int) -> dict[str, Any]:
    student = timm.create_model(pair.student, **pair.student_kwargs).to(device)
    teacher = timm.create_model(pair.teacher, **pair.teacher_kwargs).to(device).eval().requires_grad_(False)
    size = (pair.size, pair.size)
    views = [StageView(m, name=n, image_size=size) for m, n in ((student, pair.student), (teacher, pair.teacher))]
    shapes = [view.shapes for view in views]
    with torch.no_grad():
        seen = views[1](torch.rand(pair.batch, 3, *size, device=device), resumable=True)
    assert seen.resume is not None
    final, stage_3 = shapes[0].final, shapes[0].maps[2]
    assert final is not None

    def method_step(method: nn.Module) -> Callable[[], None]:
        method.to(device).train()
        maps = [torch.randn(pair.batch, *shape, device=device, requires_grad=True) for shape in (stage_3, final)]
        given = Features(logits=seen.logits, maps=(maps[0],) * 3, final=maps[1])
        return lambda: torch.stack(list(method(given, seen, None).values())).sum().backward()

    methods = {name: scalekd(*shapes, heads=pair.heads, **options) for name, options in OPTIONS.items()}
    steps = {name: method_step(method) for name, method in methods.items()}
    steps["literal"] = method_step(LiteralScaleKD(*shapes, heads=pair.heads))
    gmacs = {}
    for name, step in steps.items():  # these calls are also the warm-up
        with flop_counter() as counter:
            step()
        gmacs[name] = counter.get_total_flops() / 2e9 / pair.batch
    published = methods["published form"]
    floor = floor_of(pair, student, teacher, device)
    parts = parts_of(published, seen.resume, pair.batch)
    parts["optimiser: projectors"] = [optimizer_step(published, pair.optimizer)]
    alone = {name: lambda runs=runs: [run() for run in runs] for name, runs in (floor | parts).items()}
    seconds = {name: quartiles(values) for name, values in in_turns(alone, device, rounds).items()}
    whole = in_turns(steps, device, rounds, warm=0)
    return {
        "floor": {name: seconds[name] for name in floor},
        "parts": {name: seconds[name] for name in parts},
        "forms": {name: quartiles(values) for name, values in whole.items()},
        "gmacs": gmacs,
        "parameters": {name: sum(p.numel() for p in method.parameters()) for name, method in methods.items()},
    }


def lines_of(found: dict[str, Any], name: str) -> list[str]:
    published = found["forms"]["published form"][1]
    floor = sum(v[1] for v in found["floor"].values())
    alone = found["floor"] | found["parts"]
    parts = [[part, median_text([1000 * s for s in v], 0), f"{v[1] / floor:.0%}"] for part, v in alone.items()]
    forms = []
    for form, v in found["forms"].items():
        count = found["parameters"].get(form)
        size = f"{count / 1e6:.1f}" if count else ""
        forms.append(
            [
                form,
                median_text([1000 * s for s in v], 0),
                f"{v[1] / published:.2f}",
                f"{found['gmacs'][form]:.3g}",
                size,
            ]
        )
    return [
        f"{name}, batch {found['batch']}, float32: the floor's three parts, then those of ScaleKD's published form",
        "",
        *table(["part", "ms", "of the floor"], parts),
        "",
        "Without the floor:",
        "",
        *table(["form", "ms", "of the published form", "GMACs an image", "parameters M"], forms),
        "",
        f"{found['machine']}; {found['rounds']} rounds; medians (quartiles). Parts run alone need not add up to the whole.",
    ]


def main() -> None:
    args_parser = parser(__doc__, rounds=5)
    args_parser.add_argument("pair", choices=PAIRS)
    args = args_parser.parse_args()
    device, pair = prepare(args), PAIRS[args.pair]
    found = about(device) | {"batch": pair.batch, "rounds": args.rounds} | measure(pair, device, args.rounds)
    write(args.out, f"parts-{args.pair}", found, lines_of(found, args.pair))


if __name__ == "__main__":
    main()
