"""Chooses the images of every batch, as a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
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

    With `weights`, one for each labelled image, the labelled images of a pass are drawn in proportion to them instead of
    once each: an image is drawn as often as its share of the pass says, rounded up or down, each time augmented in
    another way.
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
        weights: Sequence[float] | None = None,
    ):
        self.weights = weights
        self.size, self.batch_size, self.seed, self.repeats, self.mix = size, batch_size, seed, repeats, mix
        self.total_steps, self.start_step = total_steps, start_step
        self.accumulate, self.rank, self.world = accumulate, rank, world
        # for each part of the data: the number of its current pass, and the keys of the images in it
        self.orders: dict[str, tuple[int, list[int], list[int] | None]] = {}

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
        order, draws = self._order("", epoch, self.size)
        positions = [divmod(n, self.repeats) for n in range(k * self.batch_size, (k + 1) * self.batch_size)]
        # each version of an image gets its own epoch number, which seeds its augmentation
        batch = [(self._version(epoch * self.repeats + version, i, draws), order[i]) for i, version in positions]
        return [key for start in range(self.repeats) for key in batch[start :: self.repeats]]

    def _stream(self, part: str, size: int, start: int, count: int) -> list[Key]:
        """`count` keys from position `start` of an endless sequence of passes over `size` images."""
        positions = [divmod(n, size) for n in range(start, start + count)]
        keys = []
        for epoch, i in positions:
            order, draws = self._order(part, epoch, size)
            keys.append((self._version(epoch, i, draws), order[i]))
        return keys

    def _version(self, epoch: int, position: int, draws: list[int] | None) -> int:
        """The number that seeds the augmentation of an image: the epoch, or a number of its own for each draw."""
        return epoch if draws is None else epoch * self.size + draws[position]

    def _order(self, part: str, epoch: int, size: int) -> tuple[list[int], list[int] | None]:
        """The images of one pass over a part of the data, and with weights how often each was drawn before in the pass.

        The last pass of each part is cached.
        """
        if self.orders.get(part, (-1,))[0] != epoch:
            seed = seed_from(self.seed, part, epoch) if part else seed_from(self.seed, epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(size, generator=generator)
            draws = None
            if self.weights is not None and part != "unlabelled":
                order = _drawn(torch.tensor(self.weights, dtype=torch.float64)[order], order, generator)
                draws = _earlier(order.tolist())
            self.orders[part] = epoch, order.tolist(), draws
        return self.orders[part][1:]


def _drawn(weights: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
    """As many of the images as there are, drawn in proportion to their weights, in random order.

    Systematic sampling: equally spaced points on the sum of the weights, so an image is drawn as often as its share says,
    rounded up or down.
    """
    upto = weights.cumsum(0)
    points = torch.arange(len(images), dtype=torch.float64) + torch.rand(1, generator=generator, dtype=torch.float64)
    chosen = torch.searchsorted(upto, points * (upto[-1] / len(images)), right=True).clamp_(max=len(images) - 1)
    return images[chosen][torch.randperm(len(images), generator=generator)]


def _earlier(order: list[int]) -> list[int]:
    """For each entry, the number of equal ones before it."""
    seen: dict[int, int] = {}
    counts = []
    for image in order:
        counts.append(seen.get(image, 0))
        seen[image] = counts[-1] + 1
    return counts


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
