"""The functions of `exllamav2_ext` that make Hadamard matrices. Plain torch.

Both constructions are Paley's, over the residues of a prime p. With χ(a) = 1 for a square, -1 for any other number,
they fill a matrix whose entries are 1 and -1 and whose rows are orthogonal. A size that has no such prime, for which
the compiled module leaves something else behind, raises.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from qinfer.compat.binding import check_tensor, extension


@extension
def had_paley(h: Tensor) -> None:
    """Fill a matrix by Paley's first construction: p = n - 1 is a prime of the form 4k + 3.

    The first row is 1, the rest of the first column -1; of what remains, the diagonal is 1 and the others χ(i - j).

    Args:
        h: [n, n] fp16, written.

    Raises:
        RuntimeError: h is not fp16 or not square, or there is no such matrix of this size.
    """
    size = _size(h)
    prime = size - 1
    if not _is_prime(prime) or prime % 4 != 3:
        raise ValueError(f"h must be [n, n] with a prime n - 1 of the form 4k + 3 (n = 4, 8, 12, 20 …), got n = {size}")
    matrix = torch.ones(size, size)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _characters(prime, on_diagonal=1)
    h.copy_(matrix)


@extension
def had_paley2(h: Tensor) -> None:
    """Fill a matrix by Paley's second construction: p = n / 2 - 1 is a prime of the form 4k + 1.

    It consists of blocks: [[1, -1], [-1, -1]] on the diagonal, [[1, 1], [1, -1]] elsewhere in the first row and column
    of blocks, and χ(i - j) times the latter in the rest.

    Args:
        h: [n, n] fp16, written.

    Raises:
        RuntimeError: h is not fp16 or not square, or there is no such matrix of this size.
    """
    size = _size(h)
    prime = size // 2 - 1
    if size % 2 or not _is_prime(prime) or prime % 4 != 1:
        raise ValueError(f"h must be [n, n] with a prime n/2 - 1 of the form 4k + 1 (n = 12, 28, 36 …), got n = {size}")
    signs = torch.ones(size // 2, size // 2)
    signs[1:, 1:] = _characters(prime, on_diagonal=0)
    signs.fill_diagonal_(0)
    other = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    h.copy_(torch.kron(signs, other) + torch.kron(torch.eye(size // 2), diagonal))


def _size(h: Tensor) -> int:
    """Return n, once h is [n, n] fp16."""
    check_tensor("h", h, torch.float16, ("n", "n"))
    check_tensor("h", h, torch.float16, (h.shape[0], h.shape[0]))
    if h.is_meta:
        raise ValueError("h must hold numbers, got a tensor on the meta device")
    return h.shape[0]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _characters(prime: int, *, on_diagonal: int) -> Tensor:
    """Return χ(i - j) as [p, p] fp32."""
    characters = torch.full((prime,), -1.0)
    characters[torch.arange(1, prime).square() % prime] = 1.0
    characters[0] = on_diagonal
    residue = torch.arange(prime)
    return characters[(residue[:, None] - residue) % prime]
