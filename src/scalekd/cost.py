"""What a recipe's training step costs, by part and beside plain feature distillation: `scalekd cost`, docs/cost.md.

The counts come from the real models, and nothing is computed: parameters are made on PyTorch's meta device, then
stand-ins on the CPU take their place (fake tensors: a shape, a dtype and a device, no values). So autograd, autocast
and the choice of attention kernel go as in a real step. No weights are read and no images are opened.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils.flop_counter import FlopCounterMode

from .compiled import compile_step
from .config import Config, height_and_width, reads_logits
from .distiller import Distiller, resized
from .engine import AUTOCAST
from .errors import UserError, first_line
from .files import make_folder, write_text
from .models import create
from .models import statistics as input_statistics
from .optim import make_optimizer
from .peak import held_in_a_step
from .provenance import machine
from .shortages import shortages_told
from .stages import Features

BATCH = 32  # images counted: 256 on 8 GPUs, as in the paper's Table 15
ROUNDS = 5  # of `--measure`, after one that does not count
NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
AGAIN = "held again, at most"  # the part for what checkpointed methods compute once more
Crossing = tuple[Tensor, Tensor, Tensor, Tensor]  # a map before the teacher, what went in, what came out, what went on


def cost(config: Config, *, classes: int = 1000, batch: int | None = None) -> dict[str, Any]:
    """Plain data: the recipe's step, the same pair's step with `fd`, and their ratios.

    batch: images of a step on one device; 32, or the recipe's if that is smaller. Raises `UserError`.
    """
    batch = batch or min(BATCH, config.train.batch_size // config.train.accumulate)
    if batch < 2:
        raise UserError(f"a batch of {batch}: batch normalisation needs two images or more; --batch 2")
    if classes < 1:
        raise UserError(f"--classes {classes}: one or more")
    if config.assistant is not None:
        raise UserError("the cost is counted for one run, and an assistant's recipe is two; `scalekd plan` takes it")
    with torch.device("meta"):
        distiller = untrained(config, classes, config.losses)
        fd, why_not = _plain_distillation(config, classes)
    projectors = _projectors(distiller)
    step = count_step(distiller, config, classes, batch)
    plain = count_step(fd, config, classes, batch) if fd is not None else None
    ratio = None
    if plain is not None:
        ratio = {key: step["total"][key] / plain["total"][key] for key in ("gmacs", "saved_mb")}
        ratio["memory_mb"] = step["memory_mb"] / plain["memory_mb"]
    return {
        "name": config.name,
        "teacher": config.teacher.model if config.teacher else None,
        "student": config.student.model,
        "image_size": list(distiller.image_size),
        "classes": classes,
        "losses": config.losses,
        "precision": config.train.precision,
        "optimizer": config.optim.name,
        "batch": batch,
        "projectors": projectors,
        "step": step,
        "fd": plain,
        "no_fd": why_not,
        "ratio": ratio,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }


# ---------------------------------------------------------------- the models


def untrained(config: Config, classes: int, losses: Mapping[str, dict[str, Any]], teacher: bool = True) -> Distiller:
    """What the recipe trains, with initial values in place of any weights. Raises `UserError`.

    teacher: False leaves it out, for losses that need none.
    """
    if config.teachers:
        raise UserError(f"the cost is counted for one teacher, and the recipe has {', '.join(config.teachers)}")
    size, channels, spec = height_and_width(config.data.image_size), config.data.channels, config.teacher
    given: dict[str, Any] = {"in_chans": channels}
    of_data = given | {"num_classes": classes}
    of_student = given | {"num_classes": classes if any(map(reads_logits, losses)) else 0}
    student, _ = create(config.student.model, size, False, of_student | config.student.kwargs, "student")
    student_stats = input_statistics(student, config.student, channels, "student")
    if spec is None or not teacher:
        return Distiller(
            student, None, losses, image_size=size, student_stats=student_stats, student_cuts=config.student.cuts
        )
    if spec.weights != "pretrained" or spec.head:  # else it keeps the head that it came with, as in training
        given = of_data
    teacher_size = height_and_width(spec.image_size or size)
    model, _ = create(spec.model, teacher_size, False, given | spec.kwargs, "teacher")
    return Distiller(
        student,
        model,
        losses,
        image_size=size,
        teacher_size=teacher_size,
        student_stats=student_stats,
        teacher_stats=input_statistics(model, spec, channels, "teacher"),
        student_cuts=config.student.cuts,
        teacher_cuts=spec.cuts,
    )


def _plain_distillation(config: Config, classes: int) -> tuple[Distiller | None, str | None]:
    """The paper's FD: the recipe's task loss, and stage 4 through one linear layer. None, and why, where it cannot be."""
    if config.teacher is None:
        return None, "the recipe has no teacher"
    task = {name: options for name, options in config.losses.items() if name in ("ce", "bce")} or {"ce": {}}
    try:
        return untrained(config, classes, task | {"fd": {}}), None
    except UserError as error:
        return None, first_line(error)


def _projectors(distiller: Distiller) -> dict[str, dict[str, int]]:
    """Method -> {projector or other part: parameters}, of those methods that have parameters of their own."""
    found: dict[str, dict[str, int]] = {}
    for name, method in distiller.methods.items():
        parts: dict[str, int] = {}
        for key, parameter in method.named_parameters():
            first, *rest = key.split(".")
            held = getattr(method, first)
            if isinstance(held, (nn.ModuleDict, nn.ModuleList)):
                first = f"{first}.{rest[0]}"
            parts[first] = parts.get(first, 0) + parameter.numel()
        if parts:
            found[name] = parts
    return found


# ---------------------------------------------------------------- counting


class Ledger:
    """Charges what is computed, and what autograd keeps for the backward pass, to the part that is on.

    macs: part -> [forward, backward] in multiply-accumulates: half of what torch's FLOP counter finds, as in
    `scalekd pairs`. saved: part -> bytes; a storage counts once, for the part that saved it first.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        """known: parameters and buffers, which are held anyway and cost nothing when saved."""
        self.macs: dict[str, list[float]] = {}
        self.saved: dict[str, int] = {}
        self._at, self._read = ("", 0), 0
        self._flops = FlopCounterMode(display=False)
        # by address, and held: the address of a storage that is gone may be another's
        self._held = {_address(t): t.untyped_storage() for t in known}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        with self._flops, torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
            self.on("")

    @property
    def in_backward(self) -> bool:
        return self._at[1] == 1

    def on(self, part: str, backward: bool = False) -> None:
        """What comes from here on is this part's."""
        now = self._flops.get_total_flops()
        if self._at[0]:
            self.macs.setdefault(self._at[0], [0, 0])[self._at[1]] += (now - self._read) / 2
        self._at, self._read = (part, int(backward)), now

    def _keep(self, tensor: Tensor) -> Tensor:
        if _address(tensor) not in self._held:
            self._held[_address(tensor)] = tensor.untyped_storage()
            self.saved[self._at[0]] = self.saved.get(self._at[0], 0) + tensor.untyped_storage().nbytes()
        return tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # not data_ptr: stand-ins have no data


