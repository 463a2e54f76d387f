"""Which conditioners of an optimizer's chain take which layers of its model, and why they leave the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from gradcond.assignment import Assignment, Parameters, trained
from gradcond.conditioner import Conditioner
from gradcond.distributed import reshard
from gradcond.layers import Layer, find_layers
from gradcond.shards import is_sharded, rows_are_local, shown

__all__ = ["Plan"]


class Plan:
    """Asks the conditioners about the layers, once, and again where their settings or the parameters have changed.

    Args:
        model: whose layers they are.
        chain: conditioners, outermost first.
        only: takes a layer's name and says whether it is conditioned.

    Attributes:
        layers: of the model, by name.
        refusals: by layer, for each conditioner why it leaves the layer alone, or None.
        members: by layer, the places in the chain of those that take it.
        parameters: those with which the layers were looked at last; the same object as long as nothing changes.
        found: the assignments that belong to them; None until somebody asks.
    """

    def __init__(
        self, model: nn.Module, chain: Sequence[Conditioner], only: Callable[[str], bool] | None = None
    ) -> None:
        self.model, self.chain, self.only = model, chain, only
        self.layers = find_layers(model)
        self.places = [place for layer in self.layers.values() for place in layer.places.values()]
        self.parameters: Parameters | None = None
        self.ask()

    def ask(self) -> None:
        """Asks every conditioner about every layer."""
        self.refusals = {
            name: [self._refusal(conditioner, name, layer) for conditioner in self.chain]
            for name, layer in self.layers.items()
        }
        self.members = {
            name: tuple(i for i, reason in enumerate(reasons) if reason is None)
            for name, reasons in self.refusals.items()
        }
        self.found: list[Assignment] | None = None

    def _refusal(self, conditioner: Conditioner, name: str, layer: Layer) -> str | None:
        if self.only is not None and not self.only(name):
            return "left out by only="
        return conditioner.refusal(shown(layer))

    def assignments(self, groups: Sequence[Mapping[str, Any]]) -> list[Assignment]:
        """The layers that these groups train and a conditioner takes; the same list as long as nothing changes."""
        now = Parameters(self.places, groups)
        if not now.same(self.parameters) and any(is_sharded(p) for p in now.held):
            reshard(self.model)
            now = Parameters(self.places, groups)
        if not now.same(self.parameters):
            self.parameters, self.found = now, None
        if self.found is None:
            held = {id(p) for p in now.held}
            found = [self._assignment(name, layer, held) for name, layer in self.layers.items()]
            self.found = [a for a in found if a is not None]
        return self.found

    def _assignment(self, name: str, layer: Layer, held: set[int]) -> Assignment | None:
        members, weights = self.members[name], tuple(layer.weights)
        if not (members and all(trained(weight, held) for weight in weights)):
            return None
        biases = tuple(bias for bias in layer.biases if trained(bias, held))
        row_wise = all(self.chain[i].row_wise for i in members)
        return Assignment(
            layer,
            weights,
            biases,
            members,
            sharded=any(is_sharded(p) for p in layer.parameters()),
            whole=not (rows_are_local(layer) and row_wise),
            moves_bias=any(self.chain[i].acts_on_bias for i in members),
        )
