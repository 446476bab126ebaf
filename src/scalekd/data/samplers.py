"""Chooses the images of every batch, as a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from scalekd.common.seeds import seed_from

Key = tuple[int, int]  # (epoch, index); the epoch counts earlier passes over the set of images


class Mix(NamedTuple):
    """How to mix labelled and unlabelled images in one batch."""

    labelled: int  # number of labelled images in the data; they come first
    per_batch: int  # labelled images in a global batch


class TrainSampler(Sampler):
    """Yields the keys of every micro-batch from `start_step` to `total_steps`.

    A global batch is a slice of the epoch's permutation; micro-batch a of rank r is its (a * world + r)-th part.
    So the global batches do not depend on the number of processes, and a run can resume in the middle of an epoch.
    The last, incomplete batch of an epoch is dropped.

    With `mix`, every micro-batch has its share of labelled images, followed by its share of unlabelled ones. Both sets
    are repeated without end, each time in a new order, and no image is dropped.

    With `repeats`, an epoch has the same number of samples, but only of the first size / repeats images of the
    permutation, each augmented `repeats` times in different ways. The versions of an image are in one global batch,
    as far apart as possible.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        total_steps: int,
        start_step: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
        mix: Mix | None = None,
    ):
        self.size, self.batch_size, self.seed, self.repeats, self.mix = size, batch_size, seed, repeats, mix
        self.total_steps, self.start_step = total_steps, start_step
        self.accumulate, self.rank, self.world = accumulate, rank, world
        # for each part of the data: the number of its current pass, and the order of the images in it
        self.orders: dict[str, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start_step, self.total_steps):
            yield from self.keys_of(step)

    def keys_of(self, step: int) -> list[list[Key]]:
        """The keys of this rank's micro-batches in one step; steps count from 0."""
        if self.mix is None:
            return self._shares(self._epoch_slice(*divmod(step, self.size // self.batch_size)))
        labelled, count = self.mix
        others, rest = self.size - labelled, self.batch_size - count
        first = self._shares(self._stream("labelled", labelled, step * count, count))
        second = self._shares(self._stream("unlabelled", others, step * rest, rest))
        return [a + [(epoch, labelled + i) for epoch, i in b] for a, b in zip(first, second)]

    def _shares(self, batch: list[Key]) -> list[list[Key]]:
        """Splits a global batch: this rank's part of it, for each micro-batch."""
        part = len(batch) // (self.accumulate * self.world)
        firsts = [(a * self.world + self.rank) * part for a in range(self.accumulate)]
        return [batch[first : first + part] for first in firsts]

    def _epoch_slice(self, epoch: int, k: int) -> list[Key]:
        """The k-th global batch of an epoch."""
        order = self._order("", epoch, self.size)
        positions = [divmod(n, self.repeats) for n in range(k * self.batch_size, (k + 1) * self.batch_size)]
        # each version of an image gets its own epoch number, which seeds its augmentation
        batch = [(epoch * self.repeats + version, order[i]) for i, version in positions]
        return [key for start in range(self.repeats) for key in batch[start :: self.repeats]]

    def _stream(self, part: str, size: int, start: int, count: int) -> list[Key]:
        """`count` keys from position `start` of an endless sequence of passes over `size` images."""
        positions = [divmod(n, size) for n in range(start, start + count)]
        return [(epoch, self._order(part, epoch, size)[i]) for epoch, i in positions]

    def _order(self, part: str, epoch: int, size: int) -> list[int]:
        """The permutation of one pass over a part of the data; the last one of each part is cached."""
        if self.orders.get(part, (-1,))[0] != epoch:
            seed = seed_from(self.seed, part, epoch) if part else seed_from(self.seed, epoch)
            generator = torch.Generator().manual_seed(seed)
            self.orders[part] = epoch, torch.randperm(size, generator=generator).tolist()
        return self.orders[part][1]


class EvalSampler(Sampler):
    """Yields the keys of all images once, in order; rank r gets every world-th batch."""

    def __init__(self, size: int, batch_size: int, rank: int, world: int):
        self.starts = range(rank * batch_size, size, world * batch_size)
        self.size, self.batch_size = size, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in self.starts:
            yield [(0, i) for i in range(first, min(first + self.batch_size, self.size))]