def count_step(distiller: Distiller, config: Config, classes: int, batch: int) -> dict[str, Any]:
    """One step's parts, their total, and the memory of a device, without computing. Raises `UserError`.

    GMACs and `saved_mb` are those of one image; `fixed_mb` and `memory_mb` those of a device. MB are 10^6 bytes.
    """
    teacher = distiller.teacher_view.model if distiller.teacher_view else None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            distiller._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
            known = distiller.held()
            ledger = Ledger(known)
            pixels, targets = stand_ins(distiller, config, classes, batch)
            half = config.train.precision != "float32"
            charge_step(distiller.train(), pixels, targets, ledger, half)
            again = _held_again(distiller, pixels, targets, half)
            fixed = fixed_bytes(distiller, config)
    except NEEDS_VALUES as error:
        raise UserError(
            f"this recipe's step cannot be counted, as it goes by the values of its tensors: {first_line(error)}\n"
            "--measure times real steps instead."
        ) from None
    modules = {"student": distiller.student, **distiller.methods, **({"teacher": teacher} if teacher else {})}
    parts = {
        part: {
            "params": _size(modules[part].parameters()) if part in modules else 0,
            "forward": forward / batch / 1e9,
            "backward": backward / batch / 1e9,
            "saved_mb": ledger.saved.get(part, 0) / batch / 1e6,
        }
        for part, (forward, backward) in ledger.macs.items()
        if part != "teacher" or teacher is not None
    }
    if again is not None:
        parts[AGAIN] = {"params": 0, "forward": 0.0, "backward": 0.0, "saved_mb": again / batch / 1e6}
    total = {key: sum(part[key] for part in parts.values()) for key in ("params", "forward", "backward", "saved_mb")}
    total["gmacs"] = total["forward"] + total["backward"]
    fixed_mb = {key: None if value is None else value / 1e6 for key, value in fixed.items()}
    memory = sum(value or 0 for value in fixed_mb.values()) + batch * total["saved_mb"]
    return {"parts": parts, "total": total, "fixed_mb": fixed_mb, "memory_mb": memory}


