"""The correlation of a layer's inputs: what no scaling of them can mend, the floor of BNP.

Under squared error the Gauss-Newton block of a dense layer's unit is H^T H with rows [1, h]. With exact statistics
and no damping BNP leaves the correlation matrix of h, and a one for the bias; so kappa of the correlation matrix
is what remains, and only whitening (K-FAC) goes below. Without a trainable bias the mean stays in the rows: with C
this correlation matrix and v the means over the deviations, kappa is that of what BNP leaves there,

    (I + v v^T)^-1/2 (C + v v^T) (I + v v^T)^-1/2

(a batch norm that follows and takes the mean out is not looked at). In a recurrent layer H^T H is not all of the
block, as the steps of a sequence meet; what is told is of the rows [x_t, h_{t-1}] that BNP scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from input_rows import input_rows
from layer_blocks import LayerBlock
from torch import Tensor
from torch.nn import functional

from gradcond.layers import Layer

FLOOR = 8  # x the error: a singular value or a deviation below may be zero
NUMBERS = 1 << 22  # of the inputs that are decomposed at a time
LARGEST = 4000  # fan-in that is watched: above, the matrix takes too much memory and time


class InputCorrelation:
    """The correlation matrix of rows that come in parts, by its factor: R^T R = H^T H, H centered.

    QR decompositions of the rows under the factor so far square nothing, so that condition numbers up to 1/eps^2
    are told, where those of the matrix itself end at 1/eps.

    Args:
        bias: has the layer one? Without, it is the matrix that is left in its place.

    >>> correlation = InputCorrelation()
    >>> correlation.update(torch.tensor([[0.0, 1.0], [2.0, 2.0]]))
    >>> correlation.update(torch.tensor([[4.0, 1.0], [2.0, 0.0]]))
    >>> correlation.spectrum()[0].round(decimals=6)
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self, bias: bool = True) -> None:
        self.bias, self.rows, self.pieces, self.eps = bias, 0, 0, 0.0

    def update(self, x: Tensor) -> None:
        """Take the rows of x, (rows, inputs), too."""
        self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        x = x.detach().to("cpu", torch.float64)
        if not self.rows:
            self.inputs = x.shape[1]
            self.factor = x.new_zeros(0, x.shape[1] + 1)
        for piece in torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], 1).split(self._height(x.shape[1])):
            self.factor = torch.linalg.qr(torch.cat([self.factor, piece]), mode="r").R
            self.pieces += 1
        self.rows += len(x)

    @staticmethod
    def _height(inputs: int) -> int:
        return max(NUMBERS // (inputs + 1), inputs + 1)

    def spectrum(self) -> tuple[Tensor, float]:
        """Return the square roots of the eigenvalues of those inputs that vary, and the error of each."""
        own, mean = self.factor[1:, 1:], self.factor[0, 1:] / self.factor[0, 0]
        deviation = own.norm(dim=0) / self.rows**0.5
        size = mean.hypot(deviation)
        varies = deviation > FLOOR * self.eps * size
        if not bool(varies.any()):
            return own.new_zeros(0), 0.0
        scaled = own[:, varies] / own[:, varies].norm(dim=0)
        if not self.bias:
            scaled = _with_mean(scaled, (mean / deviation)[varies])
        values = torch.linalg.svdvals(scaled)
        values = functional.pad(values, (0, int(varies.sum()) - len(values)))  # zero where rows are few
        # rounding of the inputs, one by one, and of the decompositions, column by column
        inputs = self.eps * (1 + (len(values) / self.rows) ** 0.5)
        decompositions = torch.finfo(torch.float64).eps * (len(size) * self.pieces) ** 0.5
        return values, float((size / deviation)[varies].max()) * (inputs + decompositions)


def _with_mean(scaled: Tensor, v: Tensor) -> Tensor:
    """A factor of W (Z^T Z + v v^T) W, W = (I + v v^T)^-1/2 = I - v v^T / (root (root + 1)), from Z."""
    root = (1 + v.dot(v)).sqrt()
    return torch.cat([v[None] / root, scaled - torch.outer(scaled @ v, v / (root * (root + 1)))])


class OneHotCorrelation:
    """What is left of one-hot rows without a bias, such as those of an embedding, from how often each index comes.

    For frequencies p the second moments are diag(p), the variances p (1 - p). What BNP leaves of these is similar
    to the inverse of diag(1 - p) + s s^T, s = sqrt(p), whose eigenvalues are at most 2. One index stands for all
    that are as frequent, as the rest of them have 1 - p itself: at most sqrt(2 rows) are left, whatever the size of
    the vocabulary. Indices that never come, or always, do not vary and are left out. The padding index is the zero
    row.

    >>> correlation = OneHotCorrelation(5)
    >>> correlation.update(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    >>> (1 / correlation.spectrum()[0] ** 2).round(decimals=6)
    tensor([1.7500, 0.7500, 0.7500, 0.7500], dtype=torch.float64)
    """

    def __init__(self, inputs: int, padding: int | None = None) -> None:
        self.inputs, self.padding, self.rows = inputs, padding, 0
        self.counts = torch.zeros(inputs, dtype=torch.long)

    def update(self, x: Tensor) -> None:
        """Take the indices x, (rows,), too."""
        self.counts += torch.bincount(x.cpu(), minlength=self.inputs)
        self.rows += len(x)

    def spectrum(self) -> tuple[Tensor, float]:
        """Return the square roots of the eigenvalues of those inputs that vary, and the error of each."""
        counts = self.counts.clone()
        if self.padding is not None:
            counts[self.padding] = 0
        counts, equal = counts[(counts > 0) & (counts < self.rows)].unique(return_counts=True)
        if not len(counts):
            return torch.zeros(0, dtype=torch.float64), 0.0
        p, rest = counts.double() / self.rows, (self.rows - counts).double() / self.rows
        s = (equal * p).sqrt()
        inverse = torch.linalg.eigvalsh(torch.diag(rest) + torch.outer(s, s))
        values = torch.cat([inverse.flip(0), rest.repeat_interleave(equal - 1)]).rsqrt()
        # that of the inverse is eps x its size and the decomposition's length
        return values, torch.finfo(torch.float64).eps * len(p) * float(values.max()) ** 3


def condition(groups: Sequence[InputCorrelation | OneHotCorrelation], tol: float = 1e-2) -> dict[str, Any]:
    """Return kappa of the matrices of all groups together, over the nonzero eigenvalues.

    Inputs that vary by no more than rounding are left out. ``kappa`` is nan and ``resolved`` False where rounding
    hides the smallest eigenvalue; ``kappa_lower_bound`` holds in any case.
    """
    spectra = [group.spectrum() for group in groups]
    values, error = torch.cat([own for own, _ in spectra]), max(error for _, error in spectra)
    inputs = sum(group.inputs for group in groups)
    floor, kappa, bound = FLOOR * error, math.nan, 1.0
    above = values[values > floor]
    if len(above):
        top, least = float(above.max()), float(above.min())
        bound = max(1.0, ((top - error) / (least + error)) ** 2)
        kappa = (top / least) ** 2 if 2 * error <= tol * least else math.nan
    known = not math.isnan(kappa)
    return {
        "rows": groups[0].rows,
        "inputs": inputs,
        "constant": inputs - len(values),
        "kappa": kappa,
        "kappa_lower_bound": bound,
        "noise_floor": floor**2,
        "resolved": known,
        "converged": known,
    }


def too_wide(layer: Layer) -> bool:
    """Return whether a layer's inputs are too many to be watched."""
    return layer.fan_in > LARGEST and not layer.one_hot


def _correlation(layer: Layer) -> InputCorrelation | OneHotCorrelation:
    if layer.one_hot:
        return OneHotCorrelation(layer.inputs, getattr(layer.module, "padding_idx", None))
    return InputCorrelation(bias=any(bias.requires_grad for bias in layer.biases))


@contextmanager
def watching(blocks: Sequence[LayerBlock]) -> Iterator[Mapping[str, list[Any]]]:
    """Gather, in the forward passes inside, the correlation of the inputs of each layer with rows, by group."""
    seen: dict[str, list[Any]] = {}
    handles = []

    def watch(layer: Layer) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            with torch.no_grad():
                groups = input_rows(layer, args, kwargs, output)
            if not groups:
                return
            own = seen.setdefault(layer.name, [_correlation(layer) for _ in groups])
            for correlation, rows in zip(own, groups, strict=True):
                correlation.update(rows)

        return hook

    try:
        for block in blocks:
            layer = block.layer
            if layer is not None and not too_wide(layer):
                handles.append(layer.module.register_forward_hook(watch(layer), with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
