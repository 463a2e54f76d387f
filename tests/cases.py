"""The table of cases: every conditioner and every layer type, one row each. The laws are tested on all pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import gradcond
from gradcond import (
    BNP,
    Conditioner,
    GradientCentralization,
    MeanShiftRejection,
    NormClipping,
    RateDamping,
    WeightCentralization,
    WeightStandardization,
)


@dataclass(frozen=True)
class Case:
    chain: Callable[[], list[Conditioner]]
    is_projection: bool = False  # M M = M
    depends_on_weights: bool = False  # M moves with the weights, so it is taken before the step


CHAINS = {
    "bnp": Case(lambda: [BNP()]),
    "bnp-center": Case(lambda: [BNP(standardize=False)]),
    "bnp-scale": Case(lambda: [BNP(center=False, scale="batch", start="first_batch")]),
    "bnp-paper": Case(lambda: [BNP(start="paper", scale=None, eps_rel=0, eps=0)]),
    "gc": Case(lambda: [GradientCentralization()], is_projection=True),
    "gc-conv": Case(lambda: [GradientCentralization(conv_only=True)], is_projection=True),
    "gc-output": Case(lambda: [GradientCentralization(side="output")], is_projection=True),
    "gc-both": Case(lambda: [GradientCentralization(side="both")], is_projection=True),
    "msr": Case(lambda: [MeanShiftRejection()]),
    "msr-full": Case(lambda: [MeanShiftRejection(rejection=1.0)], is_projection=True),
    "msr-rescaled": Case(lambda: [MeanShiftRejection(rescale=True)]),
    "ws": Case(lambda: [WeightStandardization()], depends_on_weights=True),
    "ws-gain": Case(lambda: [WeightStandardization(gain=0.5)], depends_on_weights=True),
    "wc": Case(lambda: [WeightCentralization()], is_projection=True),
    "bnp+gc": Case(lambda: [BNP(), GradientCentralization()]),
    "gc+bnp": Case(lambda: [GradientCentralization(), BNP()]),
    "bnp+msr+gc": Case(lambda: [BNP(), MeanShiftRejection(), GradientCentralization(side="both")]),
    "damping": Case(lambda: [RateDamping(strength=50.0, delay=3.0)]),
    "bnp+damping": Case(lambda: [BNP(), RateDamping()]),
    "msr+clipping": Case(lambda: [MeanShiftRejection(), NormClipping()]),
    "bnp+msr+damping+clipping": Case(lambda: [BNP(), MeanShiftRejection(), RateDamping(), NormClipping()]),
    "none": Case(lambda: [], is_projection=True),
}


@dataclass(frozen=True)
class LayerCase:
    build: Callable[[bool], nn.Module]  # bias -> module
    input_shape: tuple[int, ...]


LAYERS = {
    "linear": LayerCase(lambda b: nn.Linear(5, 4, bias=b), (6, 5)),
    "linear-one-unit": LayerCase(lambda b: nn.Linear(3, 1, bias=b), (6, 3)),
    "linear-one-input": LayerCase(lambda b: nn.Linear(1, 4, bias=b), (6, 1)),
    "linear-rank3": LayerCase(lambda b: nn.Linear(5, 3, bias=b), (2, 3, 5)),
    "linear-unbatched": LayerCase(lambda b: nn.Linear(5, 4, bias=b), (5,)),
    "conv1d": LayerCase(lambda b: nn.Conv1d(3, 4, 3, stride=2, padding=1, bias=b), (2, 3, 7)),
    "conv2d": LayerCase(lambda b: nn.Conv2d(2, 3, (3, 2), dilation=2, bias=b), (2, 2, 7, 6)),
    "conv2d-1x1": LayerCase(lambda b: nn.Conv2d(3, 4, 1, bias=b), (2, 3, 3, 3)),
    "conv2d-groups": LayerCase(lambda b: nn.Conv2d(4, 6, 3, groups=2, padding="same", bias=b), (2, 4, 5, 5)),
    "conv2d-depthwise": LayerCase(lambda b: nn.Conv2d(3, 3, 3, groups=3, bias=b), (2, 3, 5, 5)),
    "conv2d-multiplier": LayerCase(lambda b: nn.Conv2d(2, 4, 3, groups=2, bias=b), (1, 2, 5, 5)),
    "conv2d-unbatched": LayerCase(lambda b: nn.Conv2d(2, 3, 3, bias=b), (2, 5, 5)),
    "conv2d-reflect": LayerCase(
        lambda b: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=b), (2, 2, 5, 5)
    ),
    "conv3d": LayerCase(lambda b: nn.Conv3d(2, 2, 2, bias=b), (2, 2, 3, 4, 3)),
    "transposed1d": LayerCase(lambda b: nn.ConvTranspose1d(3, 4, 3, stride=2, bias=b), (2, 3, 5)),
    "transposed2d": LayerCase(
        lambda b: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1, bias=b), (2, 4, 3, 3)
    ),
    "transposed2d-depthwise": LayerCase(lambda b: nn.ConvTranspose2d(3, 3, 2, groups=3, bias=b), (2, 3, 4, 4)),
    "transposed3d": LayerCase(lambda b: nn.ConvTranspose3d(2, 3, 2, padding=1, bias=b), (2, 2, 3, 3, 4)),
}


def build(layer: str, bias: bool, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A model of one layer, and inputs whose channels differ in mean and in scale."""
    torch.manual_seed(seed)
    case = LAYERS[layer]
    model = nn.Sequential(case.build(bias))
    taps = model[0].weight.dim() - 2
    axis = len(case.input_shape) - 1 - taps
    channels = case.input_shape[axis]
    shape = [channels if i == axis else 1 for i in range(len(case.input_shape))]
    mean, scale = torch.linspace(1.0, 3.0, channels), torch.logspace(-0.5, 0.5, channels)
    return model, mean.view(shape) + scale.view(shape) * torch.randn(case.input_shape)


def backward(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Fresh gradients of a loss with curvature in the output; returns copies of them."""
    model.zero_grad()
    (model(x) ** 3).mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def wrapped(model: nn.Module, chain: list[Conditioner], lr: float = 1.0) -> gradcond.ConditionedOptimizer:
    return gradcond.wrap(torch.optim.SGD(model.parameters(), lr=lr), model, chain)


def stepped(chain: str, layer: str, bias: bool):
    """One step of SGD(lr=1): the optimizer, its M, the raw and the conditioned gradient, flat."""
    model, x = build(layer, bias)
    optimizer = wrapped(model, CHAINS[chain].chain())
    raw = flat(backward(model, x))
    before = optimizer.preconditioner()
    optimizer.step()
    m = before if CHAINS[chain].depends_on_weights else optimizer.preconditioner()
    return optimizer, m, raw, flat([p.grad for p in model.parameters()])
