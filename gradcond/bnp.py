"""Batch Normalization Preconditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcond.conditioner import Conditioner, RowMap, Squares, square_of
from gradcond.layers import Layer, Rows
from gradcond.statistics import Bank, Moments, fold, weight_of

__all__ = ["BNP"]


@dataclass
class BNP(Conditioner):
    r"""Train as if each layer's inputs were batch-normalized, with no layer added.

    With running mean mu and variance sigma^2 of the layer's inputs, S = diag(sigma~^2) and

        sigma~^2 = sigma^2 + eps_rel max(sigma^2) + eps,    q^2 = max(fan_in / n, 1),

    each row [b, w] of the gradient is multiplied by M = P P^T, P = (1/q) [[1, -mu^T], [0, I]] diag(1, S^-1/2):

        w <- (w - b mu) / (q^2 sigma~^2);    b <- b / q^2 - sum(w mu)    (the new w).

    That is a gradient step on the weights of the normalized input (h - mu) / sigma~, mapped back. Without a
    trainable bias M = (S + mu mu^T)^-1 / q^2, which is the restriction of the same metric to the weights; and
    S^-1 / q^2 where a batch-norm layer follows directly, since it takes the mean out by itself: as the layer's
    first step shows, which a compiled pass does not. Convolutions share mu_c and sigma_c among the taps of input
    channel c, and a row's sums run over its own group.

    M is symmetric and positive definite, and without eps training does not depend on the scale and the offset
    of any input. It needs the layer's inputs: those of the forward passes that made the gradient, in training
    mode, merged over micro-batches, folded once per step as total variance, so that batches of one work. Those of
    attention's output projection do not show in compiled or checkpointed passes: there it is left alone, and a
    warning says so. Passes inside torch.func leave no gradient and are not seen: where per-sample gradients come
    from there and are put into .grad by hand, a pass over other inputs, forward and backward, before that shows
    what inputs are like. For differential privacy those have to be public, since noise on the gradients does not
    hide the statistics.

    Args:
        decay: of the running mean and variance; 0 uses the step's own rows only.
        eps_rel: relative damping: variances are equalized up to a factor (1 + eps_rel) / eps_rel.
        eps: absolute damping, in squared input units.
        scale: n of q^2: "rows", samples times output positions; "batch", samples; None, q^2 = 1.
        start: of the averages: "debias", "first_batch" or "paper" (mean 0, variance 1), see `statistics.fold`.
        center: take the means into account.
        standardize: take the variances into account.
        taps: statistics of every tap's own patches, padding included, instead of tied ones per input channel.
        ghost: take the moments of this many rows (of convolutions: samples) drawn from each call, for which they
            count; None, of all. Embeddings and recurrent layers always give all.
        every: take moments in every so many steps, the first one included, and use the last ones in between.

    Raises:
        ValueError: for a setting out of its range.

    References:
        Lange, Helfrich, Ye, "Batch Normalization Preconditioning for Neural Network Training", JMLR 23(72),
        2022, https://jmlr.org/papers/v23/20-1135.html. The update and the default constants are as we recall
        its Algorithm 1; the forms without bias, the count n of q^2 for convolutions, total variance and the
        debiased start are derived here.

    Example:
        >>> state = {"mean": torch.tensor([3.0]), "variance": torch.tensor([4.0]), "rows": 8, "samples": 8}
        >>> layer = Layer("fc", torch.nn.Linear(1, 1))
        >>> row_map = BNP(eps_rel=0, eps=0).row_map(layer, state)
        >>> row_map.apply(layer.rows(torch.tensor([[8.0]]), torch.tensor([2.0])))
        Rows(weight=tensor([[[0.5000]]]), bias=tensor([[0.5000]]))
    """

    decay: float = 0.99
    eps_rel: float = 1e-2
    eps: float = 1e-4
    scale: str | None = "rows"
    start: str = "debias"
    center: bool = True
    standardize: bool = True
    taps: bool = False
    ghost: int | None = None
    every: int = 1

    uses_inputs: ClassVar[bool] = True
    acts_on_bias: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"BNP: decay must be in [0, 1), got {self.decay}")
        if not (self.eps_rel >= 0 and self.eps >= 0):
            raise ValueError(f"BNP: eps_rel and eps must not be negative, got {self.eps_rel} and {self.eps}")
        if self.scale not in ("rows", "batch", None):
            raise ValueError(f'BNP: scale must be "rows", "batch" or None, got {self.scale!r}')
        if self.start not in ("debias", "first_batch", "paper"):
            raise ValueError(f'BNP: start must be "debias", "first_batch" or "paper", got {self.start!r}')
        if self.ghost is not None and not (isinstance(self.ghost, int) and self.ghost >= 1):
            raise ValueError(f"BNP: ghost must be a number of rows, or None, got {self.ghost}")
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"BNP: every must be a number of steps, at least 1, got {self.every}")
        for name in ("center", "standardize", "taps"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"BNP: {name} must be True or False, got {getattr(self, name)!r}")

    def is_due(self, state: dict[str, Any]) -> bool:
        """Every `every` steps, the first one included."""
        return "mean" not in state or state["age"] >= self.every

    def update(self, state: dict[str, Any], moments: Moments) -> None:
        """Folds the moments of one step's rows."""
        fold(state, moments, self.decay, self.start)
        state["age"], state["_metric"] = 1, None

    def update_all(
        self, states: Sequence[dict[str, Any]], moments: Sequence[Moments], scratch: dict[str, Any]
    ) -> None:
        """The same for all layers, side by side once they are in step."""
        bank = scratch.get("bank")
        if bank is None or not bank.holds(states, moments):
            kinds = {
                (m.mean.dtype, m.mean.device, state.get("steps")) for m, state in zip(moments, states, strict=True)
            }
            if len(states) == 1 or len(kinds) > 1 or "mean" not in states[0]:
                return super().update_all(states, moments, scratch)
            scratch["bank"] = bank = Bank(states, moments[0].mean)
        bank.fold(states, moments, weight_of(states[0]["steps"] + 1, self.decay, self.start))
        q = [state.get("q", 1.0) for state in states]
        metrics = bank.damped(self.eps_rel, self.eps, q) if self.standardize and self.eps > 0 else ()
        for j, state in enumerate(states):
            state["age"] = 1
            state["_metric"] = (self.eps_rel, self.eps, q[j], metrics[j]) if metrics else None

    def condition_all_(
        self,
        parameters: Sequence[tuple[Tensor, Tensor]],
        gradients: Sequence[tuple[Tensor, Tensor]],
        states: Sequence[dict[str, Any]],
        moments: Sequence[Moments],
        scratch: dict[str, Any],
        squares: list[Squares] | None = None,
    ) -> bool:
        """With the running moments of all layers side by side, and three operations for each."""
        bank = scratch.get("bank")
        if type(self) is not BNP or bank is None:
            return False
        if not (self.center and self.standardize and self.eps > 0 and bank.holds(states, moments)):
            return False
        if any(weight.dtype is not bank.flat.dtype for weight, _ in gradients):
            return False
        bank.fold(states, moments, weight_of(states[0]["steps"] + 1, self.decay, self.start))
        q = [self._q(weight.shape[1], state) for (weight, _), state in zip(gradients, states, strict=True)]
        metrics = bank.damped(self.eps_rel, self.eps, q)
        for theta, (weight, bias), state, metric, own in zip(
            parameters, gradients, states, metrics, q, strict=True
        ):
            mean = state["mean"]
            weight.addr_(bias, mean, alpha=-1)
            if squares is not None:
                size = _size(*theta, mean, metric.reciprocal(), own)
                squares.append(Squares(size[None], _slope(weight.square(), bias, metric, own)[None], own))
            weight.mul_(metric)
            bias.addmv_(weight, mean, beta=1 / own**2, alpha=-1)
            state["age"], state["q"], state["_metric"] = 1, own, (self.eps_rel, self.eps, own, metric)
        return True

    def _q(self, fan_in: int, state: dict[str, Any]) -> float:
        n = fan_in if self.scale is None else state["rows" if self.scale == "rows" else "samples"]
        return float(max(fan_in / n, 1.0) ** 0.5)

    def wait(self, state: dict[str, Any]) -> None:
        """The moments grow older."""
        state["age"] += 1

    def row_map(self, layer: Layer, state: dict[str, Any]) -> RowMap | None:
        """P from the running moments; the identity before the first ones."""
        if "mean" not in state:
            return None
        state["q"] = q = self._q(layer.fan_in, state)  # for the next step's bank
        form = WithBias if state.get("has_bias", True) else WithoutBias
        centers = self.center and not (state.get("feeds_batch_norm") and form is WithoutBias)
        *settings, metric = state.get("_metric") or (None,)
        if metric is None or not self.standardize or settings != [self.eps_rel, self.eps, q]:
            metric = self._metric(state["variance"], q)
        mean = state["mean"]
        parts = layer, form, centers, mean, metric
        if layer.kept is None or layer.kept[1].q != q or not all(map(is_, layer.kept[0], parts)):
            center = layer.columns(mean if centers else torch.zeros_like(mean))
            layer.kept = parts, form(center, layer.columns(metric), q, layer, rests=self.eps == 0)
        row_map: RowMap = layer.kept[1]  # where it is an old one, the bank has moved its tensors
        return row_map

    def _metric(self, variance: Tensor, q: float) -> Tensor:
        """1 / (q sigma~)^2."""
        if not self.standardize:
            return torch.full_like(variance, 1 / q**2)
        metric = (variance + self.eps_rel * variance.amax()).add_(self.eps).mul_(q**2).reciprocal_()
        return metric if self.eps > 0 else metric.masked_fill_(metric.isinf(), 0.0)  # there weights rest

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """One mean and one variance per input, or per input and tap."""
        shape = (layer.inputs * (layer.kernel_size if self.taps else 1),)
        return dict.fromkeys(("mean", "exact_mean", "variance", "exact_variance", "shift"), shape)

    def describe(self, layer: Layer, state: dict[str, Any]) -> str:
        """Which restriction of M is used, and over how many steps the moments were taken."""
        if "mean" not in state:
            return "no statistics yet: identity"
        form = "with bias"
        if not state.get("has_bias", True):
            form = "bias-free, " + ("batch norm follows" if state.get("feeds_batch_norm") else "rank one")
        variance, steps = state["variance"], state["steps"]
        low = int((variance < self.eps).sum())
        note = f", {low} of {variance.numel()} input variances under eps" if low else ""
        if steps > 1:
            note = f", staleness {self.staleness(state):.2g}{note}"
        return f"{form}, {steps} step{'' if steps == 1 else 's'}{note}"

    def staleness(self, state: dict[str, Any]) -> float:
        """How far a step's mean was from the running one: |mu_step - mu| / sigma, root of its mean square.

        With independent rows it is about n^-1/2 for n rows in a step; more says that the statistics lag.
        """
        damped = state["variance"] + (self.eps_rel * state["variance"].max() + self.eps)
        return float((state["shift"].square() / damped).mean().sqrt())


