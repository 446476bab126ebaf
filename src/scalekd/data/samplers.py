"""Which images make which batch: a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from scalekd.common.seeds import seed_from

Key = tuple[int, int]  # how often the image's set was gone through before (the epoch), index


class Mix(NamedTuple):
    """Labelled and unlabelled images in one batch."""

    labelled: int  # of all images; they come first
    per_batch: int  # labelled images of a global batch


class TrainSampler(Sampler):
    """The keys of every micro-batch from `start_step` to `total_steps`, epoch after epoch.

    One global batch is a slice of the epoch's permutation; micro-batch a of rank r takes its
    (a * world + r)-th part. So a run sees the same global batches on any number of processes,
    and starts in the middle of an epoch by arithmetic. The rest of an epoch is left out.

    With `mix` every micro-batch has its share of labelled images first and of unlabelled ones after them. Both are
    gone through again and again, each time in a new order; nothing is left out.

    With `repeats` an epoch has as many samples, but of the permutation's first size / repeats images only, each so
    often, augmented anew each time. The versions of an image are in one global batch, and there as far apart as can be.
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
        self.orders: dict[
            str, tuple[int, list[int]]
        ] = {}  # of each part: which time it is gone through, in which order

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start_step, self.total_steps):
            yield from self.keys_of(step)

    def keys_of(self, step: int) -> list[list[Key]]:
        """This rank's micro-batches of one step, counted from 0."""
        if self.mix is None:
            return self._shares(self._slice(*divmod(step, self.size // self.batch_size)))
        labelled, count = self.mix
        others, rest = self.size - labelled, self.batch_size - count
        first = self._shares(self._stream("labelled", labelled, step * count, count))
        second = self._shares(self._stream("unlabelled", others, step * rest, rest))
        return [a + [(time, labelled + i) for time, i in b] for a, b in zip(first, second)]

    def _shares(self, batch: list[Key]) -> list[list[Key]]:
        """This rank's part of a global batch, for each micro-batch."""
        part = len(batch) // (self.accumulate * self.world)
        firsts = [(a * self.world + self.rank) * part for a in range(self.accumulate)]
        return [batch[first : first + part] for first in firsts]

    def _slice(self, epoch: int, k: int) -> list[Key]:
        order = self._order("", epoch, self.size)
        # every version of an image has an epoch of its own to be augmented by
        places = [divmod(place, self.repeats) for place in range(k * self.batch_size, (k + 1) * self.batch_size)]
        batch = [(epoch * self.repeats + version, order[i]) for i, version in places]
        return [key for start in range(self.repeats) for key in batch[start :: self.repeats]]

    def _stream(self, part: str, size: int, start: int, count: int) -> list[Key]:
        """`count` keys of `size` images that are gone through without end, from place `start` on."""
        places = [divmod(place, size) for place in range(start, start + count)]
        return [(time, self._order(part, time, size)[i]) for time, i in places]

    def _order(self, part: str, time: int, size: int) -> list[int]:
        if self.orders.get(part, (-1,))[0] != time:
            seed = seed_from(self.seed, part, time) if part else seed_from(self.seed, time)
            generator = torch.Generator().manual_seed(seed)
            self.orders[part] = time, torch.randperm(size, generator=generator).tolist()
        return self.orders[part][1]


class EvalSampler(Sampler):
    """All images once, in order; rank r takes every world-th batch."""

    def __init__(self, size: int, batch_size: int, rank: int, world: int):
        self.starts = range(rank * batch_size, size, world * batch_size)
        self.size, self.batch_size = size, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in self.starts:
            yield [(0, i) for i in range(first, min(first + self.batch_size, self.size))]
