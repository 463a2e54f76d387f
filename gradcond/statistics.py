"""Moments of a layer's input: taken once per call, merged over calls, folded once per step.

Counts, means and variances are kept, never sums of squares: the variance of inputs with a large mean is then
right in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Moments", "fold"]


@dataclass(slots=True)
class Moments:
    """Moments of the rows seen so far, one entry per input channel (or per channel and tap).

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
    mean: Tensor  # (inputs,) or (inputs x taps,), float32 or float64
    variance: Tensor  # likewise, biased

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together: their total variance."""
        count = self.count + other.count
        a = other.count / count
        d = other.mean - self.mean
        mean = self.mean.lerp(other.mean, a)
        variance = self.variance.lerp(other.variance, a).addcmul_(d, d, value=a * (1 - a))
        return Moments(count, self.samples + other.samples, self.rows + other.rows, mean, variance)


def fold(state: dict[str, Any], moments: Moments, decay: float, start: str) -> None:
    r"""Folds one step's moments into running ones, as total variance.

    With d = mean_step - mean and step t's weight a,

        mean <- mean + a d;    variance <- (1-a) variance + a variance_step + a (1-a) d^2,

    which is unbiased up to O(1 - decay) at every batch size, one row included.

    Args:
        state: holds "mean" and "variance", which are changed in place, and "shift" (d), "steps", "rows" and
            "samples" from the second call on.
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
    state["shift"] = d = moments.mean - mean
    state["mean"] = mean.lerp_(moments.mean, a)
    state["variance"] = variance.lerp_(moments.variance, a).addcmul_(d, d, value=a * (1 - a))
    state["steps"], state["rows"], state["samples"] = steps, moments.rows, moments.samples
