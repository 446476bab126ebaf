"""Charges the arithmetic and the saved tensors of a training step to its parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalekd.distill.distiller import Distiller
from scalekd.models.inputs import resized
from scalekd.models.stages import Features

from .flops import flop_counter

Crossing = tuple[Tensor, Tensor, Tensor, Tensor]  # (map, leaf given to the teacher, its result, leaf given on)


class Ledger:
    """Charges arithmetic, and the tensors that autograd saves for the backward pass, to the current part.

    macs: part -> [forward, backward] in multiply-accumulates, which are half of what torch's FLOP counter reports, as in
    `scalekd pairs`. saved: part -> bytes; a storage counts once, for the part that saved it first.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        """known: parameters and buffers, which are in memory anyway and cost nothing when saved."""
        self.macs: dict[str, list[float]] = {}
        self.saved: dict[str, int] = {}
        self._at, self._read = ("", 0), 0
        self._flops = flop_counter()
        # by address; holding the storages keeps their addresses from being used again
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
        """Charges everything from here on to `part`."""
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
    return tensor.untyped_storage()._cdata  # not data_ptr: fake tensors have no data


def charge_step(distiller: Distiller, pixels: Tensor, targets: Tensor, ledger: Ledger, half: bool) -> None:
    """Runs the forward and backward pass of `Distiller.forward`, and charges each part of it to `ledger`.

    The graph is cut where one part passes its output to another, so that the backward pass can run part by part: at the
    student's features for each method, and before and after the teacher's stages that a method runs. Those stages are
    charged as `NAME: through the teacher`. half: under bf16 autocast.
    """
    with ledger.open():
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
            ledger.on("teacher")
            teacher = distiller.teacher_features(pixels)
            ledger.on("student")
            student = distiller.student_features(resized(pixels, distiller.image_size, distiller.student))
            cuts: list[tuple[Tensor, Tensor]] = []  # (tensor of the student's graph, leaf that a method reads)
            losses: list[tuple[str, Tensor, list[Crossing]]] = []
            for name, method in distiller.methods.items():
                crossings: list[Crossing] = []
                ledger.on(name)
                terms = method(_cut(student, cuts), _watched(teacher, name, crossings, ledger), targets)
                losses.append((name, distiller.weights[name] * torch.stack(list(terms.values())).sum(), crossings))
        for name, loss, crossings in losses:
            ledger.on(name, backward=True)
            loss.backward()
            for before, teacher_input, teacher_output, after in reversed(crossings):
                ledger.on(_through(name), backward=True)
                teacher_output.backward(after.grad)
                ledger.on(name, backward=True)
                before.backward(teacher_input.grad)
        ledger.on("student", backward=True)
        reached = [(tensor, leaf.grad) for tensor, leaf in cuts if leaf.grad is not None]
        torch.autograd.backward([tensor for tensor, _ in reached], [gradient for _, gradient in reached])


def _cut(features: Features, cuts: list[tuple[Tensor, Tensor]]) -> Features:
    """The student's features as leaves; adds (tensor, leaf) to `cuts` for each."""

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
        pooled=leaf(features.pooled),
        embedding=leaf(features.embedding),
        distilled=leaf(features.distilled),
    )


def _watched(teacher: Features | None, name: str, crossings: list[Crossing], ledger: Ledger) -> Features | None:
    """The teacher's features with a `resume` that is charged separately and cut on both sides."""
    if teacher is None or teacher.resume is None:
        return teacher
    run_on = teacher.resume

    def resume(k: int, x: Tensor, end: bool = True) -> Tensor:
        if ledger.in_backward:  # recomputed by a method with grad_checkpointing; the graph is cut already
            return run_on(k, x, end=end)
        ledger.on(_through(name))
        teacher_input = x.detach().requires_grad_()
        teacher_output = run_on(k, teacher_input, end=end)
        after = teacher_output.detach().requires_grad_()
        crossings.append((x, teacher_input, teacher_output, after))
        ledger.on(name)
        return after

    return replace(teacher, resume=resume)


def _through(name: str) -> str:
    return f"{name}: through the teacher"
