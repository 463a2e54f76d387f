"""Estimates from random samples, with standard errors and intervals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate (of the square, for a norm); exact, with standard error zero, where the budget allows.

    Example:
        >>> from gradcond.curvature import trace
        >>> trace(torch.eye(9), num_matvecs=3)  # every probe gives 9
        Estimate(estimate=tensor(9., dtype=torch.float64), std_error=tensor(0., ...), num_matvecs=3, samples=3, ...)
    """

    estimate: Tensor  # () for a trace or a norm, (n,) for a diagonal
    std_error: Tensor  # of the same shape; nan after a single probe
    num_matvecs: int
    samples: int  # how many the standard error is taken over
    skewness: Tensor | float = 0.0  # of the samples; positive, when a few large ones may be missing

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """The ends of Student's confidence interval, with samples - 1 degrees of freedom, mended for skewness.

        Samples are sums of squares, and their mean is too small more often than not, with a standard error that
        is too small as well. With their skewness g and m of them, T = (mean - truth) / std_error is mapped to

            T + g (T^2 / 3 + 1/6) / m^1/2 + g^2 T^3 / (27 m),

        which is symmetric to order 1/m, increasing in T, and turned back in closed form. From eight samples on an
        interval of 95 % covers 92 to 97 % (of 1000 runs, measured), from four 88 to 96 %.

        References:
            P. Hall, On the removal of skewness by transformation, 1992.

        Example:
            >>> low, high = Estimate(torch.tensor(9.0), torch.tensor(1.0), 3, samples=3).interval(0.9)
            >>> print(f"{low:.2f} {high:.2f}")
            6.08 11.92
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {confidence}")
        reach = float(stdtrit(max(self.samples - 1, 1), (1 + confidence) / 2))
        return tuple(self.estimate - self.std_error * self._turned_back(y) for y in (reach, -reach))  # type: ignore

    def _turned_back(self, y: float) -> Tensor:
        """The T that is mapped to y."""
        skewness = torch.as_tensor(self.skewness, dtype=torch.float64, device=self.estimate.device)
        s = skewness / (3 * self.samples**0.5)
        cube = 1 + 3 * s * (y - s / 2)
        T = (cube.sign() * cube.abs() ** (1 / 3) - 1) / s
        return torch.where(s.abs() > 1e-8, T, y)


@dataclass(frozen=True)
class NormEstimate(Estimate):
    """The root of an estimated square.

    Example:
        >>> square = Estimate(torch.tensor(9.0), torch.tensor(1.0), 3, samples=3)
        >>> print(f"{NormEstimate.of(square).estimate:.1f}")
        3.0
    """

    square: Estimate | None = None

    @classmethod
    def of(cls, square: Estimate) -> NormEstimate:
        """With half the relative standard error."""
        root = square.estimate.clamp(min=0).sqrt()
        error = square.std_error / (2 * root).clamp(min=torch.finfo(torch.float64).tiny)
        return cls(root, error, square.num_matvecs, square.samples, square.skewness, square)

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """The roots of the ends of the square's interval."""
        assert self.square is not None
        low, high = (end.clamp(min=0).sqrt() for end in self.square.interval(confidence))
        return low, high


class Moments:
    """Running mean, and sums of squared and cubed deviations, block by block (Chan, Golub, LeVeque; Pebay)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares, self.cubes = 0, *torch.zeros(3, device="cpu")

    def add(self, samples: Tensor) -> None:
        """Take samples (b, ...)."""
        size, center = len(samples), samples.mean(0)
        total, a, b = self.count + size, self.count / (self.count + size), size / (self.count + size)
        squares, cubes = (((samples - center) ** power).sum(0) for power in (2, 3))
        mean, own = self.mean.to(center), self.squares.to(center)
        shift = center - mean
        cubes = cubes + self.cubes.to(center) + shift**3 * total * a * b * (a - b)
        self.cubes = cubes + 3 * shift * (a * squares - b * own)
        self.squares = own + squares + shift**2 * total * a * b
        self.mean, self.count = mean + b * shift, total

    @property
    def std_error(self) -> Tensor:
        """Of the mean; nan for one sample."""
        if self.count == 1:
            return torch.full_like(self.mean, torch.nan)
        return (self.squares / (self.count - 1) / self.count).sqrt()

    @property
    def skewness(self) -> Tensor:
        """The mean cube over the mean square to 3/2; 0 without a spread."""
        spread = (self.squares / self.count) ** 1.5
        return torch.where(spread > 0, self.cubes / self.count / spread, 0.0)
