"""A problem file: a small convolutional network on the digits."""

from digits import he_init_, loss_fn, split
from torch import Tensor, nn

__all__ = ["build_model", "load_data", "loss_fn"]


def build_model() -> nn.Sequential:
    """Two 3 x 3 convolutions, the second with stride 2, and a linear layer on the 12 x 3 x 3 that remain."""
    return he_init_(
        nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 3 * 3, 10),
        )
    )


def load_data() -> list[tuple[Tensor, Tensor]]:
    """The first 250 training images as one batch: second derivatives of convolutions are slow on a CPU."""
    x, y, _, _ = split()
    return [(x[:250], y[:250])]
