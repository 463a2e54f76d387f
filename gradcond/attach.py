"""attach: the same conditioning by hooks, for code that owns its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradcond.assignment import Assignment
from gradcond.build import build_engine
from gradcond.conditioner import Conditioner
from gradcond.distributed import Conditioning
from gradcond.engine import Engine
from gradcond.optimizer import ConditionedOptimizer
from gradcond.preconditioner import Preconditioner
from gradcond.report import Report, make_report
from gradcond.shards import local

__all__ = ["Attachment", "attach"]


class Attachment:
    """What `attach` put on an optimizer; `remove` takes it off again.

    Attributes:
        optimizer: the optimizer that it is attached to.
        conditioners: the chain, outermost first; its hyper-parameters may be changed between steps.
    """

    def __init__(self, optimizer: Optimizer, engine: Engine) -> None:
        self.optimizer, self._engine = optimizer, engine
        self.conditioners = engine.chain
        self._loading: dict[str, Any] | None = None
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._add_state),
            optimizer.register_load_state_dict_pre_hook(self._check_state),
            optimizer.register_load_state_dict_post_hook(self._load_state),
        ]
        engine.give_factor(optimizer)
        self._note_versions(engine.assignments(optimizer.param_groups))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Conditions the gradients, or those that a closure is going to compute.

        torch may run this hook twice in one step, where a subclass calls `super().step()`: a gradient is
        conditioned once all the same.
        """
        self._engine.begin(optimizer.param_groups)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):  # a fused step that a gradient scaler makes skip itself
            return None
        _, *rest = args
        if callable(rest[0] if rest else kwargs.get("closure")):
            if rest:
                return (optimizer, self._engine.conditioning(rest[0]), *rest[1:]), kwargs
            return args, {**kwargs, "closure": self._engine.conditioning(kwargs["closure"])}
        self._unscale()
        self._engine.condition_()
        return None

    def _unscale(self) -> None:
        """Divides the gradients by what a gradient scaler would have a fused step divide them by."""
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is None:
            return
        with torch.no_grad():
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                if (grad := local(parameter.grad)) is not None:
                    grad.div_(scale.to(grad.device, non_blocking=True))
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._engine.finish_()
        self._note_versions(self._engine.assigned)

    def _note_versions(self, assigned: Sequence[Assignment]) -> None:
        self._versions = {a.layer.name: a.weights[0]._version for a in assigned}

    def check(self) -> None:
        """Makes sure that no step ran without conditioning.

        Raises:
            RuntimeError: when the weights of a conditioned layer have changed since the last conditioned step,
                or since `attach`, or when the hooks are gone: a copied or unpickled optimizer loses them, and
                code that calls the optimizer's inner functions runs past them.
        """
        if not self._handles:
            raise RuntimeError("expected an attached optimizer, but remove() has been called; attach again")
        for a in self._engine.assignments(self.optimizer.param_groups):
            version = self._versions.get(a.layer.name)
            if version is not None and version != a.weights[0]._version:
                raise RuntimeError(
                    f"the weight of layer {a.layer.name!r} has changed since the last conditioned step: expected "
                    "every step to run the optimizer's hooks. Step the optimizer that was attached to (a copy "
                    "loses its hooks); after loading weights on purpose, attach anew"
                )

    def remove(self) -> None:
        """Takes every hook off the optimizer and the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._engine.detach()
        if hasattr(self.optimizer, "factor_"):
            self.optimizer.factor_ = None

    @property
    def conditioning(self) -> Conditioning:
        """The entry "gradcond" of the state by itself, to save and load with torch.distributed.checkpoint."""
        return Conditioning(self._engine, self.optimizer.param_groups)

    def preconditioner(self) -> Preconditioner:
        """M = P P^T over the trainable parameters, from the last step's statistics and the settings as they are."""
        return self._engine.preconditioner(self.optimizer.param_groups)

    def report(self) -> Report:
        """Which layer got which conditioner, and which parameters were left alone and why; print it."""
        return make_report(self._engine, self.optimizer.param_groups)

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "gradcond": self._engine.state_dict(optimizer.param_groups)}

    def _check_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loading = state_dict.get("gradcond")
        if self._loading is not None:
            self._engine.check_state_dict(self._loading)
        return {key: value for key, value in state_dict.items() if key != "gradcond"}

    def _load_state(self, optimizer: Optimizer) -> None:
        if self._loading is not None:
            self._engine.load_state_dict(self._loading)
        else:
            self._engine.forget()
        self._loading = None


def attach(
    optimizer: Optimizer,
    model: nn.Module,
    conditioners: Sequence[Conditioner],
    *,
    only: Callable[[str], bool] | None = None,
    process_group: Any = None,
    check_finite: bool | None = None,
) -> Attachment:
    """Conditions the gradients of an optimizer that somebody else owns, by its step hooks.

    What `wrap` does, without a new optimizer object: for trainers that build their own. Closures, several
    evaluations per step and `state_dict` (one more entry, "gradcond") work alike. A deep copy or a pickle of the
    optimizer has no hooks, as always in torch, and its steps are not conditioned; `check()` tells.

    Args:
        optimizer: any torch optimizer over parameters of the model.
        model: the module that holds the layers.
        conditioners: e.g. [BNP()], outermost first.
        only: takes a layer's name, as the report shows it, and says whether it is conditioned; all are by default.
        process_group: the processes whose rows make the gradient: None, all of them where torch.distributed is
            initialized; a group; False, this one alone. Every rank of it must step, with rows or without. Ranks
            of tensor parallelism see the same rows: there, the data-parallel group, or False.
        check_finite: look whether gradients and inputs are finite before anything is changed? None: on the CPU.

    Returns:
        A handle with remove(), check(), report(), preconditioner() and, for torch.distributed.checkpoint,
        conditioning.

    Raises:
        TypeError: for something that is not a bare optimizer, a module or a list of conditioners.
        ValueError: when the optimizer holds none of the model's parameters, or one twice, or is attached to.

    Example:
        >>> import torch, gradcond
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = gradcond.attach(optimizer, model, [gradcond.GradientCentralization()])
        >>> model(torch.tensor([[1.0, 3.0]])).sum().backward()
        >>> optimizer.step()
        >>> model.weight.grad
        tensor([[-1.,  1.]])
        >>> handle.check()
        >>> handle.remove()
    """
    if isinstance(optimizer, ConditionedOptimizer):
        raise TypeError("expected a bare optimizer, got a wrapped one; put all conditioners in one list")
    engine = build_engine(
        optimizer, model, conditioners, only=only, process_group=process_group, check_finite=check_finite
    )
    return Attachment(optimizer, engine)
