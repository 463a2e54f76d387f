"""The diagonal that an adaptive optimizer divides the gradient by, from its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.curvature.factors import DiagonalFactor
from gradcond.curvature.operators import working_dtype

Group = Mapping[str, Any]  # an entry of param_groups
State = Mapping[str, Any]  # a parameter's own


class OptimizerFactor(DiagonalFactor):
    """P = D^-1/2 of an optimizer whose step is D^-1 times the (averaged) gradient; see `optimizer_factor`."""

    def __init__(self, diagonal: Tensor, kind: str, without_state: tuple[str, ...]) -> None:
        super().__init__(diagonal)
        self.kind = kind  # "Adam" (AdamW too), "RMSprop" or "Adagrad"
        self.without_state = without_state  # names of the parameters that it is the identity on


def optimizer_factor(optimizer: Any, model: nn.Module) -> OptimizerFactor:
    """P = D^-1/2 from the state of Adam, AdamW, RMSprop or Adagrad, so that M = P P^T = D^-1.

    D is what the last step divided by,

        Adam, AdamW: sqrt(v) / sqrt(1 - beta2^t) + eps, with amsgrad the largest v so far;
        RMSprop: sqrt(v) + eps, centered sqrt(v - m^2) + eps;    Adagrad: sqrt(sum of squares) + eps,

    so that without momentum the step was -lr M g, exactly. Learning rates and weight decay are left apart.

    Args:
        optimizer: a ``torch.optim`` optimizer, or the ``state_dict()`` of one. A state dict tells names when it was
            made from ``model.named_parameters()``; otherwise it must be of one group, in the order of
            ``model.parameters()``, all of them or those that require grad.
        model: the factor is over its parameters that require grad, in order.

    Returns:
        A `DiagonalFactor` that also tells ``kind`` and ``without_state``, the names of parameters that have had no
        step: it is the identity on these.

    Raises:
        ValueError: the optimizer is of another kind, has no state yet, or does not belong to the model.

    References:
        D. P. Kingma, J. Ba, Adam: a method for stochastic optimization, 2015.
        J. Duchi, E. Hazan, Y. Singer, Adaptive subgradient methods for online learning, 2011.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.Adagrad(model.parameters(), eps=0.0)
        >>> model.weight.grad = torch.tensor([[4.0]])
        >>> optimizer.step()
        >>> optimizer_factor(optimizer, model).factor(torch.ones(1))
        tensor([0.5000])
    """
    entries = _of_instance(optimizer, model) if hasattr(optimizer, "param_groups") else _of_dict(optimizer, model)
    parts, kinds, without = [], set(), []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        group, state = entries.get(name, ({}, {}))
        if not state or float(state.get("step", 1)) == 0:  # Adagrad's state is there before its first step
            without.append(name)
            parts.append(torch.ones(p.numel(), dtype=working_dtype(p.dtype), device=p.device))
            continue
        kind, divisor = _divisor(group, state)
        if divisor.shape != p.shape:
            raise ValueError(
                f"expected the state of {name!r} to have the shape {tuple(p.shape)}, got {tuple(divisor.shape)}; "
                "is the optimizer of this model, with its parameters in this order?"
            )
        if not bool((divisor > 0).all() and divisor.isfinite().all()):
            raise ValueError(f"expected {kind} to divide {name!r} by positive numbers; is its eps zero?")
        kinds.add(kind)
        parts.append(divisor.rsqrt().flatten().to(p.device))
    if not kinds:
        raise ValueError(
            "expected the state of at least one step, got none for any parameter of the model: the optimizer has "
            "not stepped, keeps none, as SGD without momentum, or gives its parameters other names"
        )
    return OptimizerFactor(torch.cat(parts), " and ".join(sorted(kinds)), tuple(without))


def _of_instance(optimizer: Any, model: nn.Module) -> dict[str, tuple[Group, State]]:
    names = {id(p): name for name, p in model.named_parameters()}
    if not any(id(p) in names for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer steps parameters none of which is the model's; pass the pair that trained")
    return {
        names[id(p)]: (group, optimizer.state.get(p, {}))
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in names
    }


def _of_dict(saved: Any, model: nn.Module) -> dict[str, tuple[Group, State]]:
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        got = f"the keys {sorted(map(str, saved))[:6]}" if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(f"expected a torch optimizer or its state_dict(), got {got}")
    groups = saved["param_groups"]
    names = [name for group in groups for name in group.get("param_names", ())]
    count = sum(len(group["params"]) for group in groups)
    if not names and len(groups) > 1:
        raise ValueError(
            f"the state has {len(groups)} groups and no names, so which parameter is which is not known; pass "
            "the optimizer itself, or give each group its 'param_names' as Adam(model.named_parameters()) does"
        )
    if not names:
        named = list(model.named_parameters())
        trained = [name for name, p in named if p.requires_grad]
        names = trained if count == len(trained) else [name for name, _ in named]
    if len(names) != count:
        raise ValueError(f"expected the state of an optimizer of {len(names)} parameters, got one of {count}")
    indices = [(index, group) for group in groups for index in group["params"]]
    return {
        name: (group, saved["state"].get(index, {})) for name, (index, group) in zip(names, indices, strict=True)
    }


def _divisor(group: Group, state: State) -> tuple[str, Tensor]:
    """The kind of optimizer, told by what it keeps, and the D of its last step."""
    for kind, (options, moment, divisor) in KINDS.items():
        if options <= group.keys() and moment in state:
            return kind, divisor(group, state)
    raise ValueError(
        f"expected the state of {', '.join(KINDS)} or AdamW, got one that keeps {sorted(map(str, state))} and "
        f"has the options {sorted(map(str, group))}"
    )


def _adam(group: Group, state: State) -> Tensor:
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    return _wide(second).sqrt() / correction**0.5 + group["eps"]


def _rmsprop(group: Group, state: State) -> Tensor:
    second = _wide(state["square_avg"])
    if group["centered"]:
        second = second - _wide(state["grad_avg"]).square()
    return second.sqrt() + group["eps"]


def _adagrad(group: Group, state: State) -> Tensor:
    return _wide(state["sum"]).sqrt() + group["eps"]


# what tells each kind: options of its groups, and what it keeps of squares; RAdam, NAdam and SparseAdam keep
# the same as Adam and step differently, but have no amsgrad
KINDS: dict[str, tuple[set[str], str, Callable[[Group, State], Tensor]]] = {
    "Adam": ({"amsgrad", "betas"}, "exp_avg_sq", _adam),
    "RMSprop": ({"centered", "alpha"}, "square_avg", _rmsprop),
    "Adagrad": ({"lr_decay", "initial_accumulator_value"}, "sum", _adagrad),
}


def _wide(moment: Tensor) -> Tensor:
    return moment.detach().to(working_dtype(moment.dtype))
