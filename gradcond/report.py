"""What an optimizer conditions and what it leaves alone, as a table to print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradcond.assignment import Assignment, held_parameters, trained
from gradcond.engine import Engine
from gradcond.layers import Layer, layers_of, owners

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Which layer got which conditioners, and which parameters were left alone and why; `print` shows a table.

    Attributes:
        conditioned: layer name -> one text per conditioner that takes it.
        left_alone: parameter name -> the reason.
    """

    conditioned: dict[str, list[str]]
    left_alone: dict[str, str]

    def __str__(self) -> str:
        rows = [("layer", "conditioned by")]
        rows += [(name, "; ".join(texts)) for name, texts in self.conditioned.items()]
        rows += [("left alone", "because")] if self.left_alone else []
        rows += list(self.left_alone.items())
        width = max(len(first) for first, _ in rows)
        lines = [f"{first:<{width}}  {second}" for first, second in rows]
        for head in (0, 1 + len(self.conditioned)):
            if head < len(lines):
                lines[head] += "\n" + "-" * len(lines[head])
        return "\n".join(lines)

    __repr__ = __str__


def make_report(engine: Engine, groups: Iterable[Mapping[str, Any]]) -> Report:
    """The report of an engine on the parameters of these groups."""
    groups = list(groups)
    engine.follow_model()
    assigned = {a.layer.name: a for a in engine.assignments(groups)}
    conditioned: dict[str, list[str]] = {}
    for name, assignment in assigned.items():
        conditioned[name] = []
        for i in assignment.members:
            conditioner, state = engine.chain[i], engine.states[i].get(name, {})
            note = conditioner.describe(assignment.layer, state)
            conditioned[name].append(conditioner.name + (f" ({note})" if note else ""))
    held = held_parameters(groups)
    everything = held_parameters({**group, "gradcond": True} for group in groups)
    holders: dict[int, list[Layer]] = {}
    for layer in engine.layers.values():
        for parameter in layer.weights + layer.biases:
            holders.setdefault(id(parameter), []).append(layer)
    left_alone: dict[str, str] = {}
    for name, module, key, parameter in owners(engine.model):
        full_name = f"{name}.{key}" if name else key
        if not parameter.requires_grad:
            left_alone[full_name] = "it is frozen"
        elif id(parameter) not in everything:
            left_alone[full_name] = "the optimizer does not hold it"
        elif id(parameter) not in held:
            left_alone[full_name] = "its parameter group says gradcond=False"
        elif not (layers := holders.get(id(parameter), [])):
            left_alone[full_name] = _why_no_layer(engine.model, module, parameter)
        elif any(_is_taken(parameter, assigned[layer.name], engine) for layer in layers if layer.name in assigned):
            continue
        elif any(layer.name in assigned for layer in layers):
            left_alone[full_name] = "no conditioner of this chain acts on biases"
        elif not all(trained(weight, held) for weight in layers[0].weights):
            left_alone[full_name] = "the weight beside it is not trained"
        else:
            reasons = zip(engine.chain, engine.plan.refusals[layers[0].name], strict=True)
            left_alone[full_name] = "; ".join(f"{c.name}: {why}" for c, why in reasons) or "the chain is empty"
        if engine.chain and engine.chain[-1].comes_last and parameter.requires_grad and id(parameter) in held:
            left_alone[full_name] += f"; {engine.chain[-1].name} scales it all the same"
    return Report(conditioned, left_alone)


def _is_taken(parameter: nn.Parameter, assignment: Assignment, engine: Engine) -> bool:
    if any(parameter is weight for weight in assignment.weights):
        return True
    return any(engine.chain[i].acts_on_bias for i in assignment.members)


def _why_no_layer(model: nn.Module, module: nn.Module, parameter: nn.Parameter) -> str:
    layers = layers_of(module)
    if isinstance(layers, str):
        return layers
    if not any(parameter is own for layer in layers for own in layer.weights + layer.biases):
        return f"it is in no row of {type(module).__name__}"
    shared = sum(parameter is other for *_, other in owners(model)) > 1
    return f"{'it' if shared else 'a parameter beside it'} is shared by several modules"
