"""What is left of a long vector in little memory: enough to compare it with another one later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

SUMS = 4093  # a prime: the entries of a column or a filter fall into different ones


def sketch(parts: Sequence[Tensor]) -> Tensor:
    """Sums of all numbers with random signs, (SUMS,) in float64, linear and the same for the same shapes.

    Up to SUMS numbers are their own sketch. Of more, entry i goes with a sign to sum i mod SUMS: the square of
    the norm is unbiased, with a standard deviation of (2 / SUMS)^1/2 = 2 % where the numbers are spread evenly.

    References:
        M. Charikar, K. Chen, M. Farach-Colton, Finding frequent items in data streams, 2004.

    Example:
        >>> sketch([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])])
        tensor([3., 0., 4.], dtype=torch.float64)
    """
    device, n = parts[0].device, sum(part.numel() for part in parts)
    if n <= SUMS:
        return torch.cat([part.detach().reshape(-1).double() for part in parts])
    sums, place = torch.zeros(SUMS, dtype=torch.float64, device=device), 0
    options: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    for part in parts:
        for piece in part.detach().reshape(-1).split(max(SUMS, n // 64)):  # a few numbers at a time
            signs = torch.randint(2, piece.shape, dtype=torch.float64, **options).mul_(2).sub_(1)
            end = place + len(piece)
            sums += pad(signs.mul_(piece), (place, -end % SUMS)).view(-1, SUMS).sum(0)
            place = end % SUMS
    return sums


def relative_difference(parts: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The norm of the difference over that of the others."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(parts, others, strict=True)]
    difference = math.hypot(*(_norm(a - b) for a, b in pairs))
    return difference / max(math.hypot(*(_norm(b) for _, b in pairs)), torch.finfo(torch.float64).tiny)


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))
