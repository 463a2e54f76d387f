"""A Kronecker pair for each layer, as K-FAC and Shampoo keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradcond.curvature.factors import Factor, require_length
from gradcond.curvature.operators import working_dtype


class KroneckerFactor(Factor):
    r"""P = A^p x B^p on the matrix of each layer named, Z -> A^p Z B^p, and the identity on everything else.

    So M G = A^2p G B^2p. K-FAC, whose step is S^-1 G A^-1 with the covariances S of the output's gradients and A
    of the inputs, has p = -1/2; Shampoo, L^-1/4 G R^-1/4, has p = -1/8, and with its exponent raised to 1/2 as in
    practice p = -1/4.

    Args:
        model: gives the places in the flat vector of all parameters that require grad.
        pairs: for a parameter's name, A (out, out) and B (fan_in, fan_in) of its matrix (out, fan_in), whose
            columns are all axes but the first. For a module's name they are of its weight; B may be
            (fan_in + 1, fan_in + 1), of the weight and the bias behind it (K-FAC's homogeneous coordinate).
        power: p; A and B are then symmetric, and positive definite for a negative p. None takes them as they
            are, of any kind: Z -> A Z B^T.

    Raises:
        ValueError: a name, a shape or a sign is not as expected.

    References:
        J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015.
        V. Gupta, T. Koren, Y. Singer, Shampoo: preconditioned stochastic tensor optimization, 2018.

    Example:
        >>> pair = torch.tensor([[4.0]]), torch.diag(torch.tensor([1.0, 0.25]))
        >>> KroneckerFactor(nn.Linear(2, 1), {"weight": pair}).factor(torch.ones(3))
        tensor([0.5000, 1.0000, 1.0000])
    """

    def __init__(
        self, model: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]], *, power: float | None = -0.5
    ) -> None:
        places, n = {}, 0
        for name, p in model.named_parameters():
            if p.requires_grad:
                places[name] = slice(n, n + p.numel()), tuple(p.shape)
                n += p.numel()
        self.n = n
        self.blocks: list[tuple[list[slice], Tensor, Tensor]] = []
        taken: set[str] = set()
        for name, (left, right) in pairs.items():
            names = _parameters_of(name, right, places)
            if taken & set(names):
                raise ValueError(f"expected one pair for each parameter, got a second one for {names[0]!r}")
            taken.update(names)
            rows, *fan_in = places[names[0]][1]
            expected = rows, math.prod(fan_in) + len(names) - 1
            for side, size in zip((left, right), expected, strict=True):
                if tuple(side.shape) != (size, size):
                    raise ValueError(
                        f"expected factors ({rows}, {rows}) and {expected[1:] * 2} for {name!r}, got "
                        f"{tuple(left.shape)} and {tuple(right.shape)}"
                    )
            left, right = (s.detach() if power is None else _power(s, power, name) for s in (left, right))
            self.blocks.append(([places[own][0] for own in names], left, right))

    def factor(self, z: Tensor) -> Tensor:
        """P z."""
        return self._blockwise(z, [(left, right) for _, left, right in self.blocks])

    def factor_transpose(self, v: Tensor) -> Tensor:
        """P^T v."""
        return self._blockwise(v, [(left.mT, right.mT) for _, left, right in self.blocks])

    def _blockwise(self, z: Tensor, sides: list[tuple[Tensor, Tensor]]) -> Tensor:
        require_length(z, self.n)
        result = z.clone()
        for (spans, *_), (left, right) in zip(self.blocks, sides, strict=True):
            rows = len(left)
            matrix = torch.cat([z[span].reshape(rows, -1, *z.shape[1:]) for span in spans], 1)
            mapped = torch.einsum("ab,bj...,ij->ai...", left.to(z), matrix, right.to(z))
            widths = [(span.stop - span.start) // rows for span in spans]
            for span, part in zip(spans, mapped.split(widths, 1), strict=True):
                result[span] = part.flatten(0, 1)
        return result


def _parameters_of(name: str, right: Tensor, places: Mapping[str, tuple[slice, tuple[int, ...]]]) -> list[str]:
    """The parameter, or the weight of the module and the bias behind it, that a pair is for."""
    own = name if name in places else f"{name}.weight".lstrip(".")
    if own not in places or not places[own][1]:
        raise ValueError(
            f"expected the name of a parameter with axes that requires grad, or of a module with such a weight, "
            f"got {name!r}; there are {', '.join(places)}"
        )
    bias = f"{name}.bias".lstrip(".")
    with_bias = own != name and bias in places and len(right) == math.prod(places[own][1][1:]) + 1
    return [own, bias] if with_bias else [own]


def _power(side: Tensor, power: float, name: str) -> Tensor:
    """A symmetric positive matrix to a power, in its working dtype."""
    wide = side.detach().double()
    if not float((wide - wide.mT).abs().max()) <= 1e-5 * float(wide.abs().max()):  # NaN and infinity, too
        raise ValueError(f"expected finite symmetric factors for {name!r}; power=None takes others as they are")
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    least, top = float(values[0]), float(values[-1])
    rounding = len(values) * torch.finfo(working_dtype(side.dtype)).eps * top
    if least < -rounding or (power < 0 and not least > len(values) * 1e-16 * top):
        raise ValueError(
            f"expected positive definite factors for {name!r}, got eigenvalues from {least:.3g} to {top:.3g}; "
            "add damping, A + c I"
        )
    return ((vectors * values.clamp(min=0).pow(power)) @ vectors.mT).to(working_dtype(side.dtype))
