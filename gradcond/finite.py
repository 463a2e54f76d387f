"""Are gradients and inputs finite, and are moments beyond their rounding? Asked at every step, so cheaply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradcond.statistics import Moments

__all__ = ["rounding_is_small", "total_of"]

_SMALL = 1024  # numbers: so few are cheaper to bring together than to sum up by themselves


def total_of(tensors: Sequence[Tensor]) -> float:
    """The sum of all entries: not finite when one of them is not. It may overflow where they are finite.

    A sum is vectorized; the largest magnitude, which cannot overflow, takes a hundred times as long on a CPU.

    Example:
        >>> total_of([torch.ones(2), torch.tensor([float("inf")])])
        inf
    """
    if len({t.device for t in tensors}) > 1:
        return sum(float(t.sum()) for t in tensors)
    sums = [t.sum() for t in tensors if t.numel() > _SMALL]
    if small := [t.flatten() for t in tensors if t.numel() <= _SMALL]:
        sums.append(torch.cat(small).sum())
    return float(torch.stack(sums).sum()) if sums else 0.0


def rounding_is_small(moments: Sequence[Moments]) -> bool:
    """Is every mean so near to zero that the rounding of it, squared, is lost in the variance?

    The rounding of n terms, five times over: see `channel_moments`, which looks closer where the answer is no.
    """
    if len({(m.mean.device, m.mean.dtype) for m in moments}) != 1:
        return False
    mean, variance = torch.cat([m.mean for m in moments]), torch.cat([m.variance for m in moments])
    rounding = 5 * torch.finfo(mean.dtype).eps * max(m.count for m in moments)
    return bool(torch.addcmul(variance, mean, mean, value=-(rounding**2)).amin() >= 0)
