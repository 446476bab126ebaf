"""Derives random seeds from values and seeds the generators of Python, NumPy and PyTorch."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_everything(*parts: int | str) -> None:
    """Seeds the global generators of Python, NumPy and PyTorch, which timm and torchvision use."""
    seed = seed_from(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would cost a millisecond per sample
    if torch.cuda.is_initialized():  # never in a worker process
        torch.cuda.manual_seed(seed)


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on all `parts` and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
