"""The networks whose curvature `curvature_cost.py` and `curvature_scale.py` measure, and what is known of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from curvature_peers import Batches, Product, flat, split, trainable
from step_models import perceptron, resnet18
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional


class Block(nn.Module):
    """Causal attention and a feed-forward part, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """What the two parts add to x (batch, tokens, width)."""
        parts = self.attention(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        query, key, value = parts.unbind(2)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mixed(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class GPT(nn.Module):
    """A decoder over byte values; its logits are (batch * tokens, 256)."""

    def __init__(self, width: int, depth: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, width), nn.Parameter(torch.zeros(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the byte after each of x (batch, tokens)."""
        h = self.blocks(self.embedding(x) + self.positions[: x.shape[1]])
        logits: Tensor = self.out(self.norm(h)).flatten(0, 1)
        return logits


@dataclass(frozen=True)
class Problem:
    """A network in eval mode, its loss cross-entropy, and random batches of the shape it takes."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a batch
    eigenvalues: bool = False  # whether thousands of products are affordable
    trace: bool = False  # whether all n columns are

    def model(self) -> nn.Module:
        """The same draw every time."""
        torch.manual_seed(0)
        return self.build().eval()

    def data(self, batches: int) -> Batches:
        """That many batches, the same draws every time."""
        generator = torch.Generator().manual_seed(1)
        return [self._batch(generator) for _ in range(batches)]

    def _batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if len(self.shape) == 2 and self.build in (small_gpt, large_gpt):
            tokens = torch.randint(256, self.shape, generator=generator)
            return tokens, tokens.roll(-1, 1).flatten()
        targets = torch.randint(10, self.shape[:1], generator=generator)
        return torch.randn(self.shape, generator=generator), targets


def tiny() -> nn.Module:
    """20-16-10, 506 parameters."""
    return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 10))


def small_gpt() -> nn.Module:
    """Two layers of width 64."""
    return GPT(64, 2, 4, 64)


def large_gpt() -> nn.Module:
    """Six layers of width 384, 10.9 million parameters."""
    return GPT(384, 6, 6, 256)


PROBLEMS = {
    "tiny": Problem("20-16-10, batch 64", tiny, (64, 20), eigenvalues=True, trace=True),
    "mlp": Problem(
        "784-100-100-100-10, batch 128", lambda: perceptron(nn.Identity, True), (128, 784), eigenvalues=True
    ),
    "resnet": Problem("ResNet-18, width 16, batch 8", lambda: resnet18(nn.BatchNorm2d, False, 16), (8, 3, 32, 32)),
    "gpt": Problem("GPT, 2 layers of width 64, batch 4 x 64", small_gpt, (4, 64)),
}


def reference(kind: str, model: nn.Module, data: Batches) -> Product:
    """The product on all batches concatenated, by double backward in float64."""
    model = copy.deepcopy(model).double()
    parameters = trainable(model)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    output = model(x.double() if x.is_floating_point() else x)
    if kind == "Hessian":
        loss = functional.cross_entropy(output, y)
        gradient = grad(loss, parameters, create_graph=True)
        return lambda v: flat(grad(gradient, parameters, split(v.double(), parameters), retain_graph=True))
    leaf = output.detach().requires_grad_()
    slope = grad(functional.cross_entropy(leaf, y), leaf, create_graph=True)[0]
    dummy = torch.zeros_like(output, requires_grad=True)
    pulled = grad(output, parameters, dummy, create_graph=True)

    def product(v: Tensor) -> Tensor:
        pushed = grad(pulled, dummy, split(v.double(), parameters), retain_graph=True)
        bent = grad(slope, leaf, pushed, retain_graph=True)
        return flat(grad(output, parameters, bent, retain_graph=True))

    return product


class Matrix:
    """A dense symmetric matrix as every library takes an operator, counting its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device
        self.count = 0

    def __matmul__(self, v: Tensor) -> Tensor:
        self.count += 1 if v.ndim == 1 else v.shape[1]
        return self.matrix @ v

    def to_scipy(self) -> object:
        """For ARPACK."""
        from scipy.sparse.linalg import LinearOperator

        return LinearOperator(self.shape, matvec=lambda v: (self @ torch.from_numpy(v)).numpy(), dtype=np.float64)


def known_spectrum() -> tuple[Tensor, Tensor]:
    """A bulk Z Z^T / 800, Z 800 x 400 Gaussian, with the outliers 20 and 10; and its eigenvalues."""
    Z = torch.randn(800, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = Z @ Z.mT / 800
    A[0, 0], A[1, 1] = A[0, 0] + 20, A[1, 1] + 10
    return A, torch.linalg.eigvalsh(A)
