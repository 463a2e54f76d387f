"""Which entries of the flat vector of all parameters belong to which layer, and to which of its output units."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradcond.layers import Layer, find_layers


@dataclass(frozen=True)
class LayerBlock:
    """A layer's place in the flat vector of the parameters that require grad."""

    name: str
    kind: str  # the type of the module
    index: Tensor  # (parameters,) ascending
    units: list[Tensor] = field(default_factory=list)  # of each output unit, its row's weights and biases
    layer: Layer | None = None


def find_blocks(model: nn.Module) -> list[LayerBlock]:
    """Return a block for each layer, and for each module whose own parameters are in none of them.

    Together the blocks hold every parameter that requires grad once. Those without rows (normalization layers,
    weights that several modules share) have no units.
    """
    places: dict[int, Tensor] = {}
    n = 0
    for p in model.parameters():
        if p.requires_grad:
            places[id(p)] = torch.arange(n, n + p.numel()).view(p.shape)
            n += p.numel()
    blocks = [_of_layer(layer, places) for layer in find_layers(model).values()]
    blocks = [block for block in blocks if len(block.index)]
    free = torch.ones(n, dtype=torch.bool)
    for block in blocks:
        free[block.index] = False
    for name, module in model.named_modules():
        own = [places[id(p)].flatten() for p in module.parameters(recurse=False) if id(p) in places]
        index = torch.cat(own).sort().values if own else torch.zeros(0, dtype=torch.long)
        index = index[free[index]]
        if len(index):
            blocks.append(LayerBlock(name, type(module).__name__, index))
            free[index] = False
    return sorted(blocks, key=lambda block: int(block.index.min()))


def _of_layer(layer: Layer, places: dict[int, Tensor]) -> LayerBlock:
    axis = -2 - layer.taps
    weights = [places[id(p)] for p in layer.weights if id(p) in places]
    biases = [layer.part(places[id(p)], -1) for p in layer.biases if id(p) in places]
    parts = [*(layer.part(w, axis) for w in weights), *biases]
    index = torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0, dtype=torch.long)
    units: list[Tensor] = []
    if len(weights) == len(layer.weights):
        rows = layer.rows(layer.join(weights), None).weight.flatten(2).flatten(0, 1)
        units = list(torch.cat([rows, *(b[:, None] for b in biases)], 1))
    return LayerBlock(layer.name, type(layer.module).__name__, index.sort().values, units, layer)
