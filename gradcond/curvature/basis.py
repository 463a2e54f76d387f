"""Orthonormal vectors: kept in the working dtype, multiplied in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Result = TypeVar("Result")
SEGMENT, LEAST_SEGMENT, SEGMENT_NUMBERS = 32, 16, 1 << 19  # vectors allocated at a time
CHUNK = 1 << 18  # numbers held in float64 at a time: what a processor's cache holds
DEVICE_CHUNK = 1 << 24  # the same on an accelerator
PIECE = 1 << 21  # columns of a vector that are converted at a time
SMALL = 0.1  # of what is left of a vector: what one pass removes well enough


class Basis:
    """At most ``capacity`` orthonormal vectors as rows, in segments: growing never copies what is there."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, capacity: int | None = None) -> None:
        self.n, self.dtype, self.device, self.capacity = n, dtype, device, capacity or n
        self.size = 0
        self._rows = min(SEGMENT, max(LEAST_SEGMENT, SEGMENT_NUMBERS // n))  # of a segment
        self._segments: list[Tensor] = []

    def append(self, vectors: Tensor) -> None:
        """Add the rows of vectors (b, n), rounded to the working dtype."""
        for vector in vectors:
            segment, row = divmod(self.size, self._rows)
            if segment == len(self._segments):
                rows = min(self._rows, self.capacity - self.size)
                self._segments.append(torch.empty(rows, self.n, dtype=self.dtype, device=self.device))
            self._segments[segment][row] = vector
            self.size += 1

    @property
    def parts(self) -> list[Tensor]:
        """The vectors so far, (., n) each."""
        rows = self._rows
        sizes = [min(rows, self.size - start) for start in range(0, self.size, rows)]
        return [segment[:size] for segment, size in zip(self._segments, sizes, strict=False)]

    def last(self, count: int) -> Tensor:
        """The last vectors as rows, a view where one segment holds them."""
        parts = self.parts[-2 - count // self._rows :]  # at least so many vectors
        return parts[-1][-count:] if len(parts[-1]) >= count else torch.cat(parts)[-count:]

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """Vectors (n, k) with unit columns from coefficients (size, k)."""
        parts, y = self.parts, torch.as_tensor(coefficients, device=self.device)
        vectors = torch.empty(self.n, y.shape[1], dtype=self.dtype, device=self.device)
        squares = y.new_zeros(y.shape[1])
        for columns, rows in _chunks(parts, self.n):
            new = rows.mT @ y
            squares += new.square().sum(0)
            vectors[columns] = new
        return vectors.div_(squares.sqrt().to(self.dtype))  # in the same dtype: otherwise a copy of all

    def take(self, coefficients: np.ndarray) -> Tensor:
        """What `combine` returns, in the memory of the basis, which is left empty."""
        self.rotate_(coefficients)
        parts, self._segments, self.size = self.parts, [], 0
        vectors = torch.cat(parts)
        del parts
        for vector in vectors:
            vector /= torch.linalg.vector_norm(vector, dtype=torch.float64).to(self.dtype)
        return vectors.mT

    def rotate_(self, coefficients: np.ndarray) -> None:
        """Replace the vectors by their combinations (size, k), k <= size, within the same memory."""
        parts, y = self.parts, torch.as_tensor(coefficients, device=self.device)
        self.size = y.shape[1]
        for columns, rows in _chunks(parts, self.n):
            new = y.mT @ rows
            for part, some in zip(self.parts, new.split(self._rows), strict=True):
                part[:, columns] = some


def orthogonalize_along_(parts: list[Tensor], w: Tensor, large: Iterable[int]) -> Tensor:
    """What `reorthogonalize_` does, where it is known along which rows nearly all of w lies: for less than half.

    Those rows are removed first, one by one; then a single pass removes what is small beside the rest of w. Where
    it is not, two passes follow.
    """
    coefficients = w.new_zeros(sum(map(len, parts)), len(w))
    for i in large:
        row = _row(parts, i)
        for columns in _pieces(w):
            coefficients[i] += w[:, columns] @ row[columns].double()
        for columns in _pieces(w):
            w[:, columns].addr_(coefficients[i], row[columns].double(), alpha=-1)
    small = _along(parts, w)
    _subtract_(parts, w, small)
    coefficients += small
    if bool((small.norm(dim=0) <= SMALL * w.norm(dim=1)).all()):
        return coefficients
    return coefficients + reorthogonalize_(parts, w)


def reorthogonalize_(parts: list[Tensor], w: Tensor) -> Tensor:
    """Remove from the float64 rows w (b, n) what lies along the rows of the parts; return its coefficients.

    Two passes of classical Gram-Schmidt: one is not enough on clusters. The coefficients are (rows, b).
    """
    parts = [part for part in parts if len(part)]
    if not parts:
        return w.new_zeros(0, len(w))
    # what the working dtype leaves of the first pass the second one removes, and that is small: only the step
    # between them needs float64, from one reading of the basis
    first = _along(parts, w)
    second = torch.zeros_like(first)
    for columns, rows in _chunks(parts, w.shape[1]):
        w[:, columns] -= first.mT @ rows
        second += rows @ w[:, columns].mT
    _subtract_(parts, w, second)
    return first + second


def _in_own_dtype(function: Callable[..., Result]) -> Callable[..., Result]:
    """Outside of autocast, which is for the products with A."""

    @functools.wraps(function)
    def wrapped(parts: list[Tensor], w: Tensor, *rest: Tensor) -> Result:
        device = w.device.type
        if not torch.is_autocast_enabled(device):
            return function(parts, w, *rest)
        with torch.autocast(device, enabled=False):
            return function(parts, w, *rest)

    return wrapped


@_in_own_dtype
def _along(parts: list[Tensor], w: Tensor) -> Tensor:
    """Coefficients of w, from products in the parts' dtype."""
    coefficients = w.new_zeros(sum(map(len, parts)), len(w))
    for columns in _pieces(w):
        rounded = {dtype: w[:, columns].to(dtype).mT for dtype in {part.dtype for part in parts}}
        coefficients += torch.cat([part[:, columns] @ rounded[part.dtype] for part in parts])
    return coefficients


@_in_own_dtype
def _subtract_(parts: list[Tensor], w: Tensor, coefficients: Tensor) -> None:
    """The same back: w less the rows times the coefficients, which are small."""
    for columns in _pieces(w):
        sums: dict[torch.dtype, Tensor] = {}
        for part, h in zip(parts, coefficients.split([len(part) for part in parts]), strict=True):
            own, h = part[:, columns], h.mT.to(part.dtype)
            sums[part.dtype] = sums[part.dtype].addmm_(h, own) if part.dtype in sums else h @ own
        for own in sums.values():
            w[:, columns] -= own


def _pieces(w: Tensor) -> list[slice]:
    """Columns to go through at a time, so that what is made of them on the way is small beside w."""
    return [slice(start, start + PIECE) for start in range(0, w.shape[1], PIECE)]


def _row(parts: list[Tensor], i: int) -> Tensor:
    for part in parts:
        if i < len(part):
            return part[i]
        i -= len(part)
    raise IndexError(i)


def _chunks(parts: list[Tensor], n: int) -> Iterator[tuple[slice, Tensor]]:
    """All rows in float64, some columns at a time, in memory that the next ones overwrite."""
    sizes, device = [len(part) for part in parts], parts[0].device
    width = min(n, max(1, (CHUNK if device.type == "cpu" else DEVICE_CHUNK) // sum(sizes)))
    buffer = torch.empty(sum(sizes), width, dtype=torch.float64, device=device)
    for start in range(0, n, width):
        columns = slice(start, min(start + width, n))
        rows = buffer[:, : columns.stop - start]
        for part, converted in zip(parts, rows.split(sizes), strict=True):
            converted.copy_(part[:, columns])
        yield columns, rows
