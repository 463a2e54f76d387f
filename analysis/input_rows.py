"""The rows that a layer's weight is multiplied by in one call, written out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from gradcond.layers import Layer
from gradcond.recurrent import one_depth

RECURRENT = re.compile(r"weight_(?P<part>ih|hh)_l(?P<depth>\d+)(?P<reverse>_reverse)?")


def input_rows(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Tensor]:
    """Return for each group (rows, fan_in), or (rows,) indices where the rows are one-hot.

    Convolutions: a row is what the kernel meets at one position, padding included. Recurrent layers: it is
    [x_t, h_{t-1}] (or the half that the weight meets), one for each step of each sequence; those of padding are
    none. Nothing where the input cannot be seen, or was empty, or is one-hot beside a bias.
    """
    places = [place for name in layer.weight_names if (place := RECURRENT.fullmatch(name))]
    if isinstance(layer.module, nn.RNNBase) and places:
        return _recurrent(layer.module, places, *args, **kwargs)
    x = layer.observe(layer.module, args, kwargs, output)
    if not isinstance(x, Tensor) or x.numel() == 0 or (layer.taps and not layer.convolution):
        return []
    if layer.one_hot:
        return [] if layer.bias_names else [x.flatten()]
    return _unfolded(layer, x) if layer.taps else [x.reshape(-1, layer.inputs)]


def _unfolded(layer: Layer, x: Tensor) -> list[Tensor]:
    """The unfolded input of a convolution: the convolution with the identity."""
    module, taps = layer.module, layer.taps
    weight = torch.eye(layer.fan_in, dtype=x.dtype, device=x.device).view(layer.fan_in, -1, *layer.kernel)
    if layer.transposed:
        weight = weight.transpose(0, 1).repeat(layer.groups, *[1] * (taps + 1))
        geometry = module.stride, module.padding, module.output_padding, layer.groups, module.dilation
        unfolded = getattr(functional, f"conv_transpose{taps}d")(x, weight, None, *geometry)
    else:
        unfolded = module._conv_forward(x, weight.repeat(layer.groups, *[1] * (taps + 1)), None)
    unfolded = unfolded.movedim(-1 - taps, -1).reshape(-1, layer.groups, layer.fan_in)
    return list(unfolded.unbind(1))


def _recurrent(module: nn.RNNBase, places: Sequence[re.Match[str]], input: Any, hx: Any = None) -> list[Tensor]:
    """The steps at one depth; all up to it are computed once more, as the module keeps their states to itself."""
    depth, direction = int(places[0]["depth"]), int(bool(places[0]["reverse"]))
    if depth and module.training and module.dropout:
        return []  # what was dropped between the depths is not known
    y, met, begin = input, input, None
    directions = 2 if module.bidirectional else 1
    for at in range(depth + 1):
        if hx is not None:
            states = hx if isinstance(hx, tuple) else (hx,)
            begin = [state[at * directions : (at + 1) * directions] for state in states]
        met, (y, _) = y, one_depth(module, at, y, begin, isinstance(hx, tuple))
    x, there = _by_time(module, met)
    h = _by_time(module, y)[0].chunk(directions, -1)[direction]
    first = None if begin is None else begin[0][direction]
    halves = {"ih": x, "hh": _states_before(h, first, there, bool(direction))}
    rows = torch.cat([halves[place["part"]] for place in places], -1)[there]
    return [rows] if len(rows) else []


def _by_time(module: nn.RNNBase, x: Any) -> tuple[Tensor, Tensor]:
    """A sequence as (steps, batch, features), and which of these steps there are."""
    if isinstance(x, PackedSequence):
        x, lengths = pad_packed_sequence(x)
        return x, (torch.arange(len(x))[:, None] < lengths).to(x.device)
    if x.dim() == 2:
        x = x[:, None]
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def _states_before(h: Tensor, first: Tensor | None, there: Tensor, backward: bool) -> Tensor:
    """The states h_{t-1} from the states h_t; h_{t+1} where the direction is backward."""
    start = h.new_zeros(h.shape[1:]) if first is None else first.reshape(h.shape[1:])
    if not backward:
        return torch.cat([start[None], h[:-1]])
    before = torch.cat([h[1:], torch.zeros_like(h[:1])])
    before[there.sum(0) - 1, torch.arange(h.shape[1])] = start
    return before
