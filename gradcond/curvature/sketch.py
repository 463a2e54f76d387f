"""What is left of a long vector in little memory: enough to compare it with another one later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SUMS = 4093  # a prime: the entries of a column or a filter fall into different ones


def sketch(parts: Sequence[Tensor]) -> Tensor:
    """Sums of all numbers with random signs, (SUMS,) in float64: linear, and the same for the same shapes.

    Entry i goes with a sign to sum i mod SUMS. Its norm is that of the vector for up to SUMS numbers; for more its
    square is unbiased, with a standard deviation of at most (2 / SUMS)^1/2 = 2 % where they are spread evenly.

    References:
        M. Charikar, K. Chen, M. Farach-Colton, Finding frequent items in data streams, 2004.

    Example:
        >>> x, y = torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])
        >>> float(sketch([x, y]).norm()), float((sketch([x, y]) - sketch([x, -y])).norm())
        (5.0, 8.0)
    """
    device, place = parts[0].device, 0
    sums = torch.zeros(SUMS, dtype=torch.float64, device=device)
    generator = torch.Generator(device).manual_seed(0)
    length = max(SUMS, sum(part.numel() for part in parts) // 64)  # a few numbers at a time
    for part in parts:
        for piece in part.detach().reshape(-1).split(length):
            signs = torch.randint(2, piece.shape, generator=generator, device=device) * 2 - 1
            sums.index_add_(0, torch.arange(place, place + len(piece), device=device) % SUMS, signs * piece.double())
            place += len(piece)
    return sums


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Of two vectors, given by their sketches: the norm of the difference over that of the second."""
    return float((a - b).norm()) / max(float(b.norm()), torch.finfo(torch.float64).tiny)
