"""Data-dependent initialization: scale each layer once, so that its outputs on a batch have variance one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradcond.layers import Layer, find_layers, has_lazy
from gradcond.shards import is_sharded

__all__ = ["unit_variance_init_"]


def unit_variance_init_(model: nn.Module, batch: Any) -> dict[str, float]:
    r"""Scales every Linear and convolution once so that its output on a batch has variance one.

    In the order in which the model runs them, each layer's weight and bias are divided by the standard deviation
    of its output over all samples, positions and units,

        W <- W / s,   b <- b / s,   s^2 = Var[W x + b],   x the input that the layers before it, rescaled, make.

    The output is linear in (W, b), so one pass makes every variance exactly one; dividing W alone, as in the
    paper, where biases are zero, would leave it off one. Afterwards activations neither vanish nor explode with
    depth, which is what a conditioner of gradients cannot mend. A layer that is called several times is scaled
    by its first call. Layers that share or compute a weight, or have a frozen weight or bias, keep theirs.

    The model runs in eval mode and without grad; its modes, buffers, gradients and the random state are left as
    they were. Before DistributedDataParallel, torch.compile or sharding, not after.

    Args:
        model: changed in place.
        batch: its input: a tensor, a tuple or list of positional inputs, or a dict of keyword inputs; no targets.

    Returns:
        Module name -> the factor 1 / s that its parameters were multiplied with, in the order of execution. Layers
        that the batch never reached are named by a warning.

    Raises:
        TypeError: for a batch of another kind; for a model in DistributedDataParallel, or sharded.
        ValueError: for a layer whose weight is zero, whose output has a variance that is zero or not finite or
            does not scale with its weight; for lazy modules without a shape, and when no layer ran. Nothing has
            been changed then.

    References:
        Mishkin, Matas, "All you need is a good init", ICLR 2016, https://arxiv.org/abs/1511.06422, Algorithm 1
        without its orthonormal start.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
        >>> for parameter in model.parameters():
        ...     _ = nn.init.constant_(parameter, 0.5)
        >>> unit_variance_init_(model, torch.tensor([[0.0], [8.0]]))  # outputs 0, 4, then 0.5, 1.5
        {'0': 0.5, '2': 2.0}
        >>> model(torch.tensor([[0.0], [8.0]])).tolist()
        [[1.0], [3.0]]
    """
    args, kwargs = _inputs(batch)
    if isinstance(model, nn.parallel.DistributedDataParallel) or any(is_sharded(p) for p in model.parameters()):
        raise TypeError(
            f"unit_variance_init_: expected a model before DistributedDataParallel or fully_shard, got "
            f"{type(model).__name__}, whose ranks would be scaled by their own batches; call it first"
        )
    if has_lazy(model):
        raise ValueError(
            "unit_variance_init_: expected modules that have their shapes, got a lazy one; run the model once first"
        )
    layers = {
        name: layer
        for name, layer in find_layers(model).items()
        if (layer.convolution or isinstance(layer.module, nn.Linear))
        and all(parameter.requires_grad for parameter in _parameters(layer))
    }
    factors: dict[str, float] = {}
    with torch.no_grad(), _evaluated(model), _restored_on_error(layers):
        handles = [
            layer.module.register_forward_hook(_scaling(layer, factors), prepend=True, with_kwargs=True)
            for layer in layers.values()
        ]
        try:
            # on copies of the buffers, whatever the modules do with them; those of a shared module once
            copies = {name: b.clone() for name, b in model.named_buffers()}
            functional_call(model, copies, args, kwargs, tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()
    missed = [name for name in layers if name not in factors]
    if missed and not factors:
        raise ValueError(
            f"unit_variance_init_: expected the model to call its layers, but none of {missed[:5]} ran; pass the "
            "model before torch.compile, and a batch that is not empty"
        )
    if missed:
        warnings.warn(f"layers never called on this batch keep their weights: {', '.join(missed)}", stacklevel=2)
    return factors


def _inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword inputs."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise TypeError(
        "unit_variance_init_: expected a tensor, a tuple or list of positional inputs or a dict of keyword inputs, "
        f"got {type(batch).__name__}; put a single input of another kind in a tuple"
    )


def _parameters(layer: Layer) -> list[nn.Parameter]:
    weight, bias = layer.module.weight, layer.module.bias
    return [weight] if bias is None else [weight, bias]


def _scaling(layer: Layer, factors: dict[str, float]) -> Callable[..., Tensor | None]:
    """A forward hook that scales the layer at its first call and returns its new output."""

    def scale(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if layer.name in factors:
            return None
        deviation, noise = _deviation(output)
        if not noise < deviation < float("inf") or not bool(module.weight.any()):
            raise ValueError(
                f"unit_variance_init_: expected outputs of layer {layer.name!r} that vary with a finite variance, "
                f"got the standard deviation {deviation:.3g} (weight {_kind(module.weight)}); give the layer "
                "another start, look at the batch, or freeze its weight to leave it out"
            )
        factors[layer.name] = 1 / deviation
        for parameter in _parameters(layer):
            parameter.mul_(factors[layer.name])
        output = module.forward(*args, **kwargs)
        # wide, for half precision: a layer that standardizes its weight misses it by the whole factor
        if not abs(_deviation(output)[0] - 1) < 0.1:
            raise ValueError(
                f"unit_variance_init_: expected the output of layer {layer.name!r} ({type(module).__name__}) to "
                "scale with its weight and bias, and it does not; freeze its weight to leave it out"
            )
        return output

    return scale


def _kind(weight: Tensor) -> str:
    if not bool(weight.isfinite().all()):
        return "not finite"
    return "finite" if bool(weight.any()) else "zero"


def _deviation(output: Tensor) -> tuple[float, float]:
    """The standard deviation of all entries, and what rounding alone can make of a constant."""
    if output.numel() == 0:
        return 0.0, 0.0
    if output.is_nested:  # padded sequences, in a transformer's eval mode
        output = torch.cat(output.unbind())
    x = output.to(torch.promote_types(output.dtype, torch.float32))
    largest = x.abs().max()
    deviation = largest * (x / largest).std(correction=0)  # relative to the largest: squares cannot overflow
    return float(deviation), 2 * torch.finfo(output.dtype).eps * float(largest)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own mode and the random state put back."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module in modes:
            module.training = False
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _restored_on_error(layers: Mapping[str, Layer]) -> Iterator[None]:
    """Parameters go back to what they were, to the bit, when anything is raised."""
    saved = [(p, p.clone()) for layer in layers.values() for p in _parameters(layer)]
    try:
        yield
    except BaseException:
        for parameter, value in saved:
            parameter.copy_(value)
        raise