def stand_ins(distiller: Distiller, config: Config, classes: int, batch: int) -> tuple[Tensor, Tensor]:
    """A batch of the recipe's shapes, pixels and targets, for what reads no values."""
    pixels = torch.empty(batch, config.data.channels, *map(max, distiller.image_size, distiller.teacher_size))
    mixed = config.augment.mixup or config.augment.cutmix
    return pixels, torch.empty(batch, classes) if mixed else torch.empty(batch, dtype=torch.int64)


def _held_again(distiller: Distiller, pixels: Tensor, targets: Tensor, half: bool) -> int | None:
    """Bytes of the backward pass beyond those kept for it, where a method checkpoints; None where none does."""
    if not any(getattr(method, "grad_checkpointing", False) for method in distiller.methods.values()):
        return None
    between, most = held_in_a_step(distiller, pixels, targets, half)
    return most - between


def charge_step(distiller: Distiller, pixels: Tensor, targets: Tensor, ledger: Ledger, half: bool) -> None:
    """A forward and a backward pass as `Distiller.forward` has them, each part on its own account.

    The graph is cut where one part hands over to another, so that the backward pass too can be taken part by part:
    at what the student gives each method, and before and after the teacher's stages that a method runs. Those are
    charged as `NAME: through the teacher`.
    """
    with ledger.open():
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
            ledger.on("teacher")
            teacher = distiller.teacher_features(pixels)
            ledger.on("student")
            seen = resized(pixels, distiller.image_size, distiller.student)
            seen = (seen - distiller.student_mean) / distiller.student_std
            student = distiller.student_view(seen, maps=distiller.needs_maps)
            cuts: list[tuple[Tensor, Tensor]] = []  # in the student's graph, and the leaf that a method was given
            losses: list[tuple[str, Tensor, list[Crossing]]] = []
            for name, method in distiller.methods.items():
                crossings: list[Crossing] = []
                ledger.on(name)
                terms = method(_cut(student, cuts), _watched(teacher, name, crossings, ledger), targets)
                losses.append((name, distiller.weights[name] * torch.stack(list(terms.values())).sum(), crossings))
        for name, loss, crossings in losses:
            ledger.on(name, backward=True)
            loss.backward()
            for before, given, result, handed in reversed(crossings):
                ledger.on(_through(name), backward=True)
                result.backward(handed.grad)
                ledger.on(name, backward=True)
                before.backward(given.grad)
        ledger.on("student", backward=True)
        reached = [(tensor, leaf.grad) for tensor, leaf in cuts if leaf.grad is not None]
        torch.autograd.backward([tensor for tensor, _ in reached], [gradient for _, gradient in reached])


