"""nn.RNN, nn.LSTM and nn.GRU: layers on [x_t, h_{t-1}], whose rows are all steps of all sequences."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradcond.inputs import samples_of
from gradcond.layers import Layer, register_layer
from gradcond.moments import channel_moments
from gradcond.statistics import Moments

__all__: list[str] = []


def _layers(module: nn.RNNBase) -> list[Layer]:
    states = _States(module)
    layers = []
    for depth in range(module.num_layers):
        for direction in range(2 if module.bidirectional else 1):
            suffix = f"l{depth}" + ("_reverse" if direction else "")
            x, h = states.input(depth), states.hidden(depth, direction)
            weights, biases = ([f"{kind}_{part}_{suffix}" for part in ("ih", "hh")] for kind in ("weight", "bias"))
            joint = states.joint(depth, direction)
            if not isinstance(module, nn.GRU):
                layers.append(Layer(suffix, module, weight=weights, bias=biases, observe=joint))
                continue
            # n = tanh(W_in x + b_in + r (W_hn h + b_hn)): r stands between the two biases
            n = module.hidden_size
            layers += [
                Layer(f"{suffix}.gates", module, weight=weights, bias=biases, observe=joint, span=(0, 2 * n)),
                Layer(f"{suffix}.new_x", module, weight=weights[0], bias=biases[0], observe=x, span=(2 * n, 3 * n)),
                Layer(f"{suffix}.new_h", module, weight=weights[1], bias=biases[1], observe=h, span=(2 * n, 3 * n)),
            ]
    return layers


for _kind in (nn.RNN, nn.LSTM, nn.GRU):
    register_layer(_kind, _layers)

Observe = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Moments | None]


class _States:
    """The moments of what each depth and direction of a recurrent module is applied to.

    Only the last depth's states are in the output: those before are computed once more, without grad, one depth
    at a time. Dropout between the depths enters by its mean and variance, not by the mask that was drawn.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        self.directions = 2 if module.bidirectional else 1
        self.last: tuple[Callable[[], Tensor | None], list[_Depth]] = (lambda: None, [])

    def input(self, depth: int) -> Observe:
        """Observes x_t."""
        return self._observe(depth, lambda at: at.input())

    def hidden(self, depth: int, direction: int) -> Observe:
        """Observes h_{t-1}."""
        return self._observe(depth, lambda at: at.hidden(direction))

    def joint(self, depth: int, direction: int) -> Observe:
        """Observes [x_t, h_{t-1}]."""

        def both(at: _Depth) -> Moments:
            x, h = at.input(), at.hidden(direction)
            return replace(x, mean=torch.cat([x.mean, h.mean]), variance=torch.cat([x.variance, h.variance]))

        return self._observe(depth, both)

    def _observe(self, depth: int, moments: Callable[[_Depth], Moments]) -> Observe:
        """Takes the moments at a depth of one call; None when it has no rows."""

        def observe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Moments | None:
            called_as_usual = isinstance(output, tuple) and (args or "input" in kwargs)  # as a subclass may not be
            if not called_as_usual or _data(output[0]).numel() == 0:
                return None
            return moments(self._depths(module, args, kwargs, output)[depth])

        return observe

    def _depths(
        self, module: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[_Depth]:
        marker = _data(output[0])
        if torch.compiler.is_compiling():
            return self._unrolled(module, args, kwargs, output)
        if self.last[0]() is not marker:
            self.last = weakref.ref(marker), self._unrolled(module, args, kwargs, output)
        return self.last[1]

    def _unrolled(self, module: nn.RNNBase, args: Any, kwargs: Any, output: Any) -> list[_Depth]:
        x = args[0] if args else kwargs["input"]
        start = args[1] if len(args) > 1 else kwargs.get("hx")
        samples = _samples(module, x)
        depths = []
        for depth in range(module.num_layers):
            places = slice(depth * self.directions, (depth + 1) * self.directions)
            begin = None if start is None else [s[places] for s in _tuple(start)]
            if depth == module.num_layers - 1:
                y, end = output[0], _tuple(output[1])[0][places]
            else:
                y, states = one_depth(module, depth, x, begin, isinstance(start, tuple))
                end = _tuple(states)[0]
            dropout = module.dropout if depth > 0 else 0.0
            h0 = None if begin is None else begin[0]
            depths.append(_Depth(_data(x), dropout, _data(y), h0, end, samples))
            x = y
        return depths


class _Depth:
    """One depth of one call: its inputs x_t (steps in any order) and states h_t, all directions side by side."""

    def __init__(
        self, x: Tensor, dropout: float, y: Tensor, begin: Tensor | None, end: Tensor, samples: int
    ) -> None:
        self.count, self.samples = x.numel() // x.shape[-1], samples
        self.x = channel_moments(x, -1)
        if dropout > 0:  # zero with probability p, divided by 1 - p otherwise
            mean, variance = self.x
            self.x = mean, (variance + dropout * mean.square()) / (1 - dropout)
        self.y = channel_moments(y, -1)
        self.begin, self.end = begin, end.detach().double()

    def input(self) -> Moments:
        """Of x_t."""
        return Moments(self.count, self.samples, self.count, *self.x)

    def hidden(self, direction: int) -> Moments:
        """Of h_{t-1}: all states h_t, the last ones replaced by the first."""
        end = self.end[direction].reshape(-1, self.end.shape[-1])
        part = slice(direction * end.shape[1], (direction + 1) * end.shape[1])
        mean, variance = (moment[part].double() for moment in self.y)
        begin = torch.zeros_like(end) if self.begin is None else self.begin[direction].double().reshape(end.shape)
        first, last = begin - mean, end - mean
        shift = (first - last).sum(0) / self.count
        second = variance + (first.square() - last.square()).sum(0) / self.count
        dtype = self.y[0].dtype
        spread = (second - shift.square()).clamp_min(0)
        return Moments(self.count, self.samples, self.count, (mean + shift).to(dtype), spread.to(dtype))


def one_depth(module: nn.RNNBase, depth: int, x: Any, begin: Any, is_pair: bool) -> Any:
    """What one depth puts out, dropout apart."""
    one = copy.copy(module)
    per_depth = len(module._flat_weights) // module.num_layers
    one._flat_weights = module._flat_weights[depth * per_depth : (depth + 1) * per_depth]
    one.num_layers, one.dropout, one.input_size = 1, 0.0, _data(x).shape[-1]
    hx = None if begin is None else tuple(begin) if is_pair else begin[0]
    return type(module).forward(one, x, hx)  # not __call__: its hooks have had their turn


def _tuple(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def _data(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _samples(module: nn.RNNBase, x: Any) -> int:
    if isinstance(x, PackedSequence):
        return int(x.batch_sizes[0])
    return samples_of(module, x) if x.dim() == 3 else 1
