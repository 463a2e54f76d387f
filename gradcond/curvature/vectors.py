"""Flat vectors over all parameters, and the same numbers as one tensor a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors


def parts_of(v: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A vector (n,) as one tensor a parameter; views of it where they can be."""
    parts = _unflatten_dense_tensors(v.contiguous(), parameters)
    return [part if part.dtype == p.dtype else part.to(p.dtype) for part, p in zip(parts, parameters, strict=True)]


def stacked(V: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Vectors (n, c) as one tensor (c, *shape) a parameter."""
    parts = V.mT.split([p.numel() for p in parameters], 1)
    return [part.reshape(len(part), *p.shape).to(p.dtype) for part, p in zip(parts, parameters, strict=True)]


class Sum:
    """The inverse of both, added up over batches; takes no memory before the first has been computed.

    Args:
        size: of all rows together, one after the other.
        dtype: of the sum.
        device: where it is.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._total: Tensor | None = None

    def add(self, groups: Iterable[Sequence[Tensor]]) -> None:
        """Adds a batch: groups of rows, each as tensors (rows, numbers) to be joined."""
        first, start = self._total is None, 0
        for parts in groups:
            end = start + sum(part.numel() for part in parts)
            if self._total is None:
                self._total = torch.empty(self.size, dtype=self.dtype, device=self.device)
            rows = self._total[start:end].view(len(parts[0]), -1)
            with torch.no_grad():
                if first:
                    torch.cat(parts, 1, out=rows)  # type: ignore[arg-type]
                else:
                    torch._foreach_add_(rows.split([part.shape[1] for part in parts], 1), parts)  # type: ignore
            start = end
            del parts  # before the next are computed

    def __call__(self) -> Tensor:
        """The sum (size,)."""
        if self._total is None:
            return torch.zeros(self.size, dtype=self.dtype, device=self.device)
        return self._total
