"""Moments of a layer's input: taken once per call, merged over calls, folded once per step.

Counts, means and variances are kept, never sums of squares: the variance of inputs with a large mean is then
right in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcond.layers import Layer

__all__ = ["Moments", "fold", "input_moments"]


@dataclass(frozen=True)
class Moments:
    """Moments of the rows seen so far, one entry per input channel.

    References:
        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Example:
        >>> a = Moments(count=1, samples=1, rows=1, mean=torch.tensor([0.0]), variance=torch.tensor([0.0]))
        >>> b = Moments(1, 1, 1, torch.tensor([4.0]), torch.tensor([0.0]))
        >>> a.merge(b).mean, a.merge(b).variance
        (tensor([2.]), tensor([4.]))
    """

    count: int  # positions of the input, before padding, each once
    samples: int
    rows: int  # samples x output positions
    mean: Tensor  # (inputs,) float32 or float64
    variance: Tensor  # (inputs,) biased

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        count = self.count + other.count
        a = other.count / count
        return Moments(
            count,
            self.samples + other.samples,
            self.rows + other.rows,
            *total(self.mean, self.variance, other.mean, other.variance, a),
        )


def total(mean: Tensor, variance: Tensor, mean_a: Tensor, variance_a: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Mean and total variance of a mixture in which the second part has weight a."""
    d = mean_a - mean
    return mean.lerp(mean_a, a), variance.lerp(variance_a, a).addcmul_(d, d, value=a * (1 - a))


@torch.no_grad()
def input_moments(layer: Layer, x: Tensor, output: Tensor) -> Moments | None:
    """The moments of one call's input, in float32 or better; None for an empty batch.

    Args:
        layer: whose input it is.
        x: Linear: (..., inputs), every leading index one row. Convolutions: (batch, inputs, *positions), or
            without the batch axis.
        output: the layer's output on x, whose positions count the rows of the gradient.
    """
    axis = layer.channel_axis(x)
    if x.numel() == 0 or output.numel() == 0:
        return None
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    others = [d for d in range(x.dim()) if d != axis]
    variance, mean = torch.var_mean(x, others, correction=0) if others else (torch.zeros_like(x), x)
    count = x.numel() // x.shape[axis]
    samples = x.shape[0] if axis > 0 else 1
    rows = output.numel() // (layer.units * layer.groups)
    return Moments(count, samples, rows, mean, variance)


def fold(state: dict[str, Any], moments: Moments, decay: float, start: str) -> None:
    r"""Folds one step's moments into running ones, as total variance.

    With d = mean_step - mean and step t's weight a,

        mean <- mean + a d;    variance <- (1-a) variance + a variance_step + a (1-a) d^2,

    which is unbiased up to O(1 - decay) at every batch size, one row included.

    Args:
        state: holds "mean", "variance", "steps", "rows", "samples" from the second call on.
        moments: of this step's rows.
        decay: in [0, 1); 0 keeps this step's rows only.
        start: "debias", a = (1-decay)/(1-decay^t); "first_batch", a = 1 and then 1-decay; "paper", a = 1-decay
            from mean 0 and variance 1.

    Example:
        >>> state = {}
        >>> for x in ([0.0], [4.0]):
        ...     fold(state, Moments(1, 1, 1, torch.tensor(x), torch.zeros(1)), decay=0.5, start="first_batch")
        >>> state["mean"], state["variance"], state["steps"]
        (tensor([2.]), tensor([4.]), 2)
    """
    steps = state.get("steps", 0) + 1
    mean, variance = state.get("mean"), state.get("variance")
    if mean is None or variance is None:
        mean, variance = torch.zeros_like(moments.mean), torch.ones_like(moments.mean)
    a = 1 - decay
    if start == "debias":
        a = (1 - decay) / (1 - decay**steps)
    elif start == "first_batch" and steps == 1:
        a = 1.0
    state["mean"], state["variance"] = total(mean, variance, moments.mean, moments.variance, a)
    state["steps"], state["rows"], state["samples"] = steps, moments.rows, moments.samples