def _cut(features: Features, cuts: list[tuple[Tensor, Tensor]]) -> Features:
    """The student's features as leaves, which are noted in `cuts` beside what they stand for."""

    def leaf(tensor: Any) -> Any:
        if tensor is None or not tensor.requires_grad:
            return tensor
        cuts.append((tensor, tensor.detach().requires_grad_()))
        return cuts[-1][1]

    return replace(
        features,
        logits=leaf(features.logits),
        maps=tuple(map(leaf, features.maps)),
        final=leaf(features.final),
        prefix=tuple(map(leaf, features.prefix)),
    )


def _watched(teacher: Features | None, name: str, crossings: list[Crossing], ledger: Ledger) -> Features | None:
    """The teacher's features with a `resume` that is charged on its own, and cut on both sides."""
    if teacher is None or teacher.resume is None:
        return teacher
    run_on = teacher.resume

    def resume(k: int, x: Tensor) -> Tensor:
        if ledger.in_backward:  # computed once more by a checkpointed method; the graph was cut the first time
            return run_on(k, x)
        ledger.on(_through(name))
        given = x.detach().requires_grad_()
        result = run_on(k, given)
        handed = result.detach().requires_grad_()
        crossings.append((x, given, result, handed))
        ledger.on(name)
        return handed

    return replace(teacher, resume=resume)


def _through(name: str) -> str:
    return f"{name}: through the teacher"


def fixed_bytes(distiller: Distiller, config: Config) -> dict[str, int | None]:
    """What a device holds all the time: weights and buffers, gradients, the optimiser's state (None where it cannot be
    counted), and averaged weights where the recipe has them."""
    return {
        "weights": _bytes(distiller.held()),
        "gradients": _bytes(p for p in distiller.parameters() if p.requires_grad),
        "optimizer": _optimizer_bytes(make_optimizer(config, distiller)),
        "average": _bytes(distiller.student.state_dict().values()) if config.train.ema else 0,
    }


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """What it holds after a step, per device; None for one that decides by the gradients' values."""
    try:
        optimizer.step()
    except NEEDS_VALUES:
        return None
    return _bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---------------------------------------------------------------- measuring


def measure(config: Config, device: torch.device, *, classes: int = 1000, batch: int = 4) -> dict[str, Any]:
    """Real steps on random pixels, in turns: the recipe, `fd`, the student alone, the teacher's forward pass alone.

    Seconds a step, `[median, least, most]` of ROUNDS, and the recipe's seconds over those of the others, taken round by
    round. With initial weights and a learning rate of 0. Raises `UserError`, also when the memory does not suffice.
    """
    if batch < 2:
        raise UserError(f"a batch of {batch}: batch normalisation needs two images or more; --batch 2")
    with shortages_told(device, f"Try a smaller --batch (now {batch})."):
        distillers: dict[str, Distiller | None] = {"recipe": untrained(config, classes, config.losses)}
        distillers["fd"] = _plain_distillation(config, classes)[0]
        distillers["student alone"] = untrained(config, classes, {"ce": {}}, teacher=False)
        steps = {name: _real_step(d, config, device, classes, batch) for name, d in distillers.items() if d is not None}
        first = distillers["recipe"]
        if first is not None and first.teacher_view is not None:
            pixels = torch.rand(batch, config.data.channels, *first.teacher_size, device=device)
            steps["teacher forward"] = lambda: _in_precision(config, device, lambda: first.teacher_features(pixels))
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(1 + ROUNDS):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[name].append(time.perf_counter() - began)
    counted = {name: values[1:] for name, values in seconds.items()}
    ratios = {
        name: _spread([a / b for a, b in zip(counted["recipe"], values, strict=True)])
        for name, values in counted.items()
        if name != "recipe"
    }
    seconds_told = {name: _spread(values) for name, values in counted.items()}
    return {"machine": machine(device), "batch": batch, "rounds": ROUNDS, "seconds": seconds_told, "ratio": ratios}


