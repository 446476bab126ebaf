"""Counts the arithmetic and memory of a recipe's training step, by part, without computing it: `scalekd cost`.

The models are built on PyTorch's meta device, then fake tensors on the CPU (shape, dtype and device, no values) replace
their parameters. So autograd, autocast and the choice of attention kernel work as in a real step. No weights are read
and no images are opened. docs/how-to/cost.md explains the figures.
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
from scalekd.models.unfilled import unfilled

from .attribution import Ledger, charge_step
from .peak import held_in_a_step

BATCH = 32  # images per device: 256 on 8 GPUs, as in the ScaleKD paper's Table 15
NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
AGAIN = "held again, at most"  # the part for what methods with grad_checkpointing compute a second time


def cost(config: Config, *, classes: int = 1000, batch: int | None = None) -> dict[str, Any]:
    """The cost of the recipe's step, of a step of the same pair with `fd`, and their ratios, as plain data.

    classes: of the data. batch: images of a step on one device; by default 32, or the recipe's if that is smaller.
    Raises `UserError`, also for a recipe with several teachers or an assistant.
    """
    batch = batch or min(BATCH, config.train.batch_size // config.train.accumulate)
    if batch < 2:
        raise UserError(f"`batch` {batch}: must be 2 or more, because of batch normalisation")
    if classes < 1:
        raise UserError(f"`classes` {classes}: must be 1 or more")
    if config.assistant is not None:
        raise UserError(
            "a recipe with an assistant is two runs, and the cost is that of one; use `scalekd plan`, or set assistant=null"
        )
    with unfilled():
        distiller = untrained(config, classes, config.losses)
        fd, reason = plain_distillation(config, classes)
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
        "no_fd": reason,
        "ratio": ratio,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }


def plain_distillation(config: Config, classes: int) -> tuple[Distiller | None, str | None]:
    """FD of the ScaleKD paper: the recipe's task loss, and stage 4 through a linear layer. Or None and the reason."""
    if config.teacher is None:
        return None, "the recipe has no teacher"
    task = {name: options for name, options in config.losses.items() if name in ("ce", "bce", "asl")} or {"ce": {}}
    try:
        return untrained(config, classes, task | {"fd": {}}), None
    except UserError as error:
        return None, first_line(error)


def _projectors(distiller: Distiller) -> dict[str, dict[str, int]]:
    """Method -> {projector or other part: number of parameters}, for methods with parameters."""
    sizes: dict[str, dict[str, int]] = {}
    for name, method in distiller.methods.items():
        parts: dict[str, int] = {}
        for key, parameter in method.named_parameters():
            first, *rest = key.split(".")
            if isinstance(getattr(method, first), (nn.ModuleDict, nn.ModuleList)):
                first = f"{first}.{rest[0]}"
            parts[first] = parts.get(first, 0) + parameter.numel()
        if parts:
            sizes[name] = parts
    return sizes


def count_step(distiller: Distiller, config: Config, classes: int, batch: int) -> dict[str, Any]:
    """The parts of a step, their total, and the memory of a device. `distiller` then holds fake tensors.

    GMACs (`forward`, `backward`, `gmacs`) and `saved_mb` are per image, `fixed_mb` and `memory_mb` per device. MB are
    10^6 bytes. Raises `UserError` if the step depends on the values of its tensors.
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
            again = _held_again(distiller, config, pixels, targets, half)
            fixed = fixed_bytes(distiller, config)
    except NEEDS_VALUES as error:
        raise UserError(
            f"the step cannot be counted, because it depends on the values of its tensors: {first_line(error)}\n"
            "Use `measure`, which times real steps."
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
    """Uninitialised pixels (B, C, H, W) and targets with the shapes of the recipe's batches.

    targets: (B,), or (B, classes) with mixup or CutMix.
    """
    pixels = torch.empty(batch, config.data.channels, *map(max, distiller.image_size, distiller.teacher_size))
    mixed = config.augment.mixup or config.augment.cutmix
    return pixels, torch.empty(batch, classes) if mixed else torch.empty(batch, dtype=torch.int64)


def _held_again(distiller: Distiller, config: Config, pixels: Tensor, targets: Tensor, half: bool) -> int | None:
    """Bytes that the backward pass holds in addition to the saved ones; None if nothing has grad_checkpointing."""
    of_methods = any(getattr(method, "grad_checkpointing", False) for method in distiller.methods.values())
    if not of_methods and not config.train.grad_checkpointing:
        return None
    between, most = held_in_a_step(distiller, pixels, targets, half)
    return most - between


def fixed_bytes(distiller: Distiller, config: Config) -> dict[str, int | None]:
    """Bytes that a device holds all the time: weights and buffers, gradients, optimiser state, averaged weights.

    The optimiser state is None if it depends on the values of the gradients; `average` is 0 without train.ema.
    """
    return {
        "weights": _bytes(distiller.held()),
        "gradients": _bytes(p for p in distiller.parameters() if p.requires_grad),
        "optimizer": _optimizer_bytes(make_optimizer(config, distiller)),
        "average": _bytes(distiller.student.state_dict().values()) if config.train.ema else 0,
    }


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Bytes of its state after a step; None if the step depends on the values of the gradients."""
    try:
        optimizer.step()
    except NEEDS_VALUES:
        return None
    return _bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
