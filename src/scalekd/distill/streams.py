"""`train.streams`: the teachers, and the copying of their images, run on a CUDA stream beside the student's.

A GPU works on the default stream in the order in which the host asks. The teachers do not depend on the student, so on a
stream of their own they run while the student does, and while the previous step is still in its backward pass. Values are
the same: only the order changes in which independent kernels run.

Memory that one stream allocates and the other uses is marked (`record_stream`), so that the allocator does not give it
away too early. docs/how-to/gpu.md says when this helps.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from scalekd.models.stages import Features


class Beside:
    """The default: no other stream. Work runs where it is asked for."""

    def work(self, *given: Tensor) -> contextlib.AbstractContextManager[None]:
        """A context whose work may run at the same time as what is asked for after it.

        given: tensors that the work reads.
        """
        return contextlib.nullcontext()

    def join(self, made: Any) -> None:
        """Makes the work that is asked for from now on wait for the work so far. made: its results, also nested."""


class SideStream(Beside):
    """Work on a CUDA stream of its own. Create it when the models are on the device: its work waits for that."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        self.own: list[weakref.ref[Tensor]] = []  # the results of the work before the last `join`

    @contextlib.contextmanager
    def work(self, *given: Tensor) -> Iterator[None]:
        """The block runs on the stream, after the work on the default stream that made `given`.

        For tensors on the host, and for those that the last `join` got, it waits for nothing.
        """
        for tensor in given:
            if tensor.device.type == self.device.type and not any(own() is tensor for own in self.own):
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
                tensor.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def join(self, made: Any) -> None:
        default = torch.cuda.current_stream(self.device)
        default.wait_stream(self.stream)
        found = list(tensors_in(made))
        for tensor in found:
            tensor.record_stream(default)
        self.own = [weakref.ref(tensor) for tensor in found]


def tensors_in(value: Any) -> Iterable[Tensor]:
    """All tensors in a tensor, in `Features`, or in nested dicts, tuples and lists of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Features):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for inside in value.values():
            yield from tensors_in(inside)
    elif isinstance(value, (tuple, list)):
        for inside in value:
            yield from tensors_in(inside)
