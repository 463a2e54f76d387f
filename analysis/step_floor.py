"""The least that Batch Normalization Preconditioning of a perceptron can take with PyTorch's operations.

Straight-line code for one optimizer, one network of Linear layers with biases and one batch size: the inputs are
kept until the step, their moments are taken and folded for all layers together, and three operations a layer change
the gradients. There is none of what a library owes its users: no look for numbers that are not finite or for
variances that rounding has eaten, no rows that do not count, no checkpoints, no second optimizer or process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DECAY, EPS_REL, EPS = 0.99, 1e-2, 1e-4


class ByHand:
    """An optimizer whose gradients it conditions before it steps.

    Args:
        optimizer: of a network of Linear layers.
        model: the network.
        rows: of a batch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, rows: int) -> None:
        self.optimizer, self.zero_grad = optimizer, optimizer.zero_grad
        self.layers: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.inputs: list[Tensor] = []
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, output: self.inputs.append(args[0]))
        sizes, device = [layer.in_features for layer in self.layers], next(model.parameters()).device
        self.squares, self.steps = [max(size / rows, 1.0) for size in sizes], 0
        with device:
            self.owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
            self.mean, self.variance, self.metric = torch.zeros(sum(sizes)), *torch.ones(2, sum(sizes))
            self.scale, self.largest = torch.tensor(self.squares)[self.owner], torch.zeros(len(sizes))
        self.views = list(zip(self.layers, self.mean.split(sizes), self.metric.split(sizes), strict=True))

    @torch.no_grad()
    def step(self) -> None:
        """Fold, change, step."""
        x = torch.cat(self.inputs, 1)
        self.inputs.clear()
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        self.steps += 1
        a = (1 - DECAY) / (1 - DECAY**self.steps)
        d = mean - self.mean
        self.mean.lerp_(mean, a)
        self.variance.lerp_(variance, a).addcmul_(d, d, value=a * (1 - a))
        largest = self.largest.zero_().scatter_reduce_(0, self.owner, self.variance, "amax")
        torch.add(self.variance, largest.index_select(0, self.owner), alpha=EPS_REL, out=self.metric)
        self.metric.add_(EPS).mul_(self.scale).reciprocal_()
        for (layer, mu, metric), square in zip(self.views, self.squares, strict=True):
            weight, bias = layer.weight.grad, layer.bias.grad
            weight.addr_(bias, mu, alpha=-1).mul_(metric)
            bias.addmv_(weight, mu, beta=1 / square, alpha=-1)
        self.optimizer.step()
