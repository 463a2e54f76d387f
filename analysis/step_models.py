"""The networks whose training steps `step_cost.py` measures, each with and without normalization layers.

A network with normalization layers is the plain one with the layers put in: nothing else differs, biases included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

Norm = Callable[[int], nn.Module]  # number of channels -> the layer that follows


def _block(*layers: nn.Module) -> nn.Sequential:
    """Layers in a row; an Identity would cost the plain network a call."""
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))


def six_convolutions(norm: Norm, bias: bool) -> nn.Module:
    """3-32-32-64-64-128-128 on 32 x 32 images, pooled after every second layer."""
    widths = [3, 32, 32, 64, 64, 128, 128]
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), norm(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
    return _block(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))


def perceptron(norm: Norm, bias: bool) -> nn.Module:
    """784-100-100-100-10 with ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((784, 100), (100, 100), (100, 100)):
        layers += [nn.Linear(inputs, outputs, bias), norm(outputs), nn.ReLU()]
    return _block(*layers, nn.Linear(100, 10))


class Residual(nn.Module):
    """The basic block of a ResNet: two 3 x 3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, bias: bool) -> None:
        super().__init__()
        self.body = _block(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias),
            norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=bias),
            norm(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = _block(*() if same else (nn.Conv2d(inputs, outputs, 1, stride, bias=bias), norm(outputs)))

    def forward(self, x: Tensor) -> Tensor:
        """What the body adds to x, rectified."""
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet18(norm: Norm, bias: bool, width: int = 64) -> nn.Module:
    """He, Zhang, Ren, Sun, https://arxiv.org/abs/1512.03385, with the 3 x 3 stem for 32 x 32 images."""
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=bias), norm(width), nn.ReLU()]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Residual(inputs, outputs, stride, norm, bias), Residual(outputs, outputs, 1, norm, bias)]
        inputs = outputs
    return _block(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


class SelfAttention(nn.Module):
    """Four heads over projections that are Linear layers of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Attention of x (batch, tokens, width) to itself."""
        heads = [p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)]
        mixed: Tensor = functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MultiheadSelfAttention(nn.Module):
    """torch's module, attending to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of x (batch, tokens, width) to itself."""
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return mixed


class TransformerLayer(nn.Module):
    """Attention and a feed-forward part, each behind a normalization layer."""

    def __init__(self, width: int, norm: Norm, attention: str) -> None:
        super().__init__()
        self.attention = SelfAttention(width) if attention == "linear" else MultiheadSelfAttention(width)
        self.norms = nn.ModuleList([norm(width), norm(width)])
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """What attention and the feed-forward part add to x."""
        x = x + self.attention(self.norms[0](x))
        return x + self.feed_forward(self.norms[1](x))


def transformer(norm: Norm, bias: bool, attention: str = "linear") -> nn.Module:
    """Four layers of width 256 over 256 byte values, feed-forward 1024."""
    layers = [TransformerLayer(256, norm, attention) for _ in range(4)]
    return nn.Sequential(nn.Embedding(256, 256), *layers, norm(256), nn.Linear(256, 256), nn.Flatten(0, 1))


@dataclass(frozen=True)
class Case:
    """A network, its batch, and the normalization layers it is compared with (the first is the yardstick)."""

    title: str
    build: Callable[..., nn.Module]  # norm, bias -> network
    shape: tuple[int, ...]  # of the input
    classes: int
    norms: dict[str, Norm]

    def data(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A random batch: images, or tokens that name the ones after them."""
        if self.build is transformer:
            tokens = torch.randint(self.classes, self.shape, device=device)
            return tokens, tokens.roll(-1, 1).flatten()
        return torch.randn(self.shape, device=device), torch.randint(self.classes, self.shape[:1], device=device)


def _image_norms(groups: int) -> dict[str, Norm]:
    return {"BatchNorm": nn.BatchNorm2d, "GroupNorm": lambda channels: nn.GroupNorm(groups, channels)}


_FLAT: dict[str, Norm] = {"BatchNorm": nn.BatchNorm1d, "GroupNorm": lambda width: nn.GroupNorm(10, width)}
_ROW: dict[str, Norm] = {"LayerNorm": nn.LayerNorm, "GroupNorm": _FLAT["GroupNorm"]}

CASES = {
    "a": Case("six convolutions, batch 128", six_convolutions, (128, 3, 32, 32), 10, _image_norms(8)),
    "b128": Case("784-100-100-100-10, batch 128", perceptron, (128, 784), 10, _FLAT),
    "b6": Case("784-100-100-100-10, batch 6", perceptron, (6, 784), 10, _FLAT),
    # one row has no batch statistics
    "b1": Case("784-100-100-100-10, batch 1", perceptron, (1, 784), 10, _ROW),
    "c": Case("ResNet-18 for 32 x 32 images, batch 128", resnet18, (128, 3, 32, 32), 10, _image_norms(32)),
    "d": Case("4-layer transformer, batch 16 x 128", transformer, (16, 128), 256, {"LayerNorm": nn.LayerNorm}),
}
