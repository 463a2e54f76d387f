"""Moments of a layer's input: taken once per call, merged over calls, folded once per step.

Counts, means and variances are kept, never sums of squares: the variance of inputs with a large mean is then
right in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bank", "Moments", "fold"]


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

    count: int  # positions of the input, before padding, each once; of patches: rows
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
        state: holds "mean" and "variance", which are changed in place, and "shift" (d), "steps", "rows",
            "samples", "exact_mean" and "exact_variance" from the second call on: in float32 a small step of a
            large mean is lost.
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
    mean, variance = state.get("mean"), state.get("variance")
    if mean is None or variance is None:
        mean, variance = torch.zeros_like(moments.mean), torch.ones_like(moments.mean)
    like = moments.mean  # the model may have been moved
    exact, spread = (
        _exact(t, like) for t in (state.get("exact_mean", mean), state.get("exact_variance", variance))
    )
    steps = state.get("steps", 0) + 1
    a = weight_of(steps, decay, start)
    new = like.to(exact.dtype)
    state["shift"] = d = new - exact
    state["exact_mean"] = exact.lerp_(new, a)
    state["exact_variance"] = spread.lerp_(moments.variance.to(exact.dtype), a).addcmul_(d, d, value=a * (1 - a))
    state["mean"], state["variance"] = mean.to(like).copy_(exact), variance.to(like).copy_(spread)
    state["steps"], state["rows"], state["samples"] = steps, moments.rows, moments.samples


def _exact(mean: Tensor, like: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return mean.to(like.device, like.dtype if like.device.type == "mps" else torch.float64)


def weight_of(steps: int, decay: float, start: str) -> float:
    """Step `steps`'s weight a in the running moments."""
    if start == "debias":
        return (1 - decay) / (1 - decay**steps)
    return 1.0 if start == "first_batch" and steps == 1 else 1 - decay


class Bank:
    """The running moments of several layers side by side, so that one operation moves all of them.

    The layers' states hold views of it from then on. With it `fold` of L layers costs 6 operations instead of 8 L.

    Args:
        states: of the layers.
        like: a tensor of the dtype and on the device that their next moments have.
    """

    def __init__(self, states: Sequence[dict[str, Any]], like: Tensor) -> None:
        sizes = [len(state["mean"]) for state in states]
        parts = [(key, state) for key in ("mean", "variance") for state in states]
        self.exact = torch.cat([_exact(state.get(f"exact_{key}", state[key]), like) for key, state in parts])
        self.flat = self.exact.to(like.dtype, copy=True)
        self.new, self.moved = torch.zeros(2, len(self.exact)).to(self.exact)  # of a step, and its distance
        self.mean, self.variance = self.flat.chunk(2)
        self.exact_mean, self.exact_variance = self.exact.chunk(2)
        self.shift, self.metric = self.moved.chunk(2)[0], torch.zeros_like(self.mean)
        self.owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(self.flat.device)
        self.largest = self.flat.new_zeros(len(sizes))
        self.scale: tuple[list[float], Tensor] = [], self.flat
        keys = ("mean", "variance", "shift", "exact_mean", "exact_variance")
        self.views = list(zip(*(getattr(self, key).split(sizes) for key in keys), strict=True))
        self.metrics = self.metric.split(sizes)
        for state, views in zip(states, self.views, strict=True):
            state.update(zip(keys, views, strict=True))

    def holds(self, states: Sequence[dict[str, Any]], moments: Sequence[Moments]) -> bool:
        """Are these the states whose moments it holds, in step, and are their new ones of its kind?"""
        if len(states) != len(self.views):
            return False
        steps, dtype, device = states[0].get("steps"), self.flat.dtype, self.flat.device
        for state, m, (mean, variance, *_) in zip(states, moments, self.views, strict=True):
            if state.get("mean") is not mean or state["variance"] is not variance or state["steps"] != steps:
                return False
            if m.mean.dtype is not dtype or m.mean.device != device:
                return False
        return True

    def fold(self, states: Sequence[dict[str, Any]], moments: Sequence[Moments], a: float) -> None:
        """What the function `fold` does, with the weight a for all layers."""
        self.new.copy_(torch.cat([m.mean for m in moments] + [m.variance for m in moments]))
        torch.sub(self.new, self.exact, out=self.moved)
        self.exact.lerp_(self.new, a)
        self.exact_variance.addcmul_(self.shift, self.shift, value=a * (1 - a))
        self.flat.copy_(self.exact)
        for state, m, (_, _, shift, *_) in zip(states, moments, self.views, strict=True):
            state["steps"], state["rows"], state["samples"] = state["steps"] + 1, m.rows, m.samples
            state["shift"] = shift

    def damped(self, eps_rel: float, eps: float, q: list[float]) -> tuple[Tensor, ...]:
        """1 / (q^2 (variance + eps_rel max(variance) + eps)) for each layer, until the next call."""
        if self.scale[0] != q:
            squares = self.largest.new_tensor([number**2 for number in q])
            self.scale = q, squares.index_select(0, self.owner)
        largest = self.largest.zero_().scatter_reduce_(0, self.owner, self.variance, "amax")
        largest.mul_(eps_rel)  # by itself: within the sum it is rounded otherwise where vectors end
        torch.add(self.variance, largest.index_select(0, self.owner), out=self.metric)
        self.metric.add_(eps).mul_(self.scale[1]).reciprocal_()
        return self.metrics
