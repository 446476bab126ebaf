"""Tokens of a transformer as maps, and maps as tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_tokens(x: Tensor, prefix: Tensor | None) -> Tensor:
    """(B, D, H, W), (B, P, D) -> (B, P + H*W, D)"""
    tokens = x.flatten(2).transpose(1, 2)
    return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)


def to_map(tokens: Tensor, prefix_tokens: int, grid: Sequence[int]) -> Tensor:
    """(B, P + H*W, D) -> (B, D, H, W)"""
    return tokens[:, prefix_tokens:].transpose(1, 2).unflatten(2, tuple(grid))
