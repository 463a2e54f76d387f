"""The correlation of a layer's inputs: what no scaling of them can mend, the floor of BNP.

Under squared error the Gauss-Newton block of a dense layer's unit is H^T H with rows [1, h]. With exact statistics
and no damping BNP leaves the correlation matrix of h, and a one for the bias; so kappa of the correlation matrix
is what remains, and only whitening (K-FAC) goes below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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

    >>> correlation = InputCorrelation()
    >>> correlation.update(torch.tensor([[0.0, 1.0], [2.0, 2.0]]))
    >>> correlation.update(torch.tensor([[4.0, 1.0], [2.0, 0.0]]))
    >>> correlation.spectrum()[0].round(decimals=6)
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.rows, self.pieces, self.eps = 0, 0, 0.0

    def update(self, x: Tensor) -> None:
        """Take the rows of x, (rows, inputs), too."""
        self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        x = x.detach().to("cpu", torch.float64)
        if not self.rows:
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
        values = torch.linalg.svdvals(own[:, varies] / own[:, varies].norm(dim=0))
        values = functional.pad(values, (0, int(varies.sum()) - len(values)))  # zero where rows are few
        # rounding of the inputs, one by one, and of the decompositions, column by column
        inputs = self.eps * (1 + (len(values) / self.rows) ** 0.5)
        decompositions = torch.finfo(torch.float64).eps * (len(size) * self.pieces) ** 0.5
        return values, float((size / deviation)[varies].max()) * (inputs + decompositions)


def condition(groups: Sequence[InputCorrelation], tol: float = 1e-2) -> dict[str, Any]:
    """Return kappa of the correlation matrices of all groups, over the nonzero eigenvalues.

    Inputs that vary by no more than rounding are left out. ``kappa`` is nan and ``resolved`` False where rounding
    hides the smallest eigenvalue; ``kappa_lower_bound`` holds in any case.
    """
    spectra = [group.spectrum() for group in groups]
    values, error = torch.cat([own for own, _ in spectra]), max(error for _, error in spectra)
    inputs = sum(group.factor.shape[1] - 1 for group in groups)
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


@contextmanager
def watching(blocks: Sequence[LayerBlock]) -> Iterator[Mapping[str, list[InputCorrelation]]]:
    """Gather, in the forward passes inside, the correlation of the inputs of each layer with rows, by group."""
    seen: dict[str, list[InputCorrelation]] = {}
    handles = []

    def watch(layer: Layer) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            with torch.no_grad():
                groups = columns(layer, args, kwargs, output)
            if not groups:
                return
            own = seen.setdefault(layer.name, [InputCorrelation() for _ in groups])
            for correlation, rows in zip(own, groups, strict=True):
                correlation.update(rows)

        return hook

    try:
        for block in blocks:
            layer = block.layer
            if layer is not None and layer.fan_in <= LARGEST:
                handles.append(layer.module.register_forward_hook(watch(layer), with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def columns(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Tensor]:
    """Return what the rows of a layer's weight are multiplied by in one call: for each group (rows, fan_in).

    Nothing for layers whose input is known by indices or by its moments alone.
    """
    x = layer.observe(layer.module, args, kwargs, output)
    if not isinstance(x, Tensor) or layer.one_hot or x.numel() == 0 or (layer.taps and not layer.convolution):
        return []
    if not layer.taps:
        return [x.reshape(-1, layer.inputs)]
    # the unfolded input is the convolution with the identity
    module, taps = layer.module, layer.taps
    weight = torch.eye(layer.fan_in, dtype=x.dtype, device=x.device).view(layer.fan_in, -1, *layer.kernel)
    if layer.transposed:
        weight = weight.transpose(0, 1).repeat(layer.groups, *[1] * (taps + 1))
        geometry = module.stride, module.padding, module.output_padding, layer.groups, module.dilation
        unfolded = getattr(functional, f"conv_transpose{taps}d")(x, weight, None, *geometry)
    else:
        unfolded = module._conv_forward(x, weight.repeat(layer.groups, *[1] * (taps + 1)), None)
    unfolded = unfolded.movedim(-1 - taps, -1).reshape(-1, layer.groups, layer.fan_in)
    return list(unfolded.unbind(1))
