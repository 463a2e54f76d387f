"""M = P P^T over all trainable parameters of a model, as one operator on flat vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.conditioner import Conditioner, RowMap, compose, map_
from gradcond.layers import Layer, find_layers
from gradcond.shards import shown
from gradcond.states import as_trained, check_states

__all__ = ["Preconditioner", "load_preconditioner"]


class Preconditioner:
    r"""The M = P P^T that a step used, over `model.parameters()` that require grad, flattened in order.

    It is block-diagonal over the layers and their output units, the identity on what no conditioner touches,
    and a snapshot: later steps do not change it.

    Args:
        model: whose parameters are meant.
        blocks: for each conditioned layer, its P and whether its biases are a part of it.

    Attributes:
        shape: (n, n).
    """

    def __init__(self, model: nn.Module, blocks: list[tuple[Layer, RowMap, bool]]) -> None:
        self.places: dict[int, tuple[int, torch.Size]] = {}
        n = 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                self.places[id(parameter)] = (n, parameter.shape)
                n += parameter.numel()
        self.shape = (n, n)
        self.blocks = []
        for layer, row_map, has_bias in blocks:
            biases = [self.places[id(p)] for p in layer.biases if has_bias and id(p) in self.places]
            weights = [self.places[id(p)] for p in layer.weights if id(p) in self.places]
            if len(weights) < len(layer.weights) or bool(biases) != has_bias:
                raise ValueError(
                    f"layer {layer.name!r} was conditioned while it was trained, and is frozen now; expected "
                    "its parameters to require grad as they did"
                )
            self.blocks.append((layer, row_map, weights, biases))

    def factor(self, z: Tensor) -> Tensor:
        """P z for a vector (n,) or vectors (n, k), in z's dtype."""
        return self._blockwise("factor", z)

    def factor_transpose(self, v: Tensor) -> Tensor:
        """P^T v for a vector (n,) or vectors (n, k), in v's dtype."""
        return self._blockwise("factor_transpose", v)

    def apply(self, g: Tensor) -> Tensor:
        """M g = P P^T g for a vector (n,) or vectors (n, k), in g's dtype."""
        return self._blockwise("apply", g)

    def __matmul__(self, g: Tensor) -> Tensor:
        """M @ g."""
        return self.apply(g)

    def _blockwise(self, method: str, v: Tensor) -> Tensor:
        n = self.shape[0]
        if v.dim() not in (1, 2) or v.shape[0] != n:
            raise ValueError(
                f"expected a vector ({n},) or vectors ({n}, k) over all trainable parameters, got "
                f"{tuple(v.shape)}; flatten and concatenate in the order of model.parameters()"
            )
        result = v.mT.clone(memory_format=torch.contiguous_format) if v.dim() == 2 else v.clone()

        def view(place: tuple[int, torch.Size]) -> Tensor:
            start, shape = place
            return result[..., start : start + math.prod(shape)].unflatten(-1, shape)

        with torch.no_grad():
            for layer, row_map, weights, biases in self.blocks:
                map_(method, layer, row_map, [view(w) for w in weights], [view(b) for b in biases])
        return result.mT if v.dim() == 2 else result


def load_preconditioner(model: nn.Module, state: Mapping[str, Any]) -> Preconditioner:
    """The preconditioner of a checkpoint, from the state that a wrapped optimizer saved.

    Args:
        model: of the same architecture, its weights loaded (weight standardization's M depends on them).
        state: `optimizer.state_dict()` as saved, or its "gradcond" entry alone.

    Returns:
        What `optimizer.preconditioner()` returned when the state was saved.

    Raises:
        ValueError: when the state holds no "gradcond" entry, an unknown conditioner or a layer that the model
            does not have.

    Example:
        >>> import gradcond
        >>> model = nn.Linear(2, 1)
        >>> opt = gradcond.wrap(torch.optim.SGD(model.parameters()), model, [gradcond.GradientCentralization()])
        >>> load_preconditioner(model, opt.state_dict()).apply(torch.tensor([1.0, 3.0, 5.0]))
        tensor([-1.,  1.,  5.])
    """
    state = state.get("gradcond", state)
    if not isinstance(state, Mapping) or not {"chain", "layers"} <= state.keys():
        got = f"the keys {sorted(map(str, state))[:6]}" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"expected the state of an optimizer made by gradcond.wrap, with an entry 'gradcond', got {got}; "
            "save optimizer.state_dict() of the wrapped optimizer"
        )
    layers = find_layers(model)
    chain = []
    for entry in state["chain"]:
        if entry["name"] not in Conditioner.registry:
            raise ValueError(
                f"unknown conditioner {entry['name']!r}; known are {sorted(Conditioner.registry)}. Import the "
                "module that defines it first"
            )
        chain.append(Conditioner.registry[entry["name"]](**entry["settings"]))
    check_states(layers, chain, state)
    blocks = []
    for name, has_bias in state["layers"].items():
        states = [entry["layers"].get(name) for entry in state["chain"]]
        layer = shown(layers[name])
        maps = [
            None if state is None else c.row_map(layer, as_trained(state, has_bias))
            for c, state in zip(chain, states, strict=True)
        ]
        row_map = compose(maps)
        if row_map is not None:
            blocks.append((layers[name], row_map, has_bias))
    return Preconditioner(model, blocks)