@dataclass
class _Whitening(RowMap):
    """What both forms hold; P, M and their tensors are of the statistics' dtype."""

    mean: Tensor  # (groups, 1, in, 1...), with taps=True (groups, 1, in, *taps)
    metric: Tensor  # likewise, 1 / (q sigma~)^2; zero where a weight rests
    q: float
    layer: Layer
    rests: bool = True  # may a weight rest?

    on_each_row: ClassVar[bool] = True

    @property
    def scale(self) -> float:
        """Q."""
        return self.q

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Sums a b over each row: (..., groups, out)."""
        taps = self.layer.taps
        if a.dim() == 3 + taps and len(a) == 1 and a.dtype is b.dtype:  # one product of a matrix and a vector
            return torch.mv(a[0].flatten(1), b.expand(1, 1, *a.shape[2:]).flatten())[None]
        return (a * b).flatten(-1 - taps).sum(-1)

    @cached_property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        """Mean and metric as they are numbered."""
        return self.mean.view(-1), self.metric.view(-1)

    def _matrix(self, weight: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """The weights as one matrix (out, fan_in), mean and metric of its columns: 5 times as fast as by axes."""
        layer, mean, metric = self.layer, self.mean, self.metric
        if weight.dim() == 2:
            return weight, *self._vectors
        if weight.dim() > 3 + layer.taps or len(weight) > 1 or layer.transposed:  # several vectors, or groups
            return None, mean, metric
        if layer.taps and mean.numel() < layer.fan_in:
            mean, metric = mean.expand(1, 1, *weight.shape[2:]), metric.expand(1, 1, *weight.shape[2:])
        if not weight.is_contiguous():
            weight, mean, metric = (t.movedim(2, -1) for t in (weight, mean, metric))  # channels last
            if not weight.is_contiguous():
                return None, self.mean, self.metric
        return weight.view(-1, layer.fan_in), mean.reshape(-1), metric.reshape(-1)

    def _row(self, bias: Tensor) -> Tensor:
        """A number per row, shaped to multiply weights."""
        for _ in range(1 + self.layer.taps):
            bias = bias.unsqueeze(-1)
        return bias

    def _unscaled(self, weight: Tensor) -> Tensor:
        """Weights times q sigma~; those that rest have no coordinate."""
        return torch.where(self.metric > 0, weight * self.metric.rsqrt(), 0.0)


class WithBias(_Whitening):
    """P = (1/q) U D, U = [[1, -mu^T], [0, I]], D = diag(1, 1/sigma~)."""

    on_matrix = True

    def factor(self, rows: Rows) -> Rows:
        """Weights z / sigma~, bias minus what they carry of the mean."""
        assert rows.bias is not None
        weight = rows.weight * self.metric.sqrt()
        return Rows(weight, rows.bias / self.q - self._inner(weight, self.mean))

    def factor_transpose(self, rows: Rows) -> Rows:
        """Weights (v - v_b mu) / sigma~."""
        assert rows.bias is not None
        weight = (rows.weight - self._row(rows.bias) * self.mean) * self.metric.sqrt()
        return Rows(weight, rows.bias / self.q)

    def inverse(self, rows: Rows) -> Rows:
        """Weights q sigma~ w, bias q (b + w mu): those of the normalized input."""
        assert rows.bias is not None
        carried = self._inner(rows.weight, self.mean * (self.metric > 0))
        return Rows(self._unscaled(rows.weight), self.q * (rows.bias + carried))

    def squares(self, theta: Rows, gradient: Rows) -> Squares:
        """|z|^2 and |P^T g|^2, by products of matrices and vectors where they can be."""
        matrix, mean, metric = self._matrix(theta.weight)
        if matrix is None or matrix.dtype is not mean.dtype:
            return super().squares(theta, gradient)
        assert theta.bias is not None and gradient.bias is not None
        inverse = metric.reciprocal()
        if self.rests:
            mean, inverse = mean * (metric > 0), inverse.masked_fill_(metric == 0, 0.0)
        size = _size(matrix, theta.bias.view(-1), mean, inverse, self.q)[None]
        matrix, mean, metric = self._matrix(gradient.weight)
        if matrix is None:
            return Squares(size, square_of(self.factor_transpose(gradient)), self.q)
        bias = gradient.bias.view(-1)
        slope = _slope(torch.addr(matrix, bias, mean, alpha=-1).square_(), bias, metric, self.q)
        return Squares(size, slope[None], self.q)

    def apply(self, rows: Rows) -> Rows:
        """The update as the class docstring of BNP gives it."""
        assert rows.bias is not None
        weight = (rows.weight - self._row(rows.bias) * self.mean) * self.metric
        return Rows(weight, rows.bias / self.q**2 - self._inner(weight, self.mean))

    def apply_(self, rows: Rows, found: Tensor | None = None) -> None:
        """The same, without a copy of the gradient where it has the statistics' precision."""
        weight, bias = rows
        assert bias is not None
        if weight.dtype is not self.mean.dtype:
            return super().apply_(rows if weight.dim() > 2 else self.layer.rows(weight, bias))
        matrix, mean, metric = self._matrix(weight)
        if matrix is not None:
            bias = bias.view(-1)
            matrix.addr_(bias, mean, alpha=-1).mul_(metric)
            bias.addmv_(matrix, mean, beta=1 / self.q**2, alpha=-1)
            return
        weight.addcmul_(self._row(bias), self.mean, value=-1).mul_(self.metric)
        if self.q > 1:
            bias.div_(self.q**2)
        bias.sub_(self._inner(weight, self.mean))


