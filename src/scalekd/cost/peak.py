"""The most memory that is held at once, followed storage by storage; with stand-ins (fake tensors) too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalekd.distill.distiller import Distiller


class LiveBytes(TorchDispatchMode):
    """Follows what is made while it is on: `now` bytes are alive, `most` were at once.

    A storage counts from the operation that makes it to its last reference; what an operation holds inside itself is
    not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        """known: tensors whose storages are not counted."""
        super().__init__()
        self.now = self.most = 0
        self._known = [t.untyped_storage() for t in known]  # held, so that no address is used again
        self._seen = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size


def held_in_a_step(distiller: Distiller, pixels: Tensor, targets: Tensor, half: bool) -> tuple[int, int]:
    """Bytes beyond weights and gradients: those between the forward and the backward pass, and the most in either.

    The gradients are there before the step begins, as DDP has them in its buckets, and stay. half: under bf16 autocast.
    What the teacher gave is counted, and fake tensors are as good as real ones.
    """
    trained = [p for p in distiller.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    with LiveBytes([*distiller.held(), *(p.grad for p in trained if p.grad is not None), pixels, targets]) as live:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
            total = distiller(pixels, targets)["total"]
        between = live.now
        total.backward()
    return between, live.most
