"""Recommends settings that need less memory."""

from __future__ import annotations

from scalekd.common import parallel
from scalekd.config.recipe import Config


def smaller_steps(config: Config) -> str:
    """What to try when memory runs out: more micro-batches for the same batch, if it divides evenly; then half the batch."""
    train, world = config.train, parallel.world()
    most = train.batch_size // (2 * world)  # batch norm needs two images per process and micro-batch
    parts = [
        n
        for n in range(2 * train.accumulate, most + 1)
        if train.batch_size % (n * world) == 0 and _divides(config, train.batch_size // (n * world))
    ]
    tries = [f"train.accumulate={parts[0]} (the same batch in more micro-batches)"] if parts else []
    whole = 2 * train.accumulate * world
    half = train.batch_size // 2 // whole * whole
    if half and _divides(config, half // (train.accumulate * world)):
        tries.append(f"train.batch_size={half}")
    now = f"train.batch_size={train.batch_size} train.accumulate={train.accumulate}"
    return f"Now {now}; try {', then '.join(tries) or 'a smaller data.image_size or a smaller model'}."


def _divides(config: Config, part: int) -> bool:
    """Whether `part` images, of one process and micro-batch, split evenly into labelled, unlabelled and mixup's pairs."""
    data, pairs = config.data, 2 if config.augment.mixup or config.augment.cutmix else 1
    unlabelled = round(part * data.unlabelled_share) if data.train and data.unlabelled else 0
    if data.train and data.unlabelled and unlabelled in (0, part):
        return False
    return unlabelled % pairs == 0 and (part - unlabelled) % pairs == 0
