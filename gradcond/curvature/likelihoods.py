"""What a Monte-Carlo Fisher matrix draws: targets from the model's own predictions, by loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradcond.curvature.losses import TorchLoss
from gradcond.curvature.products import primal_and_tangent

# Each of these has, for each datum and sample, <s, z>: s is the slope of the datum's loss at a drawn target, times
# what makes E[s s^T] the curvature of that loss in z.
Uniform = Callable[[int, int], Tensor]  # (data, numbers) -> (data, samples, numbers)


def _classes(z: Tensor, target: Tensor, loss: TorchLoss, uniform: Uniform) -> Tensor:
    rows = _classes_last(z)
    count, classes = rows.shape
    p = primal_and_tangent(rows)[0].detach().double().softmax(1)
    drawn = torch.searchsorted(p.cumsum(1), uniform(count, 1)[..., 0]).clamp_max(classes - 1)
    weight, smoothing = loss.options["weight"], loss.options.get("label_smoothing", 0.0)
    weight = p.new_ones(classes) if weight is None else weight.double()
    if loss.has_class_targets(target):
        at = target.reshape(-1)
        kept = at != loss.options["ignore_index"]
        curvature = ((1 - smoothing) * weight[at.where(kept, 0)] + smoothing * weight.mean()) * kept
    else:
        curvature = ((1 - smoothing) * _classes_last(target).double() + smoothing / classes) @ weight
    inner = (p.to(rows.dtype) * rows).sum(1, keepdim=True) - rows.gather(1, drawn)
    return curvature.sqrt()[:, None].to(rows.dtype) * inner


def _bits(z: Tensor, target: Tensor, loss: TorchLoss, uniform: Uniform) -> Tensor:
    rows = _flat_rows(z)
    p = primal_and_tangent(rows)[0].detach().double().sigmoid()[:, None]
    weight, positive = loss.options["weight"], loss.options.get("pos_weight")
    curvature = torch.ones_like(z, dtype=torch.double) if weight is None else weight.double().expand_as(z)
    if positive is not None:
        curvature = curvature * (target * positive + 1 - target)
    slopes = (p - (uniform(len(rows), rows.shape[1]) < p).double()) * _flat_rows(curvature).sqrt()[:, None]
    return torch.einsum("nc,nsc->ns", rows, slopes.detach().to(rows.dtype))


def _gaussian(z: Tensor, target: Tensor, loss: TorchLoss, uniform: Uniform) -> Tensor:
    rows = _flat_rows(z)
    # by the inverse distribution function: torch.randn of two batches is not that of both
    normal = torch.special.ndtri(uniform(len(rows), rows.shape[1]).clamp_min(2.0**-54))
    return torch.einsum("nc,nsc->ns", rows, (2**0.5 * normal).to(rows.dtype))


def _classes_last(z: Tensor) -> Tensor:
    """(data, classes): the classes are the second dimension, or the only one."""
    return z[None] if z.ndim == 1 else z.movedim(1, -1).reshape(-1, z.shape[1])


def _flat_rows(z: Tensor) -> Tensor:
    return z.reshape(z.shape[:1].numel(), z.shape[1:].numel())  # not -1: there may be none


LIKELIHOODS = {"cross_entropy": _classes, "binary_cross_entropy_with_logits": _bits, "mse_loss": _gaussian}
