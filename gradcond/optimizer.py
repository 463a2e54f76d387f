"""wrap and ConditionedOptimizer: a torch optimizer whose gradients are conditioned; no mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradcond.build import build_engine
from gradcond.conditioner import Conditioner
from gradcond.distributed import Conditioning
from gradcond.engine import Engine
from gradcond.preconditioner import Preconditioner
from gradcond.report import Report, make_report

__all__ = ["ConditionedOptimizer", "wrap"]

_KEY = "gradcond"


def _shared(name: str) -> property:
    """An attribute that lives on the inner optimizer: loading a state replaces it there, and must be seen here."""
    return property(
        lambda self: getattr(self.optimizer, name),
        lambda self, value: setattr(self.optimizer, name, value),
    )


class ConditionedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that conditions the gradients of a model before its inner optimizer steps.

    Made by `gradcond.wrap`. Parameter groups, state, defaults and hooks are the inner optimizer's own, so
    schedulers, gradient scalers and checkpoints see one optimizer. `state_dict()` is the inner one's with one
    more entry, "gradcond"; a bare optimizer loads it too, and a wrapped one loads a bare state with a warning.
    Weight decay of the inner optimizer is added after conditioning.

    Attributes:
        optimizer: the inner optimizer.
        conditioners: the chain, outermost first; its hyper-parameters may be changed between steps.
    """

    # a scaler that sees True sets grad_scale and found_inf on us instead of on the optimizer that reads them
    _step_supports_amp_scaling = False

    param_groups = _shared("param_groups")
    state = _shared("state")
    defaults = _shared("defaults")
    _optimizer_step_pre_hooks = _shared("_optimizer_step_pre_hooks")
    _optimizer_step_post_hooks = _shared("_optimizer_step_post_hooks")
    _optimizer_state_dict_pre_hooks = _shared("_optimizer_state_dict_pre_hooks")
    _optimizer_state_dict_post_hooks = _shared("_optimizer_state_dict_post_hooks")
    _optimizer_load_state_dict_pre_hooks = _shared("_optimizer_load_state_dict_pre_hooks")
    _optimizer_load_state_dict_post_hooks = _shared("_optimizer_load_state_dict_post_hooks")

    def __init__(self, optimizer: Optimizer, engine: Engine) -> None:
        # not super().__init__, which would build parameter groups and hooks of its own
        self.optimizer = optimizer
        self._engine = engine
        engine.give_factor(optimizer)

    @property
    def conditioners(self) -> list[Conditioner]:
        """The chain, outermost first."""
        return self._engine.chain

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Conditions the gradients, then lets the inner optimizer step.

        Args:
            closure: reevaluates the model and returns the loss; the gradients of each evaluation are
                conditioned, with the first evaluation's P.
            *args: what else the inner optimizer's step takes.
            **kwargs: likewise.

        Raises:
            ValueError: for gradients or inputs that are not finite; parameters and statistics stay.
        """
        engine = self._engine
        engine.begin(self.param_groups)
        if closure is None:
            engine.condition_()
            args = (None, *args) if args else ()
        else:
            args = (engine.conditioning(closure), *args)
        loss = self.optimizer.step(*args, **kwargs)
        engine.finish_()
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # the inner step runs the hooks: once

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimizer; its layers, in the model by now, are conditioned from now on."""
        self.optimizer.add_param_group(param_group)
        self._engine.assignments(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state with the entry "gradcond": settings and statistics of the chain."""
        return {**self.optimizer.state_dict(), _KEY: self._engine.state_dict(self.param_groups)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of a wrapped optimizer, or of a bare one (with a warning: statistics start anew).

        Raises:
            ValueError: for a state of another chain, model or parameter groups; nothing has been changed then.
        """
        if isinstance(self.optimizer, ConditionedOptimizer):  # run by a proxy of ours, such as Lightning's
            return self.optimizer.load_state_dict(state_dict)
        inner = {key: value for key, value in state_dict.items() if key != _KEY}
        if _KEY in state_dict:
            self._engine.check_state_dict(state_dict[_KEY])
        self.optimizer.load_state_dict(inner)
        if _KEY in state_dict:
            self._engine.load_state_dict(state_dict[_KEY])
        else:
            self._engine.forget()

    @property
    def conditioning(self) -> Conditioning:
        """The entry "gradcond" of the state by itself, to save and load with torch.distributed.checkpoint."""
        return Conditioning(self._engine, self.param_groups)

    def preconditioner(self) -> Preconditioner:
        """M = P P^T over the trainable parameters, from the last step's statistics and the settings as they are."""
        return self._engine.preconditioner(self.param_groups)

    def report(self) -> Report:
        """Which layer got which conditioner, and which parameters were left alone and why; print it."""
        return make_report(self._engine, self.param_groups)

    def __repr__(self) -> str:
        return f"ConditionedOptimizer({self.optimizer!r}, {self.conditioners})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("optimizer", "_engine"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what the inner optimizer has of its own there, where it is read."""
        inner = self.__dict__.get("optimizer")
        own = name in ("optimizer", "_engine") or hasattr(type(self), name) or name in self.__dict__
        object.__setattr__(self if own or not hasattr(inner, name) else inner, name, value)

    def __getstate__(self) -> dict[str, Any]:
        # schedulers put a patched `step` on the instance, which must not outlive it
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._engine.give_factor(self.optimizer)


def wrap(
    optimizer: Optimizer,
    model: nn.Module,
    conditioners: Sequence[Conditioner],
    *,
    only: Callable[[str], bool] | None = None,
    process_group: Any = None,
    check_finite: bool | None = None,
) -> ConditionedOptimizer:
    """Returns the optimizer with the gradients of the model's layers conditioned before each step.

    Several conditioners are nested changes of variables, outermost first: [A, B] means P = P_A P_B and
    M = P P^T. The model is left as it is but for forward hooks, where a conditioner needs the layers' inputs;
    they go when the returned optimizer does.

    Args:
        optimizer: any torch optimizer over parameters of the model; use the returned one in its place.
        model: the module that holds the layers.
        conditioners: e.g. [BNP()]; may be empty.
        only: takes a layer's name, as the report shows it, and says whether it is conditioned; by default, all. A
            parameter group with `gradcond=False` is left alone, too.
        process_group: the processes whose rows make the gradient: None, all of them where torch.distributed is
            initialized; a group; False, this one alone. Every rank of it must step, with rows or without. Ranks
            of tensor parallelism see the same rows: there, the data-parallel group, or False.
        check_finite: look whether gradients and inputs are finite before anything is changed? None, on the CPU,
            where it makes nobody wait; elsewhere what is not finite goes through, as it does without conditioning.

    Raises:
        TypeError: for something that is not an optimizer, a module, a list of conditioners or a predicate.
        ValueError: when the optimizer holds none of the model's parameters, or one twice, or is attached to.

    Example:
        >>> import torch, gradcond
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = gradcond.wrap(optimizer, model, [gradcond.BNP()])
        >>> model(torch.randn(8, 2)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.report()
        layer  conditioned by
        ---------------------
        0      BNP (with bias, 1 step)
        2      BNP (with bias, 1 step)
    """
    if isinstance(optimizer, ConditionedOptimizer):
        raise TypeError("expected a bare optimizer, got a wrapped one; put all conditioners in one list")
    engine = build_engine(
        optimizer, model, conditioners, only=only, process_group=process_group, check_finite=check_finite
    )
    return ConditionedOptimizer(optimizer, engine)
