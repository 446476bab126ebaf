"""What a recipe's training step costs, by part and beside plain feature distillation: `scalekd cost`, docs/how-to/cost.md.

The counts come from the real models, and nothing is computed: parameters are made on PyTorch's meta device, then
stand-ins on the CPU take their place (fake tensors: a shape, a dtype and a device, no values). So autograd, autocast
and the choice of attention kernel go as in a real step. No weights are read and no images are opened.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from scalekd.common.errors import UserError, first_line
from scalekd.config.recipe import Config
from scalekd.distill.build import make_optimizer, untrained
from scalekd.distill.distiller import Distiller

from .ledger import Ledger, charge_step
from .peak import held_in_a_step

BATCH = 32  # images counted: 256 on 8 GPUs, as in the paper's Table 15
NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
AGAIN = "held again, at most"  # the part for what checkpointed methods compute once more


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
        fd, why_not = plain_distillation(config, classes)
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


def plain_distillation(config: Config, classes: int) -> tuple[Distiller | None, str | None]:
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