def _real_step(
    distiller: Distiller, config: Config, device: torch.device, classes: int, batch: int
) -> Callable[[], None]:
    distiller.to(device).train()
    if config.train.channels_last:
        distiller.to(memory_format=torch.channels_last)
    if config.train.compile:
        compile_step(distiller, batch)
    optimizer = make_optimizer(config, distiller)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that no weight runs off, whatever the recipe's rate
    pixels = torch.rand(
        batch, config.data.channels, *map(max, distiller.image_size, distiller.teacher_size), device=device
    )
    targets = torch.randint(classes, (batch,), device=device)

    def step() -> None:
        losses = _in_precision(config, device, lambda: distiller(pixels, targets))
        losses["total"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _in_precision(config: Config, device: torch.device, function: Callable[[], Any]) -> Any:
    dtype = AUTOCAST[config.train.precision]
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return function()


def _spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


# ---------------------------------------------------------------- as text

COLUMNS = ["part", "params M", "GMACs forward", "GMACs backward", "saved MB"]


def cost_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [[name, *_cells(part)] for name, part in found["step"]["parts"].items()]
    rows.append(["whole step", *_cells(found["step"]["total"])])
    if found["fd"]:
        rows.append(["the same pair with fd", *_cells(found["fd"]["total"])])
    return rows


def _cells(part: dict[str, float]) -> list[str]:
    return [f"{part['params'] / 1e6:.2f}", *(f"{part[key]:.2f}" for key in ("forward", "backward", "saved_mb"))]


def cost_lines(found: dict[str, Any]) -> list[str]:
    """What is told beside the table."""
    step, ratio = found["step"], found["ratio"]
    total, fixed = step["total"], step["fixed_mb"]
    told = [f"A step takes {total['gmacs']:.2f} GMACs and keeps {total['saved_mb']:.1f} MB for each image."]
    if ratio:
        times = f"{ratio['gmacs']:.2f} times the GMACs, {ratio['saved_mb']:.2f} times the saved activations"
        told.append(f"Beside fd on stage 4 through a linear layer: {times}, {ratio['memory_mb']:.2f} times the memory.")
    else:
        told.append(f"No ratio to fd: {found['no_fd']}.")
    held = ", ".join(f"{name} {'not counted' if mb is None else f'{mb:.0f}'}" for name, mb in fixed.items() if mb != 0)
    told.append(f"Memory at {found['batch']} images a device: {step['memory_mb']:.0f} MB; of these {held} MB.")
    for method, parts in found["projectors"].items():
        sizes = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in parts.items())
        told.append(f"{method} trains beside the student: {sizes}.")
    if measured := found.get("measured"):
        told.append(
            f"Measured on {measured['machine']}, {measured['batch']} images a step, {measured['rounds']} rounds:"
        )
        for name, (middle, least, most) in measured["ratio"].items():
            told.append(f"the recipe's step takes {middle:.2f} times as long as {name} ({least:.2f} to {most:.2f})")
    return told


def _title(found: dict[str, Any]) -> str:
    size = "x".join(map(str, found["image_size"]))
    pair = f"{found['teacher']} -> {found['student']}" if found["teacher"] else found["student"]
    return f"{found['name']}: {pair}, {size}, {found['precision']}, {', '.join(found['losses'])}"


def show(found: dict[str, Any], console: Console) -> None:
    console.print(_title(found), "", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in cost_rows(found):
        table.add_row(*row)
    console.print(table, "", *cost_lines(found), sep="\n", markup=False, highlight=False, soft_wrap=True)


def write(found: dict[str, Any], folder: Path) -> None:
    """NAME.json and NAME.md in `folder`. Raises `UserError` when they cannot be written."""
    lines = [f"# {_title(found)}", "", f"| {' | '.join(COLUMNS)} |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in cost_rows(found)]
    lines += ["", *(f"- {line}" for line in cost_lines(found)), "", "Made by `scalekd cost` (docs/cost.md)."]
    make_folder(folder)
    write_text(folder / f"{found['name']}.json", json.dumps(found, indent=2) + "\n")
    write_text(folder / f"{found['name']}.md", "\n".join(lines) + "\n")
