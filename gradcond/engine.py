"""The bookkeeping behind a conditioned optimizer: which layer gets what, its state, and one step's conditioning."""

from __future__ import annotations

import cmath
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.assignment import Assignment, Conditioned
from gradcond.capture import InputCapture
from gradcond.clipping import Lengths
from gradcond.conditioner import Conditioner, compose
from gradcond.distributed import Ranks
from gradcond.finite import entries, not_finite, total_of
from gradcond.inputs import Observer
from gradcond.layers import find_layers, has_lazy
from gradcond.maps import Maps, rate_of
from gradcond.plan import Plan
from gradcond.preconditioner import Preconditioner
from gradcond.probe import BatchNormProbe
from gradcond.screening import Screening
from gradcond.shards import local, local_state, moving, shown
from gradcond.states import State, as_trained, check_saved, copied, kept, loaded_states, saved_state
from gradcond.statistics import Moments
from gradcond.together import Together

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

    def _attach(self, hooked: Mapping[str, InputCapture] | None = None) -> None:
        """Finds the layers and hooks those whose inputs are needed, and that are not hooked already."""
        self.plan = Plan(self.model, self.chain, self.only)
        self.layers, self.lazy = self.plan.layers, has_lazy(self.model)
        users = [c for c in self.chain if c.uses_inputs]
        self.captures = dict(hooked or {})
        if not self.captures:
            self.observer = Observer(any(c.taps for c in users), users[0].ghost if users else None)
        for name, layer in self.layers.items():
            if users and name not in self.captures:
                self.captures[name] = InputCapture(layer, self.observer)
        taken = [capture for name, capture in self.captures.items() if self.plan.members[name]]
        self.probe = BatchNormProbe(taken, self.model)
        self.retracting = [i for i, c in enumerate(self.chain) if type(c).retract_ is not Conditioner.retract_]
        self.maps = Maps(self.chain, self.states, self.captures, self.warned)
        self.settings = [dict(vars(c)) for c in self.chain]  # to which these and the refusals belong
        if hooked is None:
            self.conditioned = Conditioned()
            self.clipped = Conditioned()  # likewise, by what acts on all gradients together
            self.loaded = False  # has a state been loaded since the last step?
        self.assigned: list[Assignment] = []  # of the step
        self.detach = weakref.finalize(self, _remove, self.captures, self.probe)
        self._ask_due()

    def follow_model(self) -> bool:
        """Layers may have been added, exchanged or taken away, or their weights be computed now: others go on."""
        now, before, self.lazy = find_layers(self.model), self.layers, has_lazy(self.model)
        stay = [name for name, layer in now.items() if name in before and layer.form == before[name].form]
        if len(stay) == len(now) == len(before):
            return False
        modules = set(self.model.modules())
        gone = [layer for name, layer in before.items() if name not in stay]
        for states in self.states:
            for layer in gone:
                states.pop(layer.name, None)
        hooked = {name: self.captures.pop(name) for name in stay if name in self.captures}
        self.detach()
        self._attach(hooked)
        self.plan.places += [place for layer in gone for place in layer.places.values() if place[0] in modules]
        return True

    def _follow_settings(self) -> None:
        """Hyper-parameters may have been changed since the last step."""
        now = [dict(vars(c)) for c in self.chain]
        if now == self.settings:
            return
        if any(c.uses_inputs and c.taps != self.observer.taps for c in self.chain):
            raise ValueError(
                f"expected taps={self.observer.taps}, as it was when the optimizer was wrapped, got "
                f"{not self.observer.taps}: its statistics are of another shape; wrap the optimizer anew"
            )
        for conditioner in self.chain:
            conditioner.check({})
        self.settings = now
        self.maps.forget()
        self.plan.ask()

    def _ask_due(self) -> None:
        """Which inputs does the coming step need, and which of their rows?"""
        for name, capture in self.captures.items():
            capture.active = any(
                self.chain[i].is_due(self.states[i].get(name, {})) for i in self.plan.members[name]
            )
        self.observer.seen.clear()
        self.observer.ghost = next((c.ghost for c in self.chain if c.uses_inputs), None)
        if self.observer.ghost is not None:
            steps = [entry.get("steps", 0) for state in self.states for entry in state.values()]
            self.observer.seed = 65537 * max(steps, default=0)

    def __getstate__(self) -> dict[str, Any]:
        plain = [{name: kept(state) for name, state in states.items()} for states in self.states]
        return {key: getattr(self, key) for key in _KEPT} | {"states": plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def assignments(self, groups: Sequence[Mapping[str, Any]]) -> list[Assignment]:
        """The layers that these parameter groups train and at least one conditioner takes."""
        last, parameters = self.plan.found, self.plan.parameters
        found = self.plan.assignments(groups)
        if self.plan.parameters is not parameters and self.follow_model():
            found = self.plan.assignments(groups)
        if found is not last:
            self.together = Together(self.chain, found, self.captures)
            self.screening = Screening(found, fixed=self.maps.fixed)
            self.maps.forget()
        return found

    def begin(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """A new step, over these parameter groups: its first gradients decide its P."""
        if self.lazy and not has_lazy(self.model):  # the first forward pass has given them their shapes
            self.follow_model()
        self._follow_settings()
        if not any(self.states):  # the first step: weights may have been set since wrap
            self.plan.ask()
        self.groups = groups
        self.assigned = self.assignments(groups)
        self.maps.begin(groups)
        self.idle = self.first = True  # nothing has been conditioned yet
        self.at_one_go = not self.ranks.several

    @torch.compiler.disable
    def condition_(self) -> None:
        """Replaces each layer's gradient g by M g, in place, once per gradient.

        Raises:
            ValueError: for a gradient or an input that is not finite; nothing has been changed then.
        """
        if not self.chain:
            return
        with torch.no_grad():
            if self.at_one_go and self._at_one_go():
                return
            ready = [a.with_gradients() for a in self.assigned if self._is_fresh(a)]
            moments = self._merged({name: capture.take() for name, capture in self.captures.items()})
            if self.idle or not (ready or self._unclipped()):
                return
            self.maps.fold([a for a in ready if a.layer.name not in self.maps.taken], moments)
            self._apply_(ready)
        for assignment in ready:  # several layers may share a gradient
            self.conditioned.note(assignment.layer.name, assignment.weights[0].grad)
        if self.chain[-1].comes_last:
            for place, p in self._held().items():
                self.clipped.note(place, p.grad)

    def _held(self) -> dict[str, nn.Parameter]:
        """The parameters of the step's groups that have a gradient, by their place."""
        every = [(group, p) for group in self.groups for p in group["params"]]
        return {str(i): p for i, (g, p) in enumerate(every) if g.get("gradcond", True) and p.grad is not None}

    def _unclipped(self) -> list[Any]:
        """The gradients that the conditioner of all together, where there is one, has not seen."""
        if not self.chain[-1].comes_last:
            return []
        return [p.grad for place, p in self._held().items() if not self.clipped.holds(place, p.grad)]

    def _at_one_go(self) -> bool:
        """An ordinary step of layers that are all alike."""
        done = False
        if self.screening.possible:
            done = self.screening.step_(self.maps.lasting, self.conditioned, self.check_finite)
        elif self.together.possible:
            rate = rate_of(self.groups[0]) if len(self.chain) > 1 and len(self.groups) == 1 else None
            done = self.together.step_(
                self.chain, self.states, self.maps.scratch, self.conditioned, self.check_finite, rate
            )
        if done:
            self.idle = self.first = False
            self.probe.remove()
        return done

    def _apply_(self, ready: Sequence[Assignment]) -> None:
        """Replaces the gradients of these layers by M g."""
        first, self.first = self.first, False
        lengths = Lengths() if self.chain[-1].comes_last else None
        for assignment in ready:
            row_map = self.maps.take(assignment)
            if lengths is not None:
                grads = [p.grad for p in assignment.parameters]
                before = [local(grad).clone() for grad in grads]
            if assignment.simple and row_map is not None:
                row_map.apply_(assignment.rows_of_gradient(row_map))
            elif row_map is not None:
                assignment.map_("apply", row_map, [p.grad for p in assignment.parameters])
            if lengths is not None:
                lengths.add(before, grads)
        if lengths is not None:
            lengths.clip_(self.chain[-1], self.network[-1], self._unclipped(), fold=first)

    def give_factor(self, optimizer: Any) -> None:
        """Lets an optimizer that draws noise (SGLD) draw it through P."""
        if hasattr(optimizer, "factor_") and self.chain:
            optimizer.factor_ = self.factor_

    @torch.no_grad()
    def factor_(self, noises: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Replaces the z of every (parameter, z) by P z, with the step's P, in place."""
        z = {id(parameter): noise for parameter, noise in noises}
        for assignment in self.assigned:
            own = assignment.with_gradients()
            if not all(id(weight) in z for weight in own.weights):
                continue
            row_map = self.maps.taken_or_last(own)
            if row_map is not None:
                own.map_("factor", row_map, [z[id(p)] for p in own.parameters])

    def conditioning(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure whose gradients are conditioned after each evaluation."""
        self.at_one_go = False  # later evaluations keep the first one's P

        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            bad = isinstance(loss, Tensor) and not bool(loss.isfinite().all())
            if self.chain and self.ranks.any(bad, device=self._device)[0]:
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
        for i in self.retracting:
            for assignment in self.assigned:
                if i in assignment.members and assignment.layer.name in self.states[i]:
                    self._retract_(assignment, i)
        self.loaded = False
        if self.maps.taken and self.probe.handles:
            self.probe.leave(self.maps.taken)
        self._ask_due()

    def preconditioner(self, groups: Sequence[Mapping[str, Any]]) -> Preconditioner:
        """The M of the last step's statistics, or what the chain gives before the first one."""
        blocks = []
        for a in self.assignments(groups):
            last = {i: as_trained(self.states[i].get(a.layer.name, {}), bool(a.biases)) for i in a.members}
            row_map = compose([self.chain[i].row_map(shown(a.layer), copied(state)) for i, state in last.items()])
            if row_map is not None:
                blocks.append((a.layer, row_map, bool(a.biases)))
        return Preconditioner(self.model, blocks)

    def state_dict(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Plain dictionaries of tensors, numbers and strings: `torch.load(weights_only=True)` reads them."""
        return saved_state(self.chain, self.states, self.network, self.assignments(groups))

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, before anything is touched, for a state that is not of this chain and model."""
        check_saved(state, self.chain, self.layers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned, the hyper-parameters included."""
        for conditioner, entry in zip(self.chain, state["chain"], strict=True):
            for key, value in entry["settings"].items():
                setattr(conditioner, key, value)
        self._follow_settings()
        self.states[:] = loaded_states(state, self.layers)
        self.network = [copied(entry.get("network", {}), self._device) for entry in state["chain"]]
        self.loaded = True
        self.maps.forget()
        self._ask_due()

    def forget(self) -> None:
        """Starts all statistics anew: a bare optimizer's state has been loaded."""
        if not self.chain or self.loaded:  # `conditioning` may have been loaded by itself
            return
        warnings.warn("the loaded state is of a bare optimizer: gradcond's statistics start anew", stacklevel=3)
        self.states[:], self.network = [{} for _ in self.chain], [{} for _ in self.chain]
        self.maps.forget()
        self._ask_due()

    def _is_fresh(self, assignment: Assignment) -> bool:
        """Are there gradients that have not been conditioned yet? Sparse ones have no rows of a layer."""
        for weight in assignment.weights:
            grad = weight.grad
            if grad is None or grad.is_sparse:
                return False
        return not self.conditioned.holds(assignment.layer.name, assignment.weights[0].grad)

    def _merged(self, moments: Mapping[str, Moments | None]) -> Mapping[str, Moments | None]:
        """The moments of all ranks; they raise together, and together notice that nothing happened."""
        if self.chain[-1].comes_last:  # it acts on every gradient of these groups
            held = list(self._held().values())
        else:
            candidates = [p for a in self.assigned for p in a.parameters]
            held = [p for p in candidates if (grad := p.grad) is not None and not grad.is_sparse]
        grads = [entries(p.grad) for p in held]
        taken = [m for m in moments.values() if m is not None]
        bad, busy = False, bool(taken) or any(grad.numel() for grad in grads)
        on_cpu = all(grad.is_cpu for grad in grads)
        if self.check_finite or (self.check_finite is None and on_cpu):
            looked_at = grads + [m.variance for m in taken]
            total = total_of(looked_at, on_cpu=on_cpu and all(t.is_cpu for t in looked_at))
            # a sum may overflow, or be zero, where no number is: then each is looked at
            bad = not cmath.isfinite(total) and bool(not_finite(self.model, held, moments))
            busy = bool(taken) or total != 0 or any(bool(grad.any()) for grad in grads)
        around = self._means() if self.ranks.several else {}
        merged, (bad, busy) = self.ranks.merge(self.captures, moments, around, bad, busy, device=self._device)
        if bad:
            where = ", ".join(not_finite(self.model, held, moments)[:5]) or "those of another rank"
            raise ValueError(
                f"expected finite gradients, got nan or inf in {where}; parameters and statistics are as before "
                "this step. Lower the learning rate, look at the loss and the data, or skip the step"
            )
        self.idle = self.idle and not busy
        return merged

    def _means(self) -> dict[str, Tensor]:
        """The running means of the layers' inputs."""
        return {
            name: state["mean"]
            for conditioner, states in zip(self.chain, self.states, strict=True)
            for name, state in states.items()
            if conditioner.uses_inputs and "mean" in state
        }

    @property
    def _device(self) -> torch.device:
        if self.assigned:
            return self.assigned[0].weights[0].device
        return next(self.model.parameters()).device

    def _retract_(self, assignment: Assignment, i: int) -> None:
        layer, state, whole = assignment.layer, self.states[i][assignment.layer.name], assignment.whole
        with moving(layer, whole=whole) as view:
            if view.units > 0:  # this rank may hold no row
                self.chain[i].retract_(view, state if whole else local_state(layer, state))


def _remove(captures: Mapping[str, InputCapture], probe: BatchNormProbe) -> None:
    for capture in captures.values():
        capture.remove()
    probe.remove()
