"""A problem file: scikit-learn's handwritten digits (real scans, 8 x 8, pixels 0..16) and a ReLU network.

The pixels keep their raw scale and their means on purpose: that is the ill-conditioned input which normalization
layers, or gradient conditioning, put right.
"""

import torch
from torch import Tensor, nn

loss_fn = nn.CrossEntropyLoss()


def build_model() -> nn.Sequential:
    """The network, 64-32-32-10, in He initialization."""
    return he_init_(
        nn.Sequential(
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
    )


def he_init_(model: nn.Sequential) -> nn.Sequential:
    """Draws every weight from He's normal distribution and sets biases to zero; normalization layers stay."""
    for module in model:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same split every time: 1,437 training and 360 test images as (x_train, y_train, x_test, y_test)."""
    from sklearn.datasets import load_digits  # takes a second, and not all that build the model need the data

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.data, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def load_data() -> list[tuple[Tensor, Tensor]]:
    """The training set as one batch, over which curvature is measured."""
    x, y, _, _ = split()
    return [(x, y)]