class WithoutBias(_Whitening):
    """P = (1/q) S^-1/2 (I - c v v^T), v = S^-1/2 mu, chosen so that P P^T = (S + mu mu^T)^-1 / q^2."""

    def _direction(self) -> tuple[Tensor, Tensor]:
        """V and sqrt(1 + |v|^2), (groups,)."""
        v = self.mean * (self.metric.sqrt() * self.q)
        tied = self.layer.fan_in // (v[0].numel() or 1)  # taps that share a number
        return v, (1 + tied * v.square().flatten(1).sum(1)).sqrt()

    def _deflate(self, weight: Tensor) -> Tensor:
        """(I - c v v^T) w with c = (1 - 1/sqrt(1 + |v|^2)) / |v|^2, written without 0/0 at v = 0."""
        v, root = self._direction()
        c = 1 / (root * (1 + root))
        return weight - self._row(c[:, None] * self._inner(weight, v)) * v

    def factor(self, rows: Rows) -> Rows:
        """Deflated, then divided by the deviations."""
        return Rows(self._deflate(rows.weight) * self.metric.sqrt(), rows.bias)

    def factor_transpose(self, rows: Rows) -> Rows:
        """Divided by the deviations, then deflated."""
        return Rows(self._deflate(rows.weight * self.metric.sqrt()), rows.bias)

    def inverse(self, rows: Rows) -> Rows:
        """Times the deviations, then with its part along v stretched back: 1 / (1 - c |v|^2) = sqrt(1 + |v|^2)."""
        weight = self._unscaled(rows.weight)
        v, root = self._direction()
        return Rows(weight + self._row((1 / (1 + root))[:, None] * self._inner(weight, v)) * v, rows.bias)

    def apply_(self, rows: Rows, found: Tensor | None = None) -> None:
        """(S + mu mu^T)^-1 g / q^2 in place: divided by the variances, less its part along S^-1 mu."""
        weight = rows.weight
        if weight.dtype is not self.mean.dtype:
            return super().apply_(rows)
        _v, root = self._direction()
        u = self.mean * self.metric  # S^-1 mu / q^2
        weight.mul_(self.metric)
        inner = self._inner(weight, self.mean)
        weight.addcmul_(self._row(inner * (self.q / root).square()[:, None]), u, value=-1)


def _size(weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, q: float) -> Tensor:
    """|z|^2 of rows [bias, weight], (out,); `inverse` is of the metric."""
    return torch.addmv(bias, weight, mean).square_().addmv_(weight.square(), inverse, beta=q**2)


def _slope(squares: Tensor, bias: Tensor, metric: Tensor, q: float) -> Tensor:
    """|P^T g|^2 of rows [bias, weight], (out,), given the weights' (g - g_b mu)^2."""
    return torch.mv(squares, metric).addcmul_(bias, bias, value=1 / q**2)
