"""Measures the peak memory of tensors, storage by storage; works with fake tensors too."""

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
    """Follows the tensors that are created while it is active: `now` bytes are alive, `most` is the peak.

    A storage counts from the operation that creates it to its last reference. Workspace inside an operation is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        """known: tensors whose storages are not counted."""
        super().__init__()
        self.now = self.most = 0
        self._known = [t.untyped_storage() for t in known]  # kept alive, so that no address is used again
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
    """Bytes in addition to weights and gradients: between forward and backward pass, and at the peak of the step.

    The gradients exist before the step and stay, as in DDP's buckets. The teacher's outputs count. Works with fake
    tensors too. half: under bf16 autocast.
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
