"""Random seeds derived from any values, and the generators of Python, NumPy and torch."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_everything(*parts: int | str) -> None:
    """Seeds Python's, NumPy's and torch's global generators, which timm and torchvision draw from."""
    seed = seed_from(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: for every sample, that costs a millisecond
    if torch.cuda.is_initialized():  # never in a worker process
        torch.cuda.manual_seed(seed)


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
