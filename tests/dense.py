"""BNP's matrix of a model, written out from rows of inputs: what tests of layer types compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import gradcond
from gradcond import BNP

Unit = tuple[Tensor, Tensor, Tensor]  # flat places of a row's weights, of its biases, and M over [bias, weights]


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the columns of a design matrix."""
    mean = rows.sum(0) / len(rows)
    return mean, (rows - mean).square().sum(0) / len(rows)


def damped(variance: Tensor, eps_rel: float = 1e-2, eps: float = 1e-4) -> Tensor:
    return variance + eps_rel * variance.max() + eps


def row_matrix(mean: Tensor, s2: Tensor, n: int, bias: bool) -> Tensor:
    """M on one row [bias, weights], from the mean and the damped variance of its inputs and n rows."""
    q2 = max(len(mean) / n, 1.0)
    if not bias:
        return torch.linalg.inv(torch.diag(s2) + torch.outer(mean, mean)) / q2
    u = torch.eye(len(mean) + 1)
    u[0, 1:] = -mean
    p = u @ torch.diag(torch.cat([torch.ones(1), s2.rsqrt()])) / q2**0.5
    return p @ p.mT


def places(model: nn.Module) -> dict[str, Tensor]:
    """For each parameter, where its entries are in the flat vector of all."""
    found, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = start + torch.arange(parameter.numel()).view(parameter.shape)
            start += parameter.numel()
    return found


def assemble(n: int, units: Iterable[Unit]) -> Tensor:
    """The block-diagonal matrix of these units, the identity elsewhere; several biases share their direction."""
    dense = torch.eye(n)
    for weights, biases, m in units:
        k = biases.numel()
        spread = torch.zeros(k + weights.numel(), len(m))  # from [bias, weights] to all of the parameters
        spread[:k, : min(k, 1)] = 1 / max(k, 1)
        spread[k:, min(k, 1) :] = torch.eye(weights.numel())
        place = torch.cat([biases.reshape(-1), weights.reshape(-1)])
        dense[place[:, None], place] = spread @ m @ spread.mT
    return dense


def units_of(weight: Tensor, biases: list[Tensor], rows: Tensor) -> list[Unit]:
    """All units of a dense layer, whose weight's places are (units, inputs), on rows (n, inputs)."""
    mean, variance = moments(rows)
    m = row_matrix(mean, damped(variance), len(rows), bool(biases))
    none = torch.zeros(0, dtype=torch.long)
    return [(weight[i], torch.stack([b[i] for b in biases]) if biases else none, m) for i in range(weight.shape[0])]


def is_transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


@torch.no_grad()
def unfolded(module: nn.Module, x: Tensor) -> Tensor:
    """The design matrix (rows, groups, fan-in) of a convolution: what it puts out when one weight of a row is 1."""
    groups, kernel = module.groups, module.weight.shape[2:]
    inputs = module.in_channels // groups
    saved, columns = [p.clone() for p in module.parameters()], []
    if module.bias is not None:
        module.bias.zero_()
    for channel, *tap in product(range(inputs), *map(range, kernel)):
        module.weight.zero_()
        where = slice(channel, None, inputs) if is_transposed(module) else slice(None)
        within = slice(None) if is_transposed(module) else channel
        module.weight[(where, within, *tap)] = 1.0
        y = module(x).movedim(-1 - len(kernel), -1).flatten(0, -2)
        columns.append(y[:, :: module.out_channels // groups])
    for parameter, value in zip(module.parameters(), saved, strict=True):
        parameter.copy_(value)
    return torch.stack(columns, -1)


def conv_units(module: nn.Module, x: Tensor, *, taps: bool = False) -> list[Unit]:
    """All units of a convolution that is the only module of a model; moments per channel or per column."""
    index, design = places(module), unfolded(module, x)
    groups, kernel = module.groups, module.weight.shape[2:]
    if taps and is_transposed(module):  # the positions between a stride's are no inputs
        met = unfolded(module, torch.ones_like(x)).flatten(1)
        n = met.sum(0).clamp_min(1)
        mean = design.flatten(1).sum(0) / n
        variance = ((design.flatten(1) - mean) * met).square().sum(0) / n
    elif taps:
        mean, variance = moments(design.flatten(1))
    else:
        channels = x.movedim(-1 - len(kernel), -1).flatten(0, -2)
        mean, variance = (m.repeat_interleave(kernel.numel()) for m in moments(channels))
    means, s2s = mean.view(groups, -1), damped(variance).view(groups, -1)
    units, per_group, inputs = [], module.out_channels // groups, module.in_channels // groups
    for unit in range(module.out_channels):
        g, within = divmod(unit, per_group)
        m = row_matrix(means[g], s2s[g], len(design), module.bias is not None)
        weight = index["weight"]
        row = weight[g * inputs : (g + 1) * inputs, within] if is_transposed(module) else weight[unit]
        bias = index["bias"][unit : unit + 1] if module.bias is not None else torch.zeros(0, dtype=torch.long)
        units.append((row, bias, m))
    return units


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def check(
    model: nn.Module, loss: Callable[[], Tensor], units: Iterable[Unit], **settings
) -> gradcond.ConditionedOptimizer:
    """One step of SGD(lr=1) with BNP is the dense matrix times the gradient, and M, P, P^T agree with it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = gradcond.wrap(torch.optim.SGD(parameters, lr=1.0), model, [BNP(decay=0.0, **settings)])
    loss().backward()
    before, raw = flat(parameters), flat(p.grad for p in parameters)
    optimizer.step()
    expected = assemble(len(raw), units)
    tolerance = dict(rtol=1e-8, atol=1e-10 * expected.abs().max().item())
    m, eye = optimizer.preconditioner(), torch.eye(len(raw))
    assert_close(m.apply(eye), expected, **tolerance)
    factor = m.factor(eye)
    assert_close(m.factor_transpose(eye), factor.mT, **tolerance)
    assert_close(factor @ factor.mT, expected, **tolerance)
    step = expected @ raw
    assert_close(before - flat(parameters), step, rtol=1e-8, atol=1e-10 * (1 + step.abs().max().item()))
    return optimizer
