"""What conditioners keep of each layer moves by one step, and gives the step's P."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gradcond.assignment import Assignment
from gradcond.capture import InputCapture
from gradcond.conditioner import Conditioner, RowMap, compose, joined
from gradcond.layers import Layer, Rows
from gradcond.shards import gathered, local, local_state, moving, shown
from gradcond.states import State
from gradcond.statistics import Moments

__all__ = ["Maps", "rate_of"]


class Maps:
    """Each layer's P in one step: made of the states after they have taken in the step's rows, and kept for it.

    Args:
        chain: conditioners, outermost first.
        states: of each conditioner, by layer; changed in place.
        captures: by layer, those that see its inputs.
        warned: layers whose inputs were missing, which are told of once.

    Attributes:
        taken: the maps of the step so far, by layer.
        lasting: maps that are the same at every step, by layer.
        scratch: what each conditioner keeps between the steps, and can do without.
    """

    def __init__(
        self,
        chain: Sequence[Conditioner],
        states: list[State],
        captures: Mapping[str, InputCapture],
        warned: set[str],
    ) -> None:
        self.chain, self.states, self.captures, self.warned = chain, states, captures, warned
        self.fixed = all(conditioner.fixed for conditioner in chain)
        self.lasting: dict[str, RowMap | None] = {}
        self.scratch: list[dict[str, Any]] = [{} for _ in chain]
        self.uses_rate = any(conditioner.uses_rate for conditioner in chain)

    def begin(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """A new step of these parameter groups.

        Raises:
            ValueError: for a momentum that has no size of the step.
        """
        if self.uses_rate:
            for group in groups:
                if group.get("gradcond", True):
                    rate_of(group)
        self.groups = groups
        self.taken: dict[str, RowMap | None] = {}
        self.unseen: set[str] = set()

    def forget(self) -> None:
        """Settings, layers or states have been changed: no map lasts."""
        self.lasting.clear()

    def fold(self, assignments: Sequence[Assignment], moments: Mapping[str, Moments | None]) -> None:
        """Folds one step's moments into the states of these layers."""
        for i, (conditioner, states) in enumerate(zip(self.chain, self.states, strict=True)):
            due = []
            for assignment in assignments:
                if i not in assignment.members:
                    continue
                name, seen = assignment.layer.name, None
                capture = self.captures.get(name) if conditioner.uses_inputs else None
                if capture is not None and capture.active and conditioner.is_due(states.get(name, {})):
                    seen = moments.get(name)
                    if seen is None:
                        self._warn_missing(assignment, conditioner)
                        self.unseen.add(name)
                        continue
                if name not in states:
                    states[name] = {}
                    with moving(assignment.layer, whole=True) as view:
                        conditioner.enter_(view, states[name])
                state = states[name]
                if capture is not None:
                    state["has_bias"] = bool(assignment.biases)
                if capture is None or seen is None:
                    conditioner.wait(state)
                    continue
                if capture.feeds_batch_norm or "feeds_batch_norm" not in state:
                    state["feeds_batch_norm"] = capture.feeds_batch_norm
                due.append((state, seen))
            if due:
                conditioner.update_all([state for state, _ in due], [m for _, m in due], self.scratch[i])

    def take(self, assignment: Assignment) -> RowMap | None:
        """The step's P of a layer: the same for all gradients that a closure computes in it."""
        name = assignment.layer.name
        if name not in self.taken:
            self.taken[name] = self._next(assignment)
        return self.taken[name]

    def taken_or_last(self, assignment: Assignment) -> RowMap | None:
        """The step's P, or the one of the states as they are, which no gradient moves."""
        name = assignment.layer.name
        return self.taken[name] if name in self.taken else self._next(assignment, moved=True)

    def _next(self, assignment: Assignment, *, moved: bool = False) -> RowMap | None:
        """The P of a layer; has its gradient `moved` the states already?"""
        if self.fixed and assignment.layer.name in self.lasting:
            return self.lasting[assignment.layer.name]
        layer, whole = assignment.layer, assignment.whole
        maps: list[RowMap | None] = []
        for i in assignment.members:
            conditioner, state = self.chain[i], self.states[i].get(layer.name)
            if state is None or (conditioner.uses_inputs and layer.name in self.unseen):
                continue
            view = shown(layer, whole=whole) if assignment.sharded else layer
            if view.units == 0:
                continue
            if conditioner.uses_rate and not moved:
                chain = compose(maps)
                theta, gradient = _theta_and_gradient(view, assignment, chain)
                group = next(g for g in self.groups if any(p is assignment.weights[0] for p in g["params"]))
                conditioner.update_rate(state, chain, theta, gradient, rate_of(group))
            if assignment.sharded and not whole:
                state = local_state(layer, state)
            maps.append(conditioner.row_map(view, state))
        row_map = compose(maps)
        if self.fixed:
            self.lasting[layer.name] = row_map
        return row_map

    def _warn_missing(self, assignment: Assignment, conditioner: Conditioner) -> None:
        layer = assignment.layer
        if layer.name not in self.warned and bool(local(assignment.weights[0].grad).any()):
            self.warned.add(layer.name)
            warnings.warn(
                f"layer {layer.name!r} has a gradient, but none of its inputs were seen: expected its forward "
                f"pass in training mode, through the module's call. {conditioner.name} leaves its gradient as it "
                "is; of a module that is called in a way of its own, register_layer shows the input",
                stacklevel=2,
            )


def rate_of(group: Mapping[str, Any]) -> Any:
    """The size of the optimizer's step for a gradient of one that stays.

    Raises:
        ValueError: where momentum adds it up without end.
    """
    momentum = group.get("momentum", 0.0)
    if momentum >= 1:
        raise ValueError(
            f"expected momentum below 1 beside a conditioner that goes by the size of the steps, got {momentum}: a "
            "gradient that stays would be added up without end"
        )
    taken_in = 1 - group.get("dampening", 0.0) if momentum else 1.0
    return group["lr"] * taken_in / (1 - momentum)


def _theta_and_gradient(layer: Layer, assignment: Assignment, chain: RowMap | None) -> tuple[Rows, Rows]:
    """A layer's parameters and their gradient, whole."""
    own: Sequence[Any] = assignment.parameters
    if assignment.matrix and len(own) == 2 and chain is not None and chain.on_matrix:
        return Rows(*own), Rows(*(p.grad for p in own))
    n, grads = len(assignment.weights), [p.grad for p in own]
    if assignment.sharded:
        own, grads = ([gathered(t) for t in tensors] for tensors in (own, grads))
    k = max(len(grads) - n, 1)
    shares = (1, k) if chain is not None and chain.joins_biases else (k**0.5, k**0.5)
    theta, gradient = (joined(layer, t[:n], t[n:], share) for t, share in zip((own, grads), shares, strict=True))
    return theta, gradient
