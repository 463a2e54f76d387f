"""Mean and variance of every channel of a tensor, by the fastest kernel that PyTorch has for its layout.

On a CPU `torch.var_mean` adds up one number at a time in double precision: 5.5 ns per number, as much as the matrix
product of a narrow layer. The kernels that normalization layers are made of are vectorized over the columns of a
matrix (`batch_norm_update_stats`) or along its rows (`native_group_norm`) and read it twice, at 0.1 to 0.5 ns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradcond.finite import flattened

__all__ = ["channel_moments", "is_matrix", "moments_of_matrices"]


def channel_moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    r"""The mean and the biased variance of each channel, over all other axes.

    An error of the mean enters the variance squared. In the first pass numbers are added up one after the other,
    so it is at most n u \|mean\|, u being half the spacing of numbers at 1; where its square could be seen,

        variance < (10 n u mean)^2,

    the moments are taken again from where the first row is zero, and are then as exact as the differences of rows
    are: a channel of mean 1e4 and deviation 1e-2 has its variance to 1 % in float32. The variance is never
    negative, zero for one row, and not finite when an entry of its channel is not.

    Args:
        x: at least one number; any strides.
        axis: of the channels.

    Returns:
        mean and variance, each (channels,), in float64 for float64 and in float32 for everything else.

    Example:
        >>> channel_moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), axis=-1)
        (tensor([2., 5.]), tensor([1., 0.]))
    """
    x = x.detach()
    if x.dtype is not torch.float32:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    axis %= x.dim()
    if not _is_plain(x):
        others = [d for d in range(x.dim()) if d != axis]
        variance, mean = torch.var_mean(x, others, correction=0) if others else (x - x, x)
        return mean, variance
    return _checked(x, axis, *_first_pass(x, axis))


def is_matrix(x: Tensor) -> bool:
    """Can `moments_of_matrices` take it, in one of its kernel's calls?"""
    if (x.dtype is not torch.float32 and x.dtype is not torch.float64) or not _is_plain(x):
        return False
    if x.is_nested or x.layout is not torch.strided:
        return False
    return x.dim() == 2 and x.is_contiguous() and x.numel() > 0 and (x.shape[1] >= 64 or x.numel() < 2**15)


def moments_of_matrices(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What `channel_moments` gives of each one's columns, with one check for all of them.

    Args:
        matrices: for which `is_matrix` holds; of any number of rows and columns.

    Example:
        >>> moments_of_matrices([torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.ones(3, 1)])
        [(tensor([2., 5.]), tensor([1., 0.])), (tensor([1.]), tensor([0.]))]
    """
    matrices = [x.detach() for x in matrices]
    found = [torch.batch_norm_update_stats(x, None, None, 0.0) for x in matrices]
    if len({x.dtype for x in matrices}) == 1:
        means, variances = (flattened(list(own)) for own in zip(*found, strict=True))
        if _margin(means, variances, max(map(len, matrices))) >= 0:
            return found
    return [_checked(x, 1, *own, len(x)) for x, own in zip(matrices, found, strict=True)]


def _margin(mean: Tensor, variance: Tensor, terms: int) -> float:
    """The least by which a variance exceeds what rounding of sums of so many terms can make of it."""
    seen = (5 * torch.finfo(mean.dtype).eps * (terms - 1)) ** 2
    margin: float = torch.addcmul(variance, mean, mean, value=-seen).min().item()
    return margin


def _checked(x: Tensor, axis: int, mean: Tensor, variance: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """The moments of a first pass, or of a second one where that was not exact enough."""
    margin = _margin(mean, variance, terms)
    # a constant channel among others is not worth a second pass: its error is far below their variances
    if not margin >= 0 and not margin > -1e-4 * variance.mean().item():
        first = x[tuple(slice(None if d == axis else 1) for d in range(x.dim()))]
        mean, variance, _ = _first_pass(x - first, axis)
        mean += first.flatten()
    return mean, variance


def _is_plain(x: Tensor) -> bool:
    """Is x numbers on a CPU? Elsewhere var_mean is right: parallel on GPUs, fused by compilers, batched by vmap."""
    if torch.compiler.is_compiling() or not x.is_cpu or type(x) is not Tensor:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _first_pass(x: Tensor, axis: int) -> tuple[Tensor, Tensor, int]:
    """Mean, variance, and how many roundings their sums went through, one after the other."""
    channels = x.shape[axis]
    last = axis == x.dim() - 1
    rows = x if last else x.movedim(axis, -1)
    if last or rows.is_contiguous():  # channels are side by side: columns of a matrix
        rows = (rows if rows.dim() == 2 else rows.reshape(-1, channels)).contiguous()
        count = rows.shape[0]
        if channels >= 64 or x.numel() < 2**15:
            return *torch.batch_norm_update_stats(rows, None, None, 0.0), count
        # few channels do not fill a vector register, several rows beside each other do: 20 times as fast for 3
        beside = math.gcd(count, 512 >> channels.bit_length())
        mean, variance = torch.batch_norm_update_stats(rows.view(-1, beside * channels), None, None, 0.0)
        return *_merge(mean.view(beside, channels), variance.view(beside, channels), 0), count // beside + 8
    samples, positions = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    x = x.contiguous()
    if positions > 4 * samples:  # each (sample, channel) is a row: 3 times as fast at 4 images of 56 x 56
        x = x.view(samples, channels, positions)
        _, mean, scale = torch.native_group_norm(x, None, None, samples, channels, positions, channels, 0.0)
        return *_merge(mean, scale.pow(-2), 0), samples + 8
    # each (channel, position) is a column: 7 times as fast at 128 images of 4 x 4
    mean, variance = torch.batch_norm_update_stats(x.view(samples, channels * positions), None, None, 0.0)
    return *_merge(mean.view(channels, positions), variance.view(channels, positions), 1), samples + 8


def _merge(mean: Tensor, variance: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Moments of parts of equal size taken together: total variance."""
    center = mean.mean(axis, keepdim=True)
    return center.squeeze(axis), variance.mean(axis) + (mean - center).square_().mean(axis)
