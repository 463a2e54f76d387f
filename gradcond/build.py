"""From an optimizer, a model and a list of conditioners to an engine, with every check of the three."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradcond.conditioner import Conditioner
from gradcond.distributed import Ranks, reshard, unwrapped
from gradcond.engine import Engine

__all__ = ["build_engine"]


def build_engine(
    optimizer: Optimizer,
    model: nn.Module,
    conditioners: Sequence[Conditioner],
    *,
    only: Callable[[str], bool] | None = None,
    process_group: Any = None,
    check_finite: bool | None = None,
) -> Engine:
    """The engine behind `wrap` and `attach`; raises what they document."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {_kind(optimizer)}; build the optimizer first")
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(isinstance(getattr(getattr(hook, "__self__", None), "_engine", None), Engine) for hook in hooks):
        raise ValueError(
            "expected an optimizer without conditioning, got one that gradcond.attach has put hooks on: it would "
            "condition twice. Call that handle's remove(), or put all conditioners in one list, and several models "
            "in one nn.ModuleList"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as model, got {_kind(model)}")
    if only is not None and not callable(only):
        raise TypeError(
            f"expected only to be a function of a layer's name, such as lambda name: name == 'fc', got {only!r:.60}"
        )
    chain, model = _checked_chain(conditioners), unwrapped(model)
    reshard(model)
    _check_parameters(optimizer, model)
    if chain and optimizer.defaults.get("differentiable"):
        raise ValueError(
            "expected an optimizer with differentiable=False: gradients are conditioned in place, which a "
            "differentiable step cannot see"
        )
    if any(c.uses_rate for c in chain) and not all("lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"expected parameter groups with a learning rate 'lr', which {_names(c for c in chain if c.uses_rate)} "
            f"goes by, got a {type(optimizer).__name__} without; leave it out"
        )
    if chain and chain[-1].comes_last and hasattr(optimizer, "factor_"):
        raise ValueError(
            f"expected a chain without {chain[-1].name} for {type(optimizer).__name__}: it would shorten the drift "
            "and leave the noise, so that the samples are of another distribution; leave it out"
        )
    inner = getattr(optimizer, "optim", None)
    if chain and hasattr(inner, "factor_"):
        raise ValueError(
            f"expected {type(inner).__name__} itself, got it in {type(optimizer).__name__}, where its noise would "
            "not be conditioned as its drift is; it has no state to shard"
        )
    return Engine(model, chain, only=only, ranks=Ranks(process_group), check_finite=check_finite)


def _checked_chain(conditioners: Sequence[Conditioner]) -> list[Conditioner]:
    if isinstance(conditioners, (str, Conditioner)) or not isinstance(conditioners, Iterable):
        raise TypeError(f"expected a list of conditioners, such as [BNP()], got {_kind(conditioners)}")
    for conditioner in (chain := list(conditioners)):
        if not isinstance(conditioner, Conditioner):
            raise TypeError(
                f"unknown conditioner: expected instances of {sorted(Conditioner.registry)}, such as BNP(), "
                f"got {_kind(conditioner)}"
            )
        if not dataclasses.is_dataclass(conditioner):
            raise TypeError(
                f"expected dataclasses, whose fields are the settings, got the class {conditioner.name}; decorate "
                "it with @dataclasses.dataclass"
            )
    rank = [2 * c.comes_last + c.uses_rate for c in chain]
    if any(a > b for a, b in itertools.pairwise(rank)) or sum(map(bool, rank)) > len(set(rank) - {0}):
        raise ValueError(
            "expected at most one RateDamping, behind the other conditioners, and at most one NormClipping, behind "
            f"that, got {_names(chain)}; change the order"
        )
    users = [c for c in chain if c.uses_inputs]
    if len({(c.taps, c.ghost) for c in users}) > 1:
        raise ValueError(
            f"expected the same taps and ghost in all of {_names(users)}, since inputs are looked at once, got "
            f"{[(c.taps, c.ghost) for c in users]}"
        )
    return chain


def _names(conditioners: Iterable[Conditioner]) -> str:
    return ", ".join(c.name for c in conditioners)


def _check_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    for p in held:
        if id(p) in seen:
            raise ValueError(
                f"expected every parameter once, but the optimizer holds {names.get(id(p), 'a parameter')!r} "
                "twice, and would step it twice; remove it from one of its groups"
            )
        seen.add(id(p))
    if not seen & names.keys():
        raise ValueError(
            f"expected an optimizer over parameters of this model, got one whose {len(held)} parameters are "
            f"none of the model's {len(names)}; build it from model.parameters()"
        )


def _kind(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"{type(thing).__name__} {thing!r:.40}"
