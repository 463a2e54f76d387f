"""What conditioners keep of each layer: how it is copied, and how a saved one is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcond.assignment import Assignment
from gradcond.conditioner import Conditioner
from gradcond.layers import Layer

__all__ = ["State", "as_trained", "check_saved", "check_states", "copied", "kept", "loaded_states", "saved_state"]

State = dict[str, dict[str, Any]]  # of one conditioner: layer name -> its tensors and numbers


def copied(state: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """One layer's state with tensors of its own; what starts with "_" can be computed again, and is left out.

    Example:
        >>> copied({"steps": 3, "_metric": None})
        {'steps': 3}
    """
    return {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in kept(state).items()}


def kept(state: Mapping[str, Any]) -> dict[str, Any]:
    """One layer's state without what can be computed again."""
    return {k: v for k, v in state.items() if not k.startswith("_")}


def as_trained(state: Mapping[str, Any], has_bias: bool) -> dict[str, Any]:
    """One layer's state without its bias, if that has been frozen since the last step."""
    return {**state, "has_bias": False} if state.get("has_bias") and not has_bias else dict(state)


def saved_state(
    chain: Sequence[Conditioner],
    states: Sequence[State],
    network: Sequence[Mapping[str, Any]],
    assigned: Sequence[Assignment],
) -> dict[str, Any]:
    """What a checkpoint keeps of a chain: plain dictionaries of tensors, numbers and strings."""
    entries = []
    for i, conditioner in enumerate(chain):
        names = dict.fromkeys([a.layer.name for a in assigned if i in a.members] + list(states[i]))
        layers = {name: copied(states[i].get(name, {})) for name in names}
        entry = {"name": conditioner.name, "settings": conditioner.settings(), "layers": layers}
        entries.append(entry | {"network": copied(network[i])})
    return {"format": 1, "chain": entries, "layers": {a.layer.name: bool(a.biases) for a in assigned}}


def loaded_states(state: Mapping[str, Any], layers: Mapping[str, Layer]) -> list[State]:
    """The layers' states of a saved one, each on its layer's device."""
    return [
        {name: copied(saved, layers[name].weights[0].device) for name, saved in entry["layers"].items() if saved}
        for entry in state["chain"]
    ]


def check_saved(state: Mapping[str, Any], chain: Sequence[Conditioner], layers: Mapping[str, Layer]) -> None:
    """Raises ValueError for a saved state that is not of this chain and model."""
    if state.get("format") != 1:
        raise ValueError(
            f"expected a gradcond state of format 1, got {state.get('format')!r}; it was saved by another "
            "version of gradcond"
        )
    names, saved = [c.name for c in chain], [entry["name"] for entry in state["chain"]]
    if names != saved:
        raise ValueError(
            f"the saved state is of the chain {saved}, this optimizer has {names}; wrap the optimizer with "
            "the conditioners that the state was saved with, in their order"
        )
    for conditioner, entry in zip(chain, state["chain"], strict=True):
        conditioner.check(entry["settings"])
        taps = entry["settings"].get("taps", False)
        if taps != conditioner.taps:
            raise ValueError(
                f"the saved state is of {conditioner.name}(taps={taps}), this optimizer has {conditioner.taps}; "
                "wrap the optimizer with the setting that the state was saved with"
            )
    check_states(layers, chain, state)


def check_states(layers: Mapping[str, Layer], chain: Sequence[Conditioner], state: Mapping[str, Any]) -> None:
    """Raises ValueError when a saved state names a layer the model lacks, or holds a tensor of another shape."""
    for name in (*state["layers"], *(name for entry in state["chain"] for name in entry["layers"])):
        if name not in layers:
            raise ValueError(
                f"the saved gradcond state holds layer {name!r}, which this model does not have as a layer of "
                f"its own; it has {list(layers)[:8]}. Build the model that the state was saved with"
            )
    for conditioner, entry in zip(chain, state["chain"], strict=True):
        for name, saved in entry["layers"].items():
            for key, shape in conditioner.shapes(layers[name]).items():
                if key in saved and tuple(saved[key].shape) != shape:
                    raise ValueError(
                        f"{conditioner.name}: {key} of layer {name!r} must have shape {shape}, got "
                        f"{tuple(saved[key].shape)}; build the model that the state was saved with"
                    )
