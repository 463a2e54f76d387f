"""The bookkeeping behind a conditioned optimizer: which layer gets what, its state, and one step's conditioning."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.assignment import Assignment, held_parameters, trained
from gradcond.capture import BatchNormProbe, InputCapture
from gradcond.clipping import Lengths
from gradcond.conditioner import Conditioner, RowMap, compose, joined, map_
from gradcond.distributed import Ranks, reshard
from gradcond.inputs import Observer
from gradcond.layers import Layer, find_layers, has_lazy
from gradcond.preconditioner import Preconditioner, check_states
from gradcond.shards import local, local_state, moving, opened, rows_are_local, shown
from gradcond.statistics import Moments

__all__ = ["Engine"]

_KEPT = (
    "model",
    "ranks",
    "chain",
    "only",
    "check_finite",
    "states",
    "network",
    "warned",
)  # by copies; the rest is found again
State = dict[str, dict[str, Any]]  # of one conditioner: layer name -> its tensors and numbers


class Engine:
    """Conditions the gradients of a model's layers; every attribute that changes lives here.

    Args:
        model: whose layers are conditioned.
        chain: conditioners, outermost first.
        only: takes a layer's name and says whether it is conditioned.
        ranks: the processes whose rows make the gradient; by default all.
        check_finite: are gradients and inputs looked at before they are used? None: on the CPU, where it does not
            make the host wait.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Sequence[Conditioner],
        *,
        only: Callable[[str], bool] | None = None,
        ranks: Ranks | None = None,
        check_finite: bool | None = None,
    ) -> None:
        self.model = model
        self.ranks = Ranks() if ranks is None else ranks
        self.only = only
        self.check_finite = check_finite
        self.chain = list(chain)
        self.states: list[State] = [{} for _ in chain]
        self.network: list[dict[str, Any]] = [{} for _ in chain]  # what a conditioner keeps of all layers together
        self.warned: set[str] = set()
        self._attach()

    def _attach(self) -> None:
        """Finds the layers and hooks those whose inputs are needed."""
        self.layers = find_layers(self.model)
        self.lazy = has_lazy(self.model)
        self._ask_refusals()
        users = [c for c in self.chain if c.uses_inputs]
        self.observer = Observer(any(c.taps for c in users), users[0].ghost if users else None)
        self.captures = {name: InputCapture(layer, self.observer) for name, layer in self.layers.items() if users}
        self.probe = BatchNormProbe(self.captures.values(), self.model)
        self.conditioned: dict[str, tuple[weakref.ref[Tensor], int, int]] = {}
        self.loaded = False  # has a state been loaded since the last step?
        self.detach = weakref.finalize(self, _remove, [*self.captures.values(), self.probe])
        self._ask_due()

    def _ask_refusals(self) -> None:
        self.refusals = {
            name: [self._refusal(conditioner, name, layer) for conditioner in self.chain]
            for name, layer in self.layers.items()
        }

    def _refusal(self, conditioner: Conditioner, name: str, layer: Layer) -> str | None:
        if self.only is not None and not self.only(name):
            return "left out by only="
        return conditioner.refusal(shown(layer))

    def _ask_due(self) -> None:
        """Which inputs does the coming step need, and which of their rows?"""
        for name, capture in self.captures.items():
            states = zip(self.chain, self.states, self.refusals[name], strict=True)
            capture.active = any(why is None and c.is_due(state.get(name, {})) for c, state, why in states)
        self.observer.seen.clear()
        if self.observer.ghost is not None:
            steps = [entry.get("steps", 0) for state in self.states for entry in state.values()]
            self.observer.seed = 65537 * max(steps, default=0)

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def assignments(self, groups: Iterable[Mapping[str, Any]]) -> list[Assignment]:
        """The layers that these parameter groups train and at least one conditioner takes."""
        reshard(self.model)
        held = held_parameters(groups)
        found = []
        for name, layer in self.layers.items():
            members = tuple(i for i, reason in enumerate(self.refusals[name]) if reason is None)
            weights = tuple(layer.weights)
            if members and all(trained(weight, held) for weight in weights):
                biases = tuple(bias for bias in layer.biases if trained(bias, held))
                found.append(Assignment(layer, weights, biases, members))
        return found

    # a compiled step runs these as they are: traced, every new norm and step count would compile them again
    @torch.compiler.disable
    def begin(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """A new step, over these parameter groups: its first gradients decide its P."""
        if self.lazy and not has_lazy(self.model):  # the first forward pass has given them their shapes
            self.detach()
            self._attach()
        if not any(self.states):  # the first step: weights may have been set since wrap
            self._ask_refusals()
        self.groups = groups
        self.assigned = self.assignments(groups)
        self.frozen: dict[str, RowMap | None] = {}
        self.idle = True

    @torch.compiler.disable
    def condition_(self) -> None:
        """Replaces each layer's gradient g by M g, in place, once per gradient.

        Raises:
            ValueError: for a gradient or an input that is not finite; nothing has been changed then.
        """
        if not self.chain:
            return
        ready = [a.with_gradients() for a in self.assigned if self._is_fresh(a)]
        moments = self._merged({name: capture.take() for name, capture in self.captures.items()})
        if self.idle or not (ready or self.chain[-1].comes_last):
            return
        with torch.no_grad():
            first = not self.frozen
            lengths = Lengths() if self.chain[-1].comes_last else None
            for assignment in ready:
                name = assignment.layer.name
                if name not in self.frozen:  # a closure's later evaluations keep the step's P
                    self.frozen[name] = self._next_map(assignment, moments.get(name))
                grads = [p.grad for p in assignment.parameters]
                before = [local(grad).clone() for grad in grads] if lengths is not None else []
                row_map = self.frozen[name]
                if row_map is not None:
                    self._map_("apply", row_map, assignment, grads)
                if lengths is not None:
                    lengths.add(before, grads)
            if lengths is not None:
                lengths.clip_(self.chain[-1], self.network[-1], self.groups, fold=first)
        for assignment in ready:  # several layers may share a gradient
            grad: Tensor = assignment.weights[0].grad  # type: ignore[assignment]
            self.conditioned[assignment.layer.name] = weakref.ref(grad), grad._version, local(grad)._version

    def give_factor(self, optimizer: Any) -> None:
        """Lets an optimizer that draws noise (SGLD) draw it through P."""
        if hasattr(optimizer, "factor_") and self.chain:
            optimizer.factor_ = self.factor_

    @torch.no_grad()
    def factor_(self, noises: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Replaces the z of every (parameter, z) by P z, with the step's P, in place."""
        z = {id(parameter): noise for parameter, noise in noises}
        for assignment in self.assigned:
            row_map = self.frozen.get(assignment.layer.name)
            if row_map is not None:
                own = assignment.with_gradients()
                self._map_("factor", row_map, own, [z[id(p)] for p in own.parameters])

    def conditioning(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure whose gradients are conditioned after each evaluation."""

        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            bad = bool(self.chain) and isinstance(loss, Tensor) and not bool(loss.isfinite().all())
            if self.ranks.any(bad, device=self._device)[0]:
                raise ValueError(
                    f"expected a finite loss from the closure, got {loss}; parameters and statistics are as "
                    "before this evaluation. Lower the learning rate, or look at the data"
                )
            self.condition_()
            return loss

        return evaluate

    @torch.compiler.disable
    def finish_(self) -> None:
        """After the optimizer's step: weights go back to where their conditioners keep them."""
        if self.idle:
            return
        for i, conditioner in enumerate(self.chain):
            if type(conditioner).retract_ is Conditioner.retract_:
                continue
            for assignment in self.assigned:
                if i in assignment.members and assignment.layer.name in self.states[i]:
                    self._retract_(assignment, i)
        self.loaded = False
        if self.frozen:
            self.probe.remove()
        self._ask_due()

    def preconditioner(self, groups: Iterable[Mapping[str, Any]]) -> Preconditioner:
        """The M of the last step, or what the chain gives before the first one."""
        blocks = []
        for a in self.assignments(groups):
            states = {i: _copied(self.states[i].get(a.layer.name, {})) for i in a.members}
            row_map = compose([self.chain[i].row_map(shown(a.layer), state) for i, state in states.items()])
            if row_map is not None:
                blocks.append((a.layer, row_map, bool(a.biases)))
        return Preconditioner(self.model, blocks)

    def state_dict(self, groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Plain dictionaries of tensors, numbers and strings: `torch.load(weights_only=True)` reads them."""
        assigned = self.assignments(groups)
        chain = []
        for i, (conditioner, states) in enumerate(zip(self.chain, self.states, strict=True)):
            names = [a.layer.name for a in assigned if i in a.members]
            layers = {name: _copied(states.get(name, {})) for name in names}
            entry = {"name": conditioner.name, "settings": conditioner.settings(), "layers": layers}
            chain.append(entry | {"network": _copied(self.network[i])})
        return {"format": 1, "chain": chain, "layers": {a.layer.name: bool(a.biases) for a in assigned}}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, before anything is touched, for a state that is not of this chain and model."""
        if state.get("format") != 1:
            raise ValueError(
                f"expected a gradcond state of format 1, got {state.get('format')!r}; it was saved by another "
                "version of gradcond"
            )
        names, saved = [c.name for c in self.chain], [entry["name"] for entry in state["chain"]]
        if names != saved:
            raise ValueError(
                f"the saved state is of the chain {saved}, this optimizer has {names}; wrap the optimizer with "
                "the conditioners that the state was saved with, in their order"
            )
        check_states(self.layers, self.chain, state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned, the hyper-parameters included."""
        for conditioner, entry in zip(self.chain, state["chain"], strict=True):
            for key, value in entry["settings"].items():
                setattr(conditioner, key, value)
        self.states = [
            {
                name: _copied(saved, self.layers[name].weights[0].device)
                for name, saved in entry["layers"].items()
                if saved
            }
            for entry in state["chain"]
        ]
        self.network = [_copied(entry.get("network", {}), self._device) for entry in state["chain"]]
        self.loaded = True
        self._ask_due()

    def forget(self) -> None:
        """Starts all statistics anew."""
        self.states, self.network = [{} for _ in self.chain], [{} for _ in self.chain]
        self._ask_due()

    def _is_fresh(self, assignment: Assignment) -> bool:
        """Are there gradients that have not been conditioned yet? Sparse ones have no rows of a layer."""
        if any(weight.grad is None or weight.grad.is_sparse for weight in assignment.weights):
            return False
        grad: Tensor = assignment.weights[0].grad  # type: ignore[assignment]
        last, *versions = self.conditioned.get(assignment.layer.name, (lambda: None, 0, 0))
        return last() is not grad or versions != [grad._version, local(grad)._version]

    def _merged(self, moments: Mapping[str, Moments | None]) -> Mapping[str, Moments | None]:
        """The moments of all ranks; they raise together, and together notice that nothing happened."""
        grads = [local(p.grad) for a in self.assigned for p in a.parameters if p.grad is not None]
        grads = [grad for grad in grads if not grad.is_sparse and grad.numel() > 0]
        variances = [m.variance for m in moments.values() if m is not None]
        bad, busy = False, bool(variances)
        if self.check_finite is None or self.check_finite:
            total = _total(grads + variances, self.check_finite)
            # a sum may overflow, or be zero, where no number is: then each is looked at
            bad = not math.isfinite(total) and bool(self._not_finite(moments))
            busy = busy or total != 0 or any(bool(grad.any()) for grad in grads)
        else:
            busy = busy or bool(grads)
        merged, (bad, busy) = self.ranks.merge(self.captures, moments, bad, busy, device=self._device)
        if bad:
            where = ", ".join(self._not_finite(moments)[:5]) or "those of another rank"
            raise ValueError(
                f"expected finite gradients, got nan or inf in {where}; parameters and statistics are as before "
                "this step. Lower the learning rate, look at the loss and the data, or skip the step"
            )
        self.idle = self.idle and not busy
        return merged

    def _not_finite(self, moments: Mapping[str, Moments | None]) -> list[str]:
        held = {id(p) for a in self.assigned for p in a.parameters if p.grad is not None}
        tensors = {f"the gradient of {n}": local(p.grad) for n, p in self.model.named_parameters() if id(p) in held}
        tensors |= {f"the input of {name}": m.variance for name, m in moments.items() if m is not None}
        return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _whole(self, assignment: Assignment) -> bool:
        """Must a layer be gathered, because its rows are spread over ranks or a conditioner sees across them?"""
        return not (rows_are_local(assignment.layer) and all(self.chain[i].row_wise for i in assignment.members))

    def _retract_(self, assignment: Assignment, i: int) -> None:
        layer, state, whole = assignment.layer, self.states[i][assignment.layer.name], self._whole(assignment)
        with moving(layer, whole=whole) as view:
            if view.units > 0:  # this rank may hold no row
                self.chain[i].retract_(view, state if whole else local_state(layer, state))

    def _next_map(self, assignment: Assignment, moments: Moments | None) -> RowMap | None:
        """Folds one step's moments into the states of a layer and returns the step's P."""
        layer, whole = assignment.layer, self._whole(assignment)
        maps: list[RowMap | None] = []
        n = len(assignment.weights)
        for i in assignment.members:
            conditioner, states = self.chain[i], self.states[i]
            due = conditioner.uses_inputs and self.captures[layer.name].active
            due = due and conditioner.is_due(states.get(layer.name, {}))
            if due and moments is None:
                self._warn_missing(assignment)
                continue
            if layer.name not in states:
                states[layer.name] = {}
                with moving(layer, whole=True) as view:
                    conditioner.enter_(view, states[layer.name])
            state = states[layer.name]
            if not due:
                conditioner.wait(state)
            elif moments is not None:
                capture = self.captures[layer.name]
                state["has_bias"] = bool(assignment.biases)
                state["feeds_batch_norm"] = capture.feeds_batch_norm or state.get("feeds_batch_norm", False)
                conditioner.update(state, moments)
            view = shown(layer, whole=whole)
            if view.units == 0:
                continue
            if conditioner.uses_rate:
                grads: list[Any] = [p.grad for p in assignment.parameters]
                with opened(grads, whole=whole) as plain:
                    gradient = joined(view, plain[:n], plain[n:], share=max(len(plain) - n, 1))
                with opened(assignment.parameters, whole=whole) as plain:
                    theta = joined(view, plain[:n], plain[n:])
                conditioner.update_rate(state, compose(maps), theta, gradient, self._rate(assignment))
            maps.append(conditioner.row_map(view, state if whole else local_state(layer, state)))
        return compose(maps)

    def _rate(self, assignment: Assignment) -> Any:
        """The size of the optimizer's step for a gradient of one that stays."""
        group = next(g for g in self.groups if any(p is assignment.weights[0] for p in g["params"]))
        return group["lr"] / (1 - group.get("momentum", 0.0))

    def _map_(self, method: str, row_map: RowMap, assignment: Assignment, tensors: Sequence[Any]) -> None:
        """Replaces tensors like an assignment's parameters by P z or M g of them."""
        n, whole = len(assignment.weights), self._whole(assignment)
        if whole:
            with opened(tensors, whole=True) as plain:
                map_(method, assignment.layer, row_map, plain[:n], plain[n:])
        else:
            parts = [local(t) for t in tensors]
            map_(method, assignment.layer, row_map, parts[:n], parts[n:])

    def _warn_missing(self, assignment: Assignment) -> None:
        layer = assignment.layer
        if layer.name not in self.warned and bool(local(assignment.weights[0].grad).any()):
            self.warned.add(layer.name)
            warnings.warn(
                f"layer {layer.name!r} has a gradient, but none of its inputs were seen: expected its forward "
                "pass in training mode, through the module's call. Its gradient goes through as it is",
                stacklevel=2,
            )


def _total(tensors: Sequence[Tensor], always: bool | None) -> float:
    """A number that is finite when the tensors are; 1 where nobody wants to wait for another device to say."""
    if always is None and any(not t.is_cpu for t in tensors):
        return 1.0
    sums = [t.sum() for t in tensors]
    if len({t.device for t in tensors}) > 1:
        return math.fsum(float(s) for s in sums)
    return float(torch.stack(sums).sum()) if sums else 0.0


def _copied(state: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A state with tensors of its own."""
    return {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}


def _remove(hooks: Iterable[InputCapture | BatchNormProbe]) -> None:
    for hook in hooks:
        hook.remove()
